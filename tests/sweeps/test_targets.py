"""Commands that a sweep prints, and what it hands to launchers."""

import shlex
import subprocess
import sys

import pytest
import yaml
from support.sweeps import RATES

from llada_jax.config import load_config
from llada_jax.sweeps.targets import jobset_stem


def test_dry_run_prints_commands_that_train_accepts_and_starts_nothing(
    write_config, call_sweep, tmp_path
):
    path = write_config(
        "add({'samples.prompts': ('a b', \"it's\")}, seed=3)", "add({'data.path': 'x y=0.5,z=0.5'})"
    )
    out, _ = call_sweep("--run", "local", "--dry-run", "--config.num_steps=7")
    commands = [shlex.split(line) for line in out.splitlines()]
    assert [command[:4] for command in commands] == [
        [sys.executable, "-m", "llada_jax", "train"]
    ] * 2
    found = [
        load_config(path, [w.removeprefix("--config.") for w in c if w.startswith("--config.")])
        for c in commands
    ]
    assert [c[c.index("--workdir") + 1] for c in commands] == [
        f"{tmp_path}/runs/000",
        f"{tmp_path}/runs/001",
    ]
    assert [f.num_steps for f in found] == [7, 7]
    assert (found[0].samples.prompts, found[0].seed) == (("a b", "it's"), 3)
    assert found[1].data.path == "x y=0.5,z=0.5"
    assert not (tmp_path / "runs").exists()


def test_slurm_gets_one_array_of_what_is_not_finished(
    write_config, call_sweep, tmp_path, fake_train
):
    write_config(RATES)
    call_sweep("--index", "1")
    words = [
        "--run",
        "slurm",
        "--dry-run",
        "--parallel",
        "4",
        "--",
        "--unchecked",  # its data are nowhere
        "--partition",
        "gpu",
        "--time",
        "2:00:00",
    ]
    script, _ = call_sweep(*words)
    assert "#SBATCH --array=0,2%4\n" in script
    assert "#SBATCH --partition=gpu\n" in script
    (command,) = [line for line in script.splitlines() if line.startswith("command=(")]
    assert f"llada-jax sweep --config {tmp_path}/config.py --workdir {tmp_path}/runs" in command
    assert command.endswith('--index "$SLURM_ARRAY_TASK_ID")')
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_gke_gets_one_jobset_per_run(write_config, call_sweep):
    write_config(RATES)
    flags = ["--unchecked", "--topology", "v5e-16", "--image", "example.org/llada:1"]
    out, _ = call_sweep("--run", "gke", "--dry-run", "--", *flags)
    # together one stream, which kubectl can apply
    found = list(yaml.safe_load_all(out))
    manifests = [manifest for manifest in found if manifest["kind"] == "JobSet"]
    assert len([m for m in found if m["kind"] == "ConfigMap"]) == 3  # the config travels with each
    assert [manifest["metadata"]["name"] for manifest in manifests] == [
        "runs-000",
        "runs-001",
        "runs-002",
    ]
    for index, manifest in enumerate(manifests):
        pod = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
        assert pod["containers"][0]["command"][:2] == ["llada-jax", "sweep"]
        assert pod["containers"][0]["command"][-2:] == ["--index", str(index)]


@pytest.mark.parametrize(
    ("workdir", "flags", "stem"),
    [
        ("gs://b/Big_Sweep/", [], "big-sweep"),
        ("runs/2026-11-27", [], "sweep-2026-11-27"),
        ("runs/..", [], "sweep"),
        ("runs/a", ["--capacity", "spot", "--name", "mine"], "mine"),
        ("runs/a", ["--name=mine"], "mine"),
    ],
)
def test_jobsets_are_named_after_the_directory_or_as_asked(workdir, flags, stem):
    assert jobset_stem(workdir, flags) == stem


def test_a_launcher_that_is_missing_or_fails_is_reported(
    write_config, call_sweep, monkeypatch, tmp_path
):
    write_config(RATES)
    call_sweep("--run", "slurm", "--dry-run", "--", "--no-such-flag", status=2)
    monkeypatch.setattr("llada_jax.sweeps.targets.LAUNCHERS", tmp_path)
    assert "run it from a clone" in call_sweep("--run", "slurm", status=2)[1]

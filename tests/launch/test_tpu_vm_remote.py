"""What launch/tpu_vm.py does to workers, command by command: how they are reached, what their
scripts change on a machine, and who is asked to stop.
"""

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tpu_vm_commands
import tpu_vm_workers
from cloud import parse_buckets
from support.fake_gcloud import Cloud, until
from support.gcloud import dry_run
from support.processes import is_gone

from llada_jax.cluster.compiler_flags import flags_named


def verb_of(command: list[str]) -> str:
    """Returns "create", "describe", "ssh" ..."""
    return next(word for word in command if word in ("create", "describe", "delete", "ssh", "scp"))


def test_every_command_names_its_place_and_workers_without_an_address_are_reached_inside():
    commands = dry_run("--project", "p-1", "--internal-ip", "--create-flag=--network=n", "--delete")
    assert {verb_of(command) for command in commands} == {
        *("create", "describe", "delete", "ssh", "scp")
    }
    for command in commands:
        assert {"--zone=us-east5-a", "--project=p-1"} <= set(command)
        verb = verb_of(command)
        assert ("--internal-ip" in command) == (verb in ("ssh", "scp"))
        assert ("--internal-ips" in command) == ("--network=n" in command) == (verb == "create")
        # what a queued resource has made goes with it
        assert ("--force" in command) == (verb == "delete")
        # two minutes without an answer
        alive = {"--ssh-flag=-oServerAliveInterval=15", "--ssh-flag=-oServerAliveCountMax=8"}
        assert (alive <= set(command)) == (verb == "ssh")
        assert ("--worker=all" in command) or verb != "scp"
    usual = {word for command in dry_run("--delete") for word in command}
    assert not usual & {"--internal-ip", "--internal-ips", "--project=p-1", "--network=n"}


def test_slices_are_made_together_and_each_worker_of_each_starts_the_command():
    commands = dry_run("--slices", "3", topology="v6e-8")
    (create,) = [command for command in commands if verb_of(command) == "create"]
    assert {"--node-count=3", "--node-prefix=run"} <= set(create)
    starts = [command for command in commands if "exec llada-jax train" in command[-1]]
    # v6e-8 is one TPU VM, and two nodes of GKE
    assert [(command[5], command[7]) for command in starts] == [
        (f"run-{number}", "--worker=0") for number in range(3)
    ]


def test_a_preset_of_flags_reaches_the_command_unless_a_variable_replaces_it():
    ((name, value),) = flags_named("v6e").items()
    for words, expected in (([], value), (["--env", f"{name}=own"], "own")):
        start = dry_run("--flags", "v6e", *words)[-1][-1]
        assert f"export {name}={shlex.quote(expected)}\n" in start


def script_done(script: str, home: Path, **programs: str) -> str:
    """Runs a script in a home of its own, with programs that are not on this machine."""
    (home / "bin").mkdir(exist_ok=True)
    (home / "llada_jax").mkdir(exist_ok=True)
    for name, code in programs.items():
        (home / "bin" / name).write_text(f"#!/bin/sh\n{code}\n")
        (home / "bin" / name).chmod(0o755)
    env = {"HOME": str(home), "PATH": f"{home}/bin:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-c", script], env=env, capture_output=True, text=True, check=True, timeout=60
    )
    return done.stdout


def test_a_worker_that_does_not_find_its_chips_ends_and_finds_the_others_unless_told(tmp_path):
    shown = [sys.executable, "-c", "import os; print(dict(os.environ))"]
    for env, platforms in (({}, "tpu,cpu"), ({"JAX_PLATFORMS": "cpu"}, "cpu")):
        out = script_done(tpu_vm_commands.run_script(shown, env), tmp_path)
        assert f"'JAX_PLATFORMS': '{platforms}'" in out
        # the port that Google's firewall rule opens
        assert "'JAX_COORDINATOR_PORT': '8476'" in out


def test_only_the_command_of_an_earlier_start_is_killed(tmp_path):
    """The number in the file may be that of another process by now."""
    (tmp_path / "llada_jax").mkdir()
    quiet = {"sudo": "true", "sleep": "true"}
    for place, is_killed in ((tmp_path, False), (tmp_path / "llada_jax", True)):
        process = subprocess.Popen(["/bin/sleep", "600"], cwd=place)
        try:
            (tmp_path / "llada_jax.pid").write_text(f"{process.pid}\n")
            script_done(tpu_vm_commands.CLEAN, tmp_path, **quiet)
            if is_killed:
                assert process.wait(60) == -signal.SIGKILL
            assert (process.poll() is not None) == is_killed
            assert not (tmp_path / "llada_jax.pid").exists()
        finally:
            process.kill()
            process.wait(60)


def test_a_stop_asks_the_command_to_save(tmp_path):
    process = subprocess.Popen(["/bin/sleep", "600"])
    (tmp_path / "llada_jax.pid").write_text(f"{process.pid}\n")
    script_done(tpu_vm_commands.STOP, tmp_path)
    assert process.wait(60) == -signal.SIGTERM


def test_a_bucket_that_is_mounted_is_not_mounted_again(tmp_path):
    buckets = parse_buckets(["one-bucket:/data/a", "two-bucket:/data/b"])
    programs = {
        "mountpoint": 'test "$2" = /data/a',
        "sudo": 'echo "$@"',
        "gcsfuse": 'echo "$@"',
    }
    out = script_done(tpu_vm_commands.mount_script(buckets), tmp_path, **programs)
    # gcsfuse mounts only where this user may write
    made = f"mkdir -p /data/b\nchown {os.getuid()} /data/b\n"
    assert out == f"{made}--implicit-dirs two-bucket /data/b\n"


def test_a_python_that_is_there_is_not_made_again(tmp_path):
    python3 = """echo "$@"
case "$*" in *venv*) mkdir -p "$HOME/llada_jax.venv/bin"
  cp /bin/true "$HOME/llada_jax.venv/bin/python" ;; esac"""
    made = f"-m uv venv --quiet --python 3.12 {tmp_path}/llada_jax.venv\n"
    for is_made in (True, False):
        out = script_done(tpu_vm_commands.UNPACK, tmp_path, python3=python3, tar="true")
        assert (made in out) == is_made


def test_a_lock_keeps_versions_with_their_conditions_and_nothing_else():
    printed = "Resolved 3 packages\njax==0.10.2\r\ntorch==2.9+cpu ; sys_platform == 'linux'\n"
    printed += "a line with ==\n"
    lock = tpu_vm_commands.locked_in(printed, ())
    assert lock.splitlines()[1:] == ["jax==0.10.2", "torch==2.9+cpu ; sys_platform == 'linux'"]
    assert tpu_vm_commands.is_lock_of(lock, ())
    assert not tpu_vm_commands.is_lock_of(lock, ("eval",))
    assert tpu_vm_commands.locked_in("nothing\n", ()) == ""


def test_files_that_were_deleted_since_the_last_commit_are_not_copied(tmp_path):
    def git(*words: str) -> None:
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True, capture_output=True)

    git("init")
    for name in ("kept.py", "deleted.py"):
        (tmp_path / name).write_text("")
    git("add", ".")
    (tmp_path / "deleted.py").unlink()
    assert tpu_vm_workers.files_of(tmp_path) == ["kept.py"]
    assert tpu_vm_workers.pack(tmp_path, tmp_path / "a.tar.gz") == 1


# ---- stops and ends of runs


@pytest.fixture
def one_worker(tmp_path):
    cloud = Cloud(tmp_path, num_workers=1)
    cloud.plan("states", ["ACTIVE"])
    return cloud


V6E_8 = {"topology": "v6e-8"}


def test_a_worker_that_does_not_save_in_time_is_killed_and_the_run_counts_as_stopped(one_worker):
    one_worker.outcomes(["hang"])
    process = one_worker.start("--grace", "1", **V6E_8)
    until(lambda: one_worker.starts() == 1)
    pid = (one_worker.home("run", 0) / "llada_jax.pid").read_text().strip()
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 42, err
    until(lambda: is_gone(pid))


def test_ctrl_c_reaches_the_launcher_alone(one_worker):
    """A terminal sends it to the whole group of processes."""
    one_worker.outcomes(["save"])
    process = one_worker.start(start_new_session=True, **V6E_8)
    until(lambda: one_worker.starts() == 1)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 42, err
    assert "the same command continues" in err
    assert "saved" in (one_worker.logs / "slice-0-worker-0.log").read_text()


def test_a_second_ctrl_c_ends_the_launcher_and_leaves_the_workers(one_worker):
    one_worker.outcomes(["hang"])
    process = one_worker.start("--grace", "600", **V6E_8)
    until(lambda: one_worker.starts() == 1)
    process.send_signal(signal.SIGINT)
    until(lambda: "kill -TERM" in (one_worker.directory / "calls").read_text())
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    pid = int((one_worker.home("run", 0) / "llada_jax.pid").read_text())
    assert not is_gone(pid)
    os.kill(pid, signal.SIGKILL)
    assert process.returncode == 130
    assert err.splitlines()[-1] == "tpu_vm: interrupted; the workers may still be running."


def test_all_slices_are_cleared_before_the_command_and_asked_to_save(tmp_path):
    cloud = Cloud(tmp_path, num_workers=1)
    cloud.plan("states", ["ACTIVE"])
    nodes = ("run-0", "run-1")
    for node in nodes:
        cloud.outcomes(["save"], node=node)
    process = cloud.start("--slices", "2", **V6E_8)
    until(lambda: all(cloud.starts(node=node) for node in nodes))
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 42, err
    for number, node in enumerate(nodes):
        assert "rm -f /tmp/libtpu_lockfile" in (cloud.home(node, 0) / "sudo").read_text()
        assert "saved" in (cloud.logs / f"slice-{number}-worker-0.log").read_text()


def test_a_stop_while_the_resource_is_waited_for_deletes_it_if_asked(one_worker):
    one_worker.plan("states", ["", "WAITING_FOR_RESOURCES"])
    process = one_worker.start("--delete", **V6E_8)
    until(lambda: one_worker.count("describe") > 2)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 42, err
    assert one_worker.count("delete") == 1
    assert "run is deleted" in err


def test_a_resource_that_is_gone_at_the_end_counts_as_deleted(one_worker):
    one_worker.outcomes(["0"])
    one_worker.plan("delete-errors", ["NOT_FOUND: no such resource"])
    status, err = one_worker.run("--delete", **V6E_8)
    assert status == 0, err
    assert "run is deleted" in err


@pytest.mark.parametrize(("outcome", "starts"), [("3", 1), ("2", 1), ("1", 2), ("137", 2)])
def test_what_would_recur_ends_a_run_even_where_its_slice_is_taken_away(
    one_worker, outcome, starts
):
    one_worker.plan("states", ["ACTIVE", "SUSPENDING", "SUSPENDED", "ACTIVE"])
    one_worker.outcomes([outcome], ["0"])
    status, err = one_worker.run(**V6E_8)
    assert status == (int(outcome) if starts == 1 else 0), err
    assert one_worker.starts() == starts


def test_the_first_worker_is_heard_and_no_earlier_start_of_it(one_worker):
    one_worker.outcomes(["0"], ["0"])
    heard = [
        one_worker.run(**V6E_8, command=f"bash -c 'echo the {number} start; bash job.sh'")[1]
        for number in ("first", "second")
    ]
    assert ["the first start\n" in err for err in heard] == [True, False]
    assert ["the second start\n" in err for err in heard] == [False, True]

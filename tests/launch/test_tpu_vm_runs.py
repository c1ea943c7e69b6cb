"""Runs of launch/tpu_vm.py against a stand-in for gcloud (support/fake_gcloud.py)."""

import signal
import subprocess
import time
import types

import pytest
import tpu_vm
import tpu_vm_workers
from support.fake_gcloud import JOB, Cloud, until
from support.processes import is_gone
from tpu_vm_commands import STARTED

# ---- runs without a restart


def test_a_run_is_created_waited_for_installed_and_run_on_every_worker(cloud):
    cloud.plan("states", ["", "CREATING", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"])
    cloud.outcomes(["0"] * 4)
    status, err = cloud.run(command="bash job.sh --config 'a b.py'")
    assert status == 0, err
    assert cloud.count("create") == 1
    assert cloud.count("delete") == 0
    for state in ("not there", "CREATING", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"):
        assert f"run is {state}" in err
    for worker in range(4):
        home = cloud.home("run", worker)
        assert (home / "started").read_text() == "--config a b.py\n"
        # The file is not committed, but git does not ignore it either.
        assert (home / "llada_jax" / "job.sh").read_text() == JOB
        assert not (home / "llada_jax" / ".venv").exists()
        assert "uv pip install" in (home / "installed").read_text()
        assert "rm -f /tmp/libtpu_lockfile" in (home / "sudo").read_text()
        assert STARTED in (cloud.logs / f"slice-0-worker-{worker}.log").read_text()
    # The output of the first worker is shown.
    assert STARTED in err


def test_an_active_resource_is_used_as_it_is(cloud):
    cloud.plan("states", ["ACTIVE"])
    cloud.outcomes(["0"] * 4)
    assert cloud.run()[0] == 0
    assert cloud.count("create") == 0


def test_all_slices_run_with_a_log_for_each_worker(tmp_path):
    # v6e-8 is one TPU VM.
    cloud = Cloud(tmp_path, num_workers=1)
    cloud.plan("states", ["", "ACTIVE"])
    for node in ("run-0", "run-1"):
        cloud.outcomes(["0"], node=node)
    assert cloud.run("--slices", "2", topology="v6e-8")[0] == 0
    assert sorted(path.name for path in cloud.logs.glob("*.log")) == [
        "slice-0-worker-0.log",
        "slice-1-worker-0.log",
    ]
    assert [cloud.starts(node=node) for node in ("run-0", "run-1")] == [1, 1]


def installed_versions(cloud, *, nodes=("run",)) -> set[str]:
    """Returns the locks that the workers have got."""
    homes = [cloud.home(node, worker) for node in nodes for worker in range(cloud.num_workers)]
    return {(home / "llada_jax.lock").read_text() for home in homes}


@pytest.mark.slow
def test_all_hosts_get_the_versions_that_the_first_one_has_resolved(tmp_path):
    cloud = Cloud(tmp_path, num_workers=1)
    cloud.plan("states", ["ACTIVE"])
    for node in ("run-0", "run-1"):
        cloud.outcomes(["0"], ["0"], node=node)
    assert cloud.run("--slices", "2", topology="v6e-8")[0] == 0
    (lock,) = installed_versions(cloud, nodes=("run-0", "run-1"))
    # a line that is not a version, such as a warning, is not one of them
    assert lock == (cloud.logs / "run.lock").read_text()
    extras, version = lock.splitlines()
    assert extras == "# llada_jax[tpu,data,gs,s3,hf]"
    assert version.startswith("jax==0.")
    # A later start, with whatever has been released since, gets the same.
    assert cloud.run("--slices", "2", topology="v6e-8")[0] == 0
    assert installed_versions(cloud, nodes=("run-0", "run-1")) == {lock}


@pytest.mark.slow
def test_another_extra_is_added_to_the_versions_of_the_first_start(tmp_path):
    cloud = Cloud(tmp_path, num_workers=1)
    cloud.plan("states", ["ACTIVE"])
    cloud.outcomes(["0"], ["0"])
    # keeps the versions of the file, as uv does, and adds one that is named after the last extra
    last_extra = r"s/.*--extra \([a-z]*\) setup.py/\1==1/p"
    cloud.program(
        "remote/python3",
        '#!/bin/sh\ncase "$*" in *"--constraint $HOME/llada_jax.lock"*)\n'
        f'  cat "$HOME/llada_jax.lock"; echo "$*" | sed -n "{last_extra}" ;; esac\n',
    )
    assert cloud.run(topology="v6e-8")[0] == 0
    assert installed_versions(cloud) == {"# llada_jax[tpu,data,gs,s3,hf]\nhf==1\n"}
    assert cloud.run("--extra", "eval", topology="v6e-8")[0] == 0
    assert installed_versions(cloud) == {"# llada_jax[tpu,data,gs,s3,hf,eval]\nhf==1\neval==1\n"}


@pytest.mark.slow
def test_a_slice_that_replaces_another_gets_the_same_versions(cloud):
    cloud.plan("states", ["ACTIVE", "SUSPENDED", "SUSPENDED", "PROVISIONING", "ACTIVE"])
    cloud.outcomes(["255", "42", "42", "42"], ["0"] * 4)
    assert cloud.run()[0] == 0
    assert installed_versions(cloud) == {(cloud.logs / "run.lock").read_text()}
    compiled = [
        worker
        for worker in range(4)
        if "pip compile" in (cloud.home("run", worker) / "installed").read_text()
    ]
    assert compiled == [0]
    text = (cloud.home("run", 0) / "installed").read_text()
    assert text.count("pip compile") == 1
    assert "--extra tpu --extra data --extra gs --extra s3 --extra hf setup.py" in text
    assert text.count("llada_jax[tpu,data,gs,s3,hf]") == 2


def test_a_first_worker_that_names_no_version_is_an_error(cloud):
    cloud.plan("states", ["ACTIVE"])
    cloud.program("remote/python3", "#!/bin/sh\n")
    status, err = cloud.run()
    assert status == 2
    assert "names no version of any package" in err


def test_buckets_are_mounted_and_the_own_script_runs_before_the_command(cloud):
    cloud.plan("states", ["ACTIVE"])
    cloud.outcomes(["0"] * 4)
    own = cloud.directory / "own.sh"
    own.write_text('echo "$PWD $(command -v python3)" > "$HOME/set-up"\n')
    mounts = ["--gcs-fuse", "b-1:/nowhere/data:ro", "--gcs-fuse", "b-2:/nowhere/runs"]
    status, err = cloud.run(*mounts, "--set-up", str(own), "--extra", "eval")
    assert status == 0, err
    for worker in range(4):
        home = cloud.home("run", worker)
        assert (home / "mounted").read_text().splitlines() == [
            "--implicit-dirs -o ro b-1 /nowhere/data",
            "--implicit-dirs b-2 /nowhere/runs",
        ]
        assert (home / "set-up").read_text().split()[0] == str(home / "llada_jax")
        assert "llada_jax[tpu,data,gs,s3,hf,eval]" in (home / "installed").read_text()


def test_the_own_script_that_fails_ends_the_start(cloud):
    cloud.plan("states", ["ACTIVE"])
    own = cloud.directory / "own.sh"
    own.write_text("false\n")
    status, err = cloud.run("--set-up", str(own))
    assert status == 2
    assert cloud.starts() == 0


def test_the_resource_is_deleted_at_the_end_if_asked(cloud):
    cloud.plan("states", ["ACTIVE"])
    cloud.outcomes(["0", "0", "2", "0"])
    assert cloud.run("--delete")[0] == 2
    assert "queued-resources delete" in cloud.calls()[-1]


# ---- restarts


@pytest.mark.slow
def test_42_starts_the_same_command_again(cloud):
    cloud.plan("states", ["ACTIVE"])
    cloud.outcomes(["42"] * 4, ["42"] * 4, ["0"] * 4)
    status, err = cloud.run()
    assert status == 0, err
    assert [cloud.starts(worker) for worker in range(4)] == [3] * 4
    assert cloud.count("create") == 0


@pytest.mark.slow
@pytest.mark.parametrize("state", ["SUSPENDED", "FAILED"])
def test_a_lost_slice_is_deleted_and_created_again_and_the_run_is_repeated(cloud, state):
    # The first state is seen before the run, the others while the slice is brought up again.
    cloud.plan("states", ["ACTIVE", "SUSPENDING", state, "PROVISIONING", "ACTIVE"])
    cloud.outcomes(["42", "143", "255", "42"], ["0"] * 4)
    status, err = cloud.run()
    assert status == 0, err
    assert cloud.count("delete") == 1
    assert cloud.count("create") == 1
    assert [cloud.starts(worker) for worker in range(4)] == [2] * 4


@pytest.mark.slow
def test_a_crash_while_the_slice_is_being_taken_away_restarts_the_run(cloud):
    cloud.plan("states", ["ACTIVE", "SUSPENDING", "SUSPENDED", "ACTIVE"])
    cloud.outcomes(["1"] * 4, ["0"] * 4)
    assert cloud.run()[0] == 0
    assert cloud.starts() == 2


def test_a_resource_that_was_left_suspended_is_created_again(cloud):
    cloud.plan("states", ["SUSPENDED", "WAITING_FOR_RESOURCES", "ACTIVE"])
    cloud.outcomes(["0"] * 4)
    assert cloud.run("--max-restarts", "0")[0] == 0
    assert [cloud.count(verb) for verb in ("delete", "create")] == [1, 1]


def test_a_resource_that_fails_again_and_again_is_given_up(cloud):
    cloud.plan("states", ["", "FAILED", "", "FAILED", "", "FAILED"])
    status, err = cloud.run("--max-restarts", "2")
    assert status == 42
    assert "gave up after 2 restarts" in err
    assert [cloud.count(verb) for verb in ("create", "delete")] == [3, 3]


@pytest.mark.slow
def test_a_worker_that_cannot_be_reached_restarts_all_workers(cloud):
    cloud.plan("states", ["ACTIVE"])
    cloud.outcomes(["42", "42", "0", "42"], ["0"] * 4)
    (cloud.home("run", 2) / "unreachable").touch()
    status, err = cloud.run()
    assert status == 0, err
    assert "slice-0-worker-2.log: exit status 255" in err
    assert [cloud.starts(worker) for worker in range(4)] == [2, 2, 1, 2]


@pytest.mark.parametrize(
    ("end", "earlier", "now", "status"),
    [
        ("exit 3", "", STARTED, 3),
        # an earlier start has reached the worker, and this one has not
        ("exit 3", STARTED, "", 255),
        # as when the memory of this machine is full
        ("kill -KILL $$", "", STARTED, 255),
        ("exit 0", "", STARTED, 0),
    ],
)
def test_a_worker_that_was_lost_has_the_status_of_ssh(tmp_path, end, earlier, now, status):
    log = tmp_path / "log"
    log.write_text(earlier + now)
    process = subprocess.Popen(["bash", "-c", end])
    process.wait(60)
    worker = tpu_vm.Running(log=log, offset=len(earlier), process=process)
    assert worker.status() == status


@pytest.mark.slow
def test_the_number_of_restarts_is_limited(cloud):
    cloud.plan("states", ["ACTIVE"])
    cloud.outcomes(*[["42"] * 4] * 3)
    status, err = cloud.run("--max-restarts", "2")
    assert status == 42
    assert "gave up after 2 restarts" in err
    assert cloud.starts() == 3


# ---- ends


@pytest.mark.slow
@pytest.mark.parametrize("status", [1, 2, 3])
def test_a_failure_that_would_recur_ends_the_run_with_its_status(cloud, status):
    cloud.plan("states", ["ACTIVE"])
    cloud.outcomes(["42", "42", str(status), "42"])
    code, err = cloud.run()
    assert code == status
    assert "slice-0-worker-2.log" in err
    assert cloud.starts() == 1


def test_a_failure_ends_the_other_workers_after_the_grace_period(cloud):
    cloud.plan("states", ["ACTIVE"])
    cloud.outcomes(["hang", "3", "hang", "hang"])
    began = time.monotonic()
    assert cloud.run("--grace", "1")[0] == 3
    assert time.monotonic() - began < 60


@pytest.mark.slow
def test_the_next_start_kills_processes_that_an_earlier_start_left(cloud):
    cloud.plan("states", ["ACTIVE"])
    cloud.outcomes(["hang", "42", "42", "42"], ["0"] * 4)
    process = cloud.start("--grace", "1")
    pid_file = cloud.home("run", 0) / "llada_jax.pid"
    until(lambda: cloud.starts() == 1)
    left = int(pid_file.read_text())
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert is_gone(left)


def test_processes_that_hold_the_chips_are_killed(cloud):
    cloud.plan("states", ["ACTIVE"])
    cloud.outcomes(["0"] * 4)
    (cloud.home("run", 2) / "holders").write_text("4321\n4321\n77\n")
    assert cloud.run()[0] == 0
    sudo = (cloud.home("run", 2) / "sudo").read_text()
    assert "lsof -t /dev/accel* /dev/vfio/*" in sudo
    assert "kill -KILL 4321 77" in sudo


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_request_lets_every_worker_save_and_does_not_restart(cloud, number):
    cloud.plan("states", ["ACTIVE"])
    cloud.outcomes(["save"] * 4)
    process = cloud.start()
    until(lambda: all(cloud.starts(worker) for worker in range(4)))
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 42
    assert "the same command continues" in err
    assert cloud.starts() == 1
    for worker in range(4):
        assert "saved" in (cloud.logs / f"slice-0-worker-{worker}.log").read_text()


def test_a_stop_request_during_the_wait_leaves_the_resource_in_the_queue(cloud):
    cloud.plan("states", ["", "WAITING_FOR_RESOURCES"])
    process = cloud.start()
    until(lambda: cloud.count("describe") > 2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 42
    assert "stays queued" in err
    assert cloud.count("delete") == 0


# ---- errors of gcloud


@pytest.mark.slow
def test_commands_that_fail_with_transient_errors_are_tried_again(cloud):
    cloud.plan("states", ["!UNAVAILABLE: try later", "", "!HTTPError 503: backend", "ACTIVE"])
    cloud.plan(
        "create-errors", ["DEADLINE_EXCEEDED", "ALREADY_EXISTS: the first try had come through"]
    )
    cloud.plan("ssh", [255, 255])
    cloud.outcomes(["0"] * 4)
    status, err = cloud.run()
    assert status == 0, err
    assert cloud.count("create") == 2


def test_a_command_that_is_killed_on_this_machine_is_tried_again(tmp_path):
    script = 'mkdir "$0" 2>/dev/null && kill -KILL $$; echo there'
    stop = types.SimpleNamespace(is_requested=False)
    command = ["bash", "-c", script, str(tmp_path / "killed")]
    assert tpu_vm_workers.gcloud(command, poll=0.01, stop=stop) == "there"


@pytest.mark.parametrize(
    "error", ["PERMISSION_DENIED: tpu.nodes.create", "RESOURCE_EXHAUSTED: quota limit 'TPUV5s'"]
)
def test_a_permanent_error_is_reported_in_the_words_of_gcloud(cloud, error):
    cloud.plan("states", [""])
    cloud.plan("create-errors", [error])
    status, err = cloud.run()
    assert status == 2
    assert error in err
    assert "Traceback" not in err
    assert cloud.count("create") == 1


def test_a_transient_error_that_lasts_too_long_is_reported(cloud):
    cloud.plan("states", ["!UNAVAILABLE: down"])
    status, err = cloud.run()
    assert status == 2
    assert cloud.count("describe") == tpu_vm_workers.MAX_TRIES
    assert "UNAVAILABLE" in err


def test_a_slice_that_is_taken_away_during_setup_is_brought_up_again(cloud):
    cloud.plan("states", ["ACTIVE", "SUSPENDED", "SUSPENDED", "ACTIVE"])
    cloud.plan("ssh", [255] * tpu_vm_workers.MAX_TRIES)
    cloud.outcomes(["0"] * 4)
    status, err = cloud.run()
    assert status == 0, err
    assert "taken away while it was set up" in err

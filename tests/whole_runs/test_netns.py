"""A run on two hosts that loses its link, and each of its hosts.

The hosts are two network namespaces of this machine, each with its own name and address, and one
cable between them.
"""

import time

import pytest
from support.runs import assert_same_run, last_logged_step
from support.two_hosts import two_hosts

NUM_STEPS = 45
HEARTBEAT_S = 10
SETTINGS = (
    f"num_steps={NUM_STEPS}",
    "schedule.name=cosine",
    "checkpoint.every_steps=3",
    "evaluation.every_steps=0",
    "log.tensorboard=False",
    f"distributed.heartbeat_timeout_s={HEARTBEAT_S}",
)


hosts = pytest.fixture(scope="module")(two_hosts)


@pytest.mark.slow
def test_a_run_that_loses_its_link_and_each_of_its_hosts_is_the_undisturbed_run(hosts, runs):
    straight, workdir = runs.directory / "netns-straight", runs.directory / "netns"
    knobs = (f"data.path={runs.dataset}", *SETTINGS)
    assert hosts.end(hosts.start(runs, straight, *knobs), straight) == [0, 0], hosts.logs(straight)
    disturbances = {
        "the link is cut": (lambda processes: hosts.set_cable("down"), [42, 42]),
        "host 1 dies": (lambda processes: processes[1].kill(), [42, -9]),
        "host 0, which coordinates, dies": (lambda processes: processes[0].kill(), [-9, 42]),
    }
    for what, (disturb, statuses) in disturbances.items():
        before = last_logged_step(workdir)
        processes = hosts.start(runs, workdir, *knobs)
        deadline = time.monotonic() + 300
        while last_logged_step(workdir) < before + 5:
            assert all(process.poll() is None for process in processes), hosts.logs(workdir)
            assert time.monotonic() < deadline
            time.sleep(0.02)
        disturb(processes)
        assert hosts.end(processes, workdir, seconds=6 * HEARTBEAT_S) == statuses, (
            f"{what}: {hosts.logs(workdir)}"
        )
        assert last_logged_step(workdir) < NUM_STEPS, what
        hosts.set_cable("up")
    assert hosts.end(hosts.start(runs, workdir, *knobs), workdir) == [0, 0], hosts.logs(workdir)
    assert "start       step" in hosts.logs(workdir)
    assert_same_run(workdir, straight, step=NUM_STEPS)

"""A run on two hosts that loses its link, and each of its hosts.

The hosts are two network namespaces of this machine, each with its own name and address, and one
cable between them.
"""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.required import absent
from support.runs import assert_same_run, last_logged_step

NUM_STEPS = 80
HEARTBEAT_S = 10
SETTINGS = (
    f"num_steps={NUM_STEPS}",
    "schedule.name=cosine",
    "checkpoint.every_steps=5",
    "evaluation.every_steps=0",
    "log.tensorboard=False",
    f"distributed.heartbeat_timeout_s={HEARTBEAT_S}",
)


def sh(*words) -> subprocess.CompletedProcess:
    return subprocess.run([str(word) for word in words], capture_output=True, text=True, check=True)


class TwoHosts:
    """Host 0 (10.77.0.1) and host 1 (10.77.0.2), which share the file system and nothing else."""

    def __init__(self):
        self.names = [f"llada{os.getpid()}n{number}" for number in range(2)]
        for name in self.names:
            sh("ip", "netns", "add", name)
        first, second = self.names
        sh(*f"ip link add cable netns {first} type veth peer cable netns {second}".split())
        for number, name in enumerate(self.names):
            sh("ip", "-n", name, "address", "add", f"10.77.0.{number + 1}/24", "dev", "cable")
            for device in ("lo", "cable"):
                sh("ip", "-n", name, "link", "set", device, "up")
            # What `ip netns exec` shows as /etc.
            etc = Path("/etc/netns", name)
            etc.mkdir(parents=True)
            lines = [
                "127.0.0.1 localhost",
                *(f"10.77.0.{i + 1} {host}" for i, host in enumerate(self.names)),
            ]
            (etc / "hosts").write_text("\n".join(lines) + "\n")

    def remove(self) -> None:
        for name in self.names:
            subprocess.run(["ip", "netns", "delete", name], check=False)
            shutil.rmtree(Path("/etc/netns", name), ignore_errors=True)

    def set_cable(self, state: str) -> None:
        sh("ip", "-n", self.names[0], "link", "set", "cable", state)

    def start(self, runs, workdir: Path) -> list[subprocess.Popen]:
        """Starts `llada-jax train` on both hosts."""
        knobs = [f"data.path={runs.dataset}", *SETTINGS]
        train = [sys.executable, "-m", "llada_jax", "train"]
        train += ["--config", str(runs.directory / "small.py"), "--workdir", str(workdir)]
        train += [f"--config.{knob}" for knob in knobs]
        team = {
            "JAX_COORDINATOR_ADDRESS": f"{self.names[0]}:9876",
            "JAX_NUM_PROCESSES": "2",
            "JAX_NUM_CPU_DEVICES": "1",
        }
        processes = []
        for number, name in enumerate(self.names):
            # Each host gets a name of its own, because gloo connects to names.
            command = ["ip", "netns", "exec", name, "unshare", "--uts"]
            command += ["sh", "-c", f'hostname {name}; exec "$@"', "sh", *train]
            env = {**os.environ, **team, "JAX_PROCESS_ID": str(number)}
            with open(f"{workdir}-host{number}.log", "w") as log:
                processes.append(subprocess.Popen(command, env=env, stdout=log, stderr=log))
        return processes

    def end(
        self, processes: list[subprocess.Popen], workdir: Path, *, seconds: float = 300
    ) -> list[int]:
        """Returns the exit statuses, once both have ended."""
        deadline = time.monotonic() + seconds
        try:
            return [process.wait(max(0.1, deadline - time.monotonic())) for process in processes]
        finally:
            for process in processes:
                process.kill()

    def logs(self, workdir: Path) -> str:
        return "\n".join(Path(f"{workdir}-host{number}.log").read_text() for number in range(2))


@pytest.fixture(scope="module")
def hosts():
    if os.geteuid() != 0 or not shutil.which("ip") or not shutil.which("unshare"):
        absent("network namespaces need root, and the programs ip and unshare")
    tried = subprocess.run(
        ["unshare", "--net", "--uts", "true"], capture_output=True, text=True, check=False
    )
    if tried.returncode:
        absent(f"no network namespaces here: {tried.stderr.strip()}")
    two = TwoHosts()
    yield two
    two.remove()


@pytest.mark.slow
def test_a_run_that_loses_its_link_and_each_of_its_hosts_is_the_undisturbed_run(hosts, runs):
    straight, workdir = runs.directory / "netns-straight", runs.directory / "netns"
    assert hosts.end(hosts.start(runs, straight), straight) == [0, 0], hosts.logs(straight)
    disturbances = {
        "the link is cut": (lambda processes: hosts.set_cable("down"), [42, 42]),
        "host 1 dies": (lambda processes: processes[1].kill(), [42, -9]),
        "host 0, which coordinates, dies": (lambda processes: processes[0].kill(), [-9, 42]),
    }
    for what, (disturb, statuses) in disturbances.items():
        before = last_logged_step(workdir)
        processes = hosts.start(runs, workdir)
        deadline = time.monotonic() + 300
        while last_logged_step(workdir) < before + 10:
            assert all(process.poll() is None for process in processes), hosts.logs(workdir)
            assert time.monotonic() < deadline
            time.sleep(0.02)
        disturb(processes)
        assert hosts.end(processes, workdir, seconds=6 * HEARTBEAT_S) == statuses, (
            f"{what}: {hosts.logs(workdir)}"
        )
        assert last_logged_step(workdir) < NUM_STEPS, what
        hosts.set_cable("up")
    assert hosts.end(hosts.start(runs, workdir), workdir) == [0, 0], hosts.logs(workdir)
    assert "start       step" in hosts.logs(workdir)
    assert_same_run(workdir, straight, step=NUM_STEPS)

"""Two hosts in network namespaces of this machine, each with its own name and addresses."""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from support.required import absent


def sh(*words) -> subprocess.CompletedProcess:
    return subprocess.run([str(word) for word in words], capture_output=True, text=True, check=True)


class TwoHosts:
    """Host 0 (10.77.0.1) and host 1 (10.77.0.2), with one cable between them. They share the file
    system, and each sees this machine at `machine_of(number)`.
    """

    def __init__(self):
        self.names = [f"llada{os.getpid()}n{number}" for number in range(2)]
        # Several workers of one test run may have two hosts each, on the same machine.
        self._subnet = os.getpid() % 256

    def set_up(self) -> None:
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

        for number, name in enumerate(self.names):
            uplink = f"up{os.getpid()}n{number}"
            sh(*f"ip link add {uplink} type veth peer name machine netns {name}".split())
            sh("ip", "address", "add", f"{self.machine_of(number)}/24", "dev", uplink)
            sh("ip", "link", "set", uplink, "up")
            sh(
                "ip",
                "-n",
                name,
                "address",
                "add",
                f"{self._network(number)}.2/24",
                "dev",
                "machine",
            )
            sh("ip", "-n", name, "link", "set", "machine", "up")

    def machine_of(self, number: int) -> str:
        """Returns the address at which a host finds what listens on this machine."""
        return f"{self._network(number)}.1"

    def _network(self, number: int) -> str:
        return f"10.{78 + number}.{self._subnet}"

    def remove(self) -> None:
        for name in self.names:
            remove(name)

    def set_cable(self, state: str) -> None:
        sh("ip", "-n", self.names[0], "link", "set", "cable", state)

    def start(
        self, runs, workdir: Path, *knobs: str, environments: Sequence[dict] = ({}, {})
    ) -> list[subprocess.Popen]:
        """Starts `llada-jax train` on both hosts; environments: what each has besides."""
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
            env = {**os.environ, **environments[number], **team, "JAX_PROCESS_ID": str(number)}
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


def remove_those_of_dead_processes() -> None:
    """Removes what a test run has left that was killed; its addresses would be in the way."""
    listed = sh("ip", "netns", "list").stdout
    for name, pid in re.findall(r"^(llada(\d+)n\d)\b", listed, flags=re.MULTILINE):
        if not Path("/proc", pid).exists():
            remove(name)


def remove(name: str) -> None:
    subprocess.run(["ip", "netns", "delete", name], check=False)
    shutil.rmtree(Path("/etc/netns", name), ignore_errors=True)


def two_hosts() -> Iterator[TwoHosts]:
    """Yields two hosts; a test that asks for them is skipped, or fails in CI, where there can be
    none.
    """
    if os.geteuid() != 0 or not shutil.which("ip") or not shutil.which("unshare"):
        absent("network namespaces need root, and the programs ip and unshare")
    tried = subprocess.run(
        ["unshare", "--net", "--uts", "true"], capture_output=True, text=True, check=False
    )
    if tried.returncode:
        absent(f"no network namespaces here: {tried.stderr.strip()}")
    remove_those_of_dead_processes()
    two = TwoHosts()
    try:
        two.set_up()
        yield two
    finally:
        two.remove()

"""The gcloud commands of launch/tpu_vm.py, and the scripts that they run on the workers.

This is not a launcher, and nothing here starts a process; launch/tpu_vm.py imports it.
"""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from cloud import COORDINATOR_PORT, HOST_EXTRAS, Bucket, Capacity

from llada_jax.cluster.hardware import Slice

QUEUED_RESOURCES = ("compute", "tpus", "queued-resources")
TPU_VM = ("compute", "tpus", "tpu-vm")
ARCHIVE = "llada_jax.tar.gz"
# The images of TPU VMs bring 3.10, which is too old for jax.
PYTHON = "3.12"
# A log without this line means that the worker was never reached.
STARTED = "launch: the command starts"


# ---- the gcloud commands


@dataclass(frozen=True, kw_only=True)
class Target:
    """A queued resource, and how its workers are reached.

    Attributes:
        name: of the resource and of its only slice; several slices are called NAME-0, NAME-1...
        internal_ip: workers have no external address and are reached from inside the network.
        create_flags: passed to `queued-resources create` unchanged.
    """

    name: str
    zone: str
    project: str
    slice: Slice
    num_slices: int
    capacity: Capacity
    internal_ip: bool
    create_flags: list[str]

    @property
    def nodes(self) -> list[str]:
        return (
            [self.name]
            if self.num_slices == 1
            else [f"{self.name}-{i}" for i in range(self.num_slices)]
        )

    @property
    def workers(self) -> list[tuple[str, int]]:
        """(node, number within the node) of every worker; the first one coordinates."""
        return [
            (node, worker) for node in self.nodes for worker in range(self.slice.num_tpu_vm_hosts)
        ]

    @property
    def place(self) -> list[str]:
        return [f"--zone={self.zone}", *([f"--project={self.project}"] if self.project else [])]

    def create(self) -> list[str]:
        kind, detail = self.capacity.kind, self.capacity.detail
        paid = {
            "on-demand": [],
            "spot": ["--spot"],
            "reservation": ["--provisioning-model=reservation-bound", f"--reservation={detail}"]
            if detail
            else ["--reserved"],
            "flex": ["--provisioning-model=flex-start", f"--max-run-duration={detail}"],
        }[kind]
        # The released commands do not know flex and reservations by name yet.
        track = ["alpha"] if detail else []
        names = (
            [f"--node-id={self.name}"]
            if self.num_slices == 1
            else [f"--node-count={self.num_slices}", f"--node-prefix={self.name}"]
        )
        return [
            *("gcloud", *track, *QUEUED_RESOURCES, "create", self.name, *self.place),
            f"--accelerator-type={self.slice.name}",
            f"--runtime-version={self.slice.accelerator.tpu_vm_runtime}",
            *names,
            *paid,
            *(["--internal-ips"] if self.internal_ip else []),
            *self.create_flags,
            "--quiet",
        ]

    def describe(self) -> list[str]:
        return [
            *("gcloud", *QUEUED_RESOURCES, "describe", self.name, *self.place),
            "--format=value(state.state)",
        ]

    def delete(self) -> list[str]:
        return [
            *("gcloud", *QUEUED_RESOURCES, "delete", self.name, *self.place),
            *("--force", "--quiet"),
        ]

    def reach(self) -> list[str]:
        internal = ["--internal-ip"] if self.internal_ip else []
        return ["--strict-host-key-checking=no", "--quiet", *internal]

    def ssh(self, node: str, worker: int | str, script: str) -> list[str]:
        """Returns the command that runs a script on one worker, or on "all" workers of a node.

        With these flags ssh notices within two minutes that a host has vanished.
        """
        alive = ["--ssh-flag=-oServerAliveInterval=15", "--ssh-flag=-oServerAliveCountMax=8"]
        return [
            *("gcloud", *TPU_VM, "ssh", node, *self.place, f"--worker={worker}"),
            *(*self.reach(), *alive, f"--command={script}"),
        ]

    def copy(self, file: Path, node: str) -> list[str]:
        return [
            *("gcloud", *TPU_VM, "scp", str(file), f"{node}:{ARCHIVE}"),
            *(*self.place, "--worker=all", *self.reach()),
        ]


# ---- what runs on the workers, in their login shell

UNPACK = f"""
set -eu
mkdir -p "$HOME/llada_jax"
tar -xzf "$HOME/{ARCHIVE}" -C "$HOME/llada_jax"
export PIP_BREAK_SYSTEM_PACKAGES=1 # newer images mark their Python as managed by the system
python3 -m pip install --quiet --user uv
venv="$HOME/llada_jax.venv"
[ -x "$venv/bin/python" ] || python3 -m uv venv --quiet --python {PYTHON} "$venv"
"""


def installed(extras: tuple[str, ...]) -> str:
    """Returns what every worker installs, such as "llada_jax[tpu,gs]": all extras, not only those
    that are given.
    """
    return f"llada_jax[{','.join(('tpu', *HOST_EXTRAS, *extras))}]"


def is_lock_of(lock: str, extras: tuple[str, ...]) -> bool:
    """Whether the lock has the versions of all packages that these extras need."""
    return lock.startswith(f"# {installed(extras)}\n")


def lock_script(extras: tuple[str, ...], lock: str) -> str:
    """Returns the script that prints the versions of all packages, as `locked_in` reads them.

    Args:
        lock: of other extras, whose versions stay as they are; "": none.
    """
    flags = " ".join(f"--extra {extra}" for extra in ("tpu", *HOST_EXTRAS, *extras))
    return f"""
set -eu
cd "$HOME/llada_jax"
cat > "$HOME/llada_jax.lock" <<'LOCK'
{lock}LOCK
python3 -m uv pip compile --quiet --no-header --no-annotate --constraint "$HOME/llada_jax.lock" \\
  --python "$HOME/llada_jax.venv/bin/python" {flags} setup.py
"""


def locked_in(output: str, extras: tuple[str, ...]) -> str:
    """Returns the lock: the lines "NAME==VERSION" of what a worker has printed, and nothing else of
    it, below the extras of which they are; "" without such a line.
    """
    lines = "".join(
        f"{line.strip()}\n"
        for line in output.splitlines()
        if re.fullmatch(r"[A-Za-z0-9][\w.-]*==[\w.+!-]+( ; .*)?", line.strip())
    )
    return f"# {installed(extras)}\n{lines}" if lines else ""


def install_script(lock: str, extras: tuple[str, ...]) -> str:
    """Returns the script that installs the code and exactly the versions of a lock."""
    return f"""
set -eu
cat > "$HOME/llada_jax.lock" <<'LOCK'
{lock}LOCK
python3 -m uv pip install --quiet --python "$HOME/llada_jax.venv/bin/python" \\
  -r "$HOME/llada_jax.lock" -e "$HOME/{installed(extras)}"
"""


# As docs/cloud-storage-fuse/install of Google Cloud has it. A new VM may still be updating itself.
INSTALL_GCSFUSE = """
set -eu
if ! command -v gcsfuse >/dev/null; then
  key=/usr/share/keyrings/cloud.google.asc
  packages=https://packages.cloud.google.com/apt
  curl -fsSL "$packages/doc/apt-key.gpg" | sudo tee "$key" >/dev/null
  echo "deb [signed-by=$key] $packages gcsfuse-$(lsb_release -cs) main" |
    sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
  sudo apt-get -qq -o DPkg::Lock::Timeout=600 update
  sudo apt-get -qq -o DPkg::Lock::Timeout=600 install -y gcsfuse
fi
"""


def mount_script(buckets: list[Bucket]) -> str:
    """Returns the script that mounts buckets where they are not mounted yet."""
    script = INSTALL_GCSFUSE
    for bucket in buckets:
        path = shlex.quote(bucket.path)
        read_only = " -o ro" if bucket.is_read_only else ""
        script += f"""
if ! mountpoint -q {path}; then
  sudo mkdir -p {path}
  sudo chown "$(id -u)" {path}
  gcsfuse --implicit-dirs{read_only} {bucket.name} {path}
fi
"""
    return script


def set_up_script(text: str) -> str:
    """Returns the user's own script, which runs where the command will run."""
    return f"""
set -eu
cd "$HOME/llada_jax"
export PATH="$HOME/llada_jax.venv/bin:$PATH"
{text}
"""


# Ends the command of an earlier start and every process that holds the chips (/dev/accel* up to v4,
# /dev/vfio/* since v5), and removes the lock file, because the one that a killed process leaves
# behind keeps libtpu from starting.
CLEAN = """
set -u
if pid=$(cat "$HOME/llada_jax.pid" 2>/dev/null) &&
  [ "$(readlink "/proc/$pid/cwd")" = "$HOME/llada_jax" ]; then
  kill -KILL "$pid"
fi
for _ in 1 2 3 4 5; do
  holders=$(sudo lsof -t /dev/accel* /dev/vfio/* 2>/dev/null | sort -u)
  [ -n "$holders" ] || break
  echo "$holders" | xargs sudo kill -KILL
  sleep 1
done
rm -f "$HOME/llada_jax.pid"
sudo rm -f /tmp/libtpu_lockfile
"""

STOP = 'kill -TERM "$(cat "$HOME/llada_jax.pid")"'


def run_script(command: list[str], env: dict[str, str]) -> str:
    """Returns the script that starts the command on a worker.

    It ends with `exec`, so that the process in the pid file is the command itself.
    """
    # With the platform named, a worker that does not find its chips ends, and does not train on its
    # CPUs.
    exports = {
        "JAX_PLATFORMS": "tpu,cpu",
        "JAX_COORDINATOR_PORT": str(COORDINATOR_PORT),
        "PYTHONUNBUFFERED": "1",
    } | env
    lines = [f"export {name}={shlex.quote(value)}" for name, value in exports.items()]
    return "\n".join(
        [
            "set -eu",
            'cd "$HOME/llada_jax"',
            'echo $$ > "$HOME/llada_jax.pid"',
            'export PATH="$HOME/llada_jax.venv/bin:$PATH"',
            *lines,
            f'echo "{STARTED} on $(hostname)"',
            f"exec {shlex.join(command)}",
            "",
        ]
    )

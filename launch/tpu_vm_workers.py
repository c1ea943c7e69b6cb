"""How launch/tpu_vm.py gets its workers: gcloud, the queued resource, and what is installed.

This is not a launcher; launch/tpu_vm.py imports it.
"""

import re
import shlex
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path

from tpu_vm_commands import (
    UNPACK,
    Target,
    install_script,
    is_lock_of,
    lock_script,
    locked_in,
)

from llada_jax.errors import UserError

# A queued resource never leaves these states; its slices are gone.
DEAD = ("FAILED", "SUSPENDED")
TRANSIENT = re.compile(
    r"UNAVAILABLE|DEADLINE_EXCEEDED|INTERNAL|ABORTED|HTTPError 5\d\d"
    r"|[Cc]onnection (reset|refused|aborted)|timed out"
)
# How often one gcloud command is tried that fails for a reason that may pass.
MAX_TRIES = 5


class GcloudError(UserError):
    """gcloud refused. The message is gcloud's, because it names the permission, quota or flag."""


def files_of(code: Path) -> list[str]:
    """Returns the files of a checkout that git does not ignore.

    Files that were changed or added since the last commit are included.
    """
    listed = subprocess.run(
        ["git", "-C", str(code), "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode:
        raise UserError(
            f"--code {code} is not a git checkout, so there is no list of files to copy; pass the "
            "root of a checkout."
        )
    return [name for name in listed.stdout.split("\0") if name and (code / name).is_file()]


def pack(code: Path, archive: Path) -> int:
    """Writes the files of a checkout into an archive, and returns how many there are."""
    files = files_of(code)
    with tarfile.open(archive, "w:gz") as tar:
        for name in files:
            tar.add(code / name, arcname=name)
    return len(files)


class Stop:
    """Whether Ctrl-C or SIGTERM has arrived.

    A second Ctrl-C ends the launcher at once and leaves the workers running.
    """

    def __init__(self):
        self.is_requested = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._request)

    def _request(self, number, frame):
        self.is_requested = True
        signal.signal(signal.SIGINT, signal.default_int_handler)


class Stopped(Exception):
    """The launcher was asked to stop while no worker was running."""


def say(text: str) -> None:
    print(f"launch: {text}", file=sys.stderr, flush=True)


def pause(seconds: float, stop: Stop) -> None:
    """Sleeps; raises Stopped as soon as the launcher is asked to stop."""
    deadline = time.monotonic() + seconds
    while not stop.is_requested and time.monotonic() < deadline:
        time.sleep(min(0.2, seconds))
    if stop.is_requested:
        raise Stopped


def gcloud(command: list[str], *, poll: float, stop: Stop, accept: str = "") -> str:
    """Runs a gcloud command and returns its stdout; failures that may pass are tried again.

    Args:
        accept: an error that contains this word counts as success, with "" as the result.

    Raises:
        GcloudError: the command failed for another reason, or MAX_TRIES times.
    """
    for attempt in range(1, MAX_TRIES + 1):
        if stop.is_requested:
            raise Stopped
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, check=False, start_new_session=True
            )
        except FileNotFoundError as error:
            raise UserError(
                "gcloud is not installed here; install the Google Cloud CLI and log in."
            ) from error
        if done.returncode == 0:
            return done.stdout.strip()
        if accept and accept in done.stderr:
            return ""
        # ssh exits with 255 while a new worker does not know the key yet. Below 0, a signal ended
        # the command on this machine.
        may_pass = done.returncode == 255 or done.returncode < 0 or TRANSIENT.search(done.stderr)
        if attempt == MAX_TRIES or not may_pass:
            break
        failed = f"{shlex.join(command[:6])} failed, try {attempt} of {MAX_TRIES}"
        say(f"{failed}: {done.stderr.strip()[-200:]}")
        pause(poll, stop)
    raise GcloudError(
        f"{shlex.join(command)[:400]} failed ({done.returncode}): {done.stderr.strip()[-1000:]}"
    )


def state_of(target: Target, *, poll: float, stop: Stop) -> str:
    """Returns the state of the queued resource, or "" if it does not exist."""
    return gcloud(target.describe(), poll=poll, stop=stop, accept="NOT_FOUND")


def bring_up(target: Target, *, poll: float, stop: Stop) -> bool:
    """Waits until the queued resource is active; returns False if one created here has failed.

    A resource that an earlier start left FAILED or SUSPENDED is deleted and created again.
    """
    said, is_new = None, False
    while True:
        state = state_of(target, poll=poll, stop=stop)
        if state != said:
            say(f"{target.name} is {state or 'not there yet'}")
            said = state
        if state == "ACTIVE":
            return True
        if state in DEAD:
            gcloud(target.delete(), poll=poll, stop=stop, accept="NOT_FOUND")
            if is_new:
                return False
        if not state or state in DEAD:
            say(f"creating {target.name}")
            gcloud(target.create(), poll=poll, stop=stop, accept="ALREADY_EXISTS")
            is_new = True
        pause(poll, stop)


@dataclass(frozen=True, kw_only=True)
class Installation:
    """What makes every worker ready for the command.

    Attributes:
        archive: the checkout. extras: of setup.py, in addition to those that every host has.
        lock: file with the versions of all packages. The first worker of the first start resolves
            them, and whoever is installed later gets the same. With other extras the first worker
            resolves them again, and keeps the versions that are there.
        scripts: what every worker runs then, each time that it is set up.
    """

    archive: Path
    extras: tuple[str, ...]
    lock: Path
    scripts: tuple[str, ...]


def set_up(target: Target, made: Installation, *, poll: float, stop: Stop) -> None:
    """Makes every worker reachable by ssh, copies the code to it and installs it."""
    for node in target.nodes:
        say(f"{node}: copying and installing on {target.slice.num_tpu_vm_hosts} worker(s)")
        # Alone, because the first contact may have to distribute a new key.
        gcloud(target.ssh(node, 0, "true"), poll=poll, stop=stop)
        gcloud(target.copy(made.archive, node), poll=poll, stop=stop)
        gcloud(target.ssh(node, "all", UNPACK), poll=poll, stop=stop)
        lock = made.lock.read_text() if made.lock.exists() else ""
        if not is_lock_of(lock, made.extras):
            script = lock_script(made.extras, lock)
            printed = gcloud(target.ssh(node, 0, script), poll=poll, stop=stop)
            lock = locked_in(printed, made.extras)
            if not lock:
                raise GcloudError(f"{node}: the first worker names no version of any package.")
            made.lock.write_text(lock)
            say(f"{made.lock} has the versions of {lock.count('==')} packages")
        for script in (install_script(lock, made.extras), *made.scripts):
            gcloud(target.ssh(node, "all", script), poll=poll, stop=stop)

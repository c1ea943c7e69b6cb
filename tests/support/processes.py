"""Python programs in processes of their own."""

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

from support.required import absent

# Of root, who may otherwise read everything.
WITHOUT_PRIVILEGES = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]


def run_python(code: str, environment=None, timeout=120) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def is_gone(pid: int | str) -> bool:
    """Whether a process has ended, if only as a zombie that its new parent has not reaped yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z"
    except OSError:
        return True


def run_without_privileges(command: list[str]) -> subprocess.CompletedProcess:
    """Runs a command for which the permissions of files hold, also where root starts it."""
    if os.geteuid() == 0:
        if not shutil.which("setpriv"):
            absent("root reads every file without setpriv, which is part of util-linux")
        command = [*WITHOUT_PRIVILEGES, *command]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)

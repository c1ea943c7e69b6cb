"""Python programs in processes of their own."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path


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

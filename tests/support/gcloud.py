"""The commands that launch/tpu_vm.py passes to gcloud, and the real gcloud, where it is installed,
asked whether it takes them.
"""

import contextlib
import io
import json
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import tpu_vm


def refused_by_gcloud(lines: list[str], directory: Path) -> dict[str, str]:
    """Returns {command line: what is wrong with it}; nothing is run and nothing is logged into.

    A test is skipped where there is no gcloud. This is so in CI too, because there is nowhere to
    fetch it from.
    """
    if not shutil.which("gcloud"):
        pytest.skip("gcloud is not installed here")
    (directory / "commands").write_text(
        json.dumps([{"command_string": line} for line in sorted(set(lines))])
    )
    done = subprocess.run(
        ["gcloud", "meta", "lint-gcloud-commands", f"--commands-file={directory / 'commands'}"],
        capture_output=True,
        text=True,
        check=False,
        env={
            **os.environ,
            "CLOUDSDK_CONFIG": str(directory / "config"),
            "CLOUDSDK_CORE_DISABLE_PROMPTS": "1",
        },
    )
    results = json.loads(done.stdout)
    assert len(results) == len(set(lines))
    return {
        result["command_string"]: result["error_message"]
        for result in results
        if not result["success"]
    }


def dry_run(*flags: str, topology: str = "v6e-16") -> list[list[str]]:
    """Returns the commands that `launch/tpu_vm.py --dry-run` prints."""
    request = f"--name run --zone us-east5-a --topology {topology} --dry-run"
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert (
            tpu_vm.main([*request.split(), "--unchecked", *flags, "--", "llada-jax", "train"]) == 0
        )
    words = shlex.split(out.getvalue())
    begins = [i for i, word in enumerate(words) if word == "gcloud"]
    return [words[a:b] for a, b in zip(begins, [*begins[1:], len(words)])]

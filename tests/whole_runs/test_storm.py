"""A few kills of the storm that tests/support/storm.py lets loose on runs."""

import subprocess
import sys

import pytest
from support.paths import ROOT


@pytest.mark.slow
def test_a_run_of_two_processes_survives_kills_and_equals_the_undisturbed_run(tmp_path):
    """`python tests/support/storm.py --kills 1000` does more, also from mesh to mesh."""
    script = ROOT / "tests" / "support" / "storm.py"
    flags = ["--kills", "4", "--runs", "1", "--seed", "9", "--work", str(tmp_path / "storm")]
    done = subprocess.run(
        [sys.executable, str(script), *flags], capture_output=True, text=True, timeout=3000
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "{'bit for bit': 1}" in done.stdout
    assert "num_processes=2" in done.stdout
    assert done.stdout.count("SIG") >= 4

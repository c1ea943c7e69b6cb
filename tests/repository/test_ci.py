"""What .ci/newest names exists, which CI would otherwise find out after all other tests."""

import subprocess
import sys

import pytest
from support.paths import ROOT

NAMES = r"""
source <(sed -n '/^CORE=/,/^)/p' .ci/newest)
printf '%s\n' "${CORE[@]}" "${WHOLE_RUNS[@]}"
"""


@pytest.mark.slow
def test_every_test_that_runs_on_the_newest_versions_exists():
    listed = subprocess.run(
        ["bash", "-c", NAMES], cwd=ROOT, capture_output=True, text=True, check=True
    )
    names = listed.stdout.split()
    single = [name for name in names if "::" in name]
    assert len(single) == 3
    for name in names:
        assert (ROOT / name.partition("::")[0]).exists(), name
    collected = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", *single],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert collected.returncode == 0, collected.stdout

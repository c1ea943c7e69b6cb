"""`llada-jax train` asks glibc for huge pages, which it can only do by starting once more."""

import os
import subprocess
import sys

import pytest

CONFIG = """
import os
from pathlib import Path

def get_config():
    Path("seen").write_text(f"{os.getpid()} {os.environ.get('GLIBC_TUNABLES')}")
    raise ValueError("seen")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc is of Linux")
@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, "glibc.malloc.hugetlb=1"),
        ("glibc.malloc.tcache_count=9", "glibc.malloc.tcache_count=9:glibc.malloc.hugetlb=1"),
        ("glibc.malloc.hugetlb=0", "glibc.malloc.hugetlb=0"),
    ],
)
def test_training_has_huge_pages_unless_the_environment_decides(tmp_path, given, expected):
    (tmp_path / "config.py").write_text(CONFIG)
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    if given:
        environment["GLIBC_TUNABLES"] = given
    command = [sys.executable, "-m", "llada_jax", "train", "--config", "config.py"]
    with subprocess.Popen([*command, "--workdir", "run"], cwd=tmp_path, env=environment) as run:
        assert run.wait() != 0  # the config raises
    # the process that was started, so that whoever sends it signals reaches it
    assert (tmp_path / "seen").read_text() == f"{run.pid} {expected}"

"""What several test files of the launchers share: a cloud to rent TPU VMs from, and sweeps."""

import os
import signal

import pytest
from support.fake_gcloud import Cloud
from support.sweeps import call_sweep, write_config

from llada_jax.cluster.hardware import SLICES

__all__ = ["call_sweep", "cloud", "write_config"]


@pytest.fixture
def cloud(tmp_path):
    yield Cloud(tmp_path, num_workers=SLICES["v5litepod-16"].num_tpu_vm_hosts)
    # Whatever a test has left on its workers would run forever.
    for file in tmp_path.glob("workers/*/*/llada_jax.pid"):
        pid = file.read_text().strip()
        if pid and os.path.realpath(f"/proc/{pid}/cwd") == str(file.parent / "llada_jax"):
            os.kill(int(pid), signal.SIGKILL)

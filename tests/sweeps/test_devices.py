"""How the devices of a machine are divided among runs."""

import pytest

from llada_jax.errors import UserError
from llada_jax.sweeps import devices
from llada_jax.sweeps.devices import device_shares


@pytest.fixture
def machine(monkeypatch):
    """Returns machine(*device files): makes this machine one with a JAX for GPUs and TPUs."""

    def make(*files: str) -> None:
        monkeypatch.setattr(devices, "plugins", lambda: {"cuda", "tpu"})
        monkeypatch.setattr(
            devices.glob, "glob", lambda pattern: [f for f in files if f.startswith(pattern[:8])]
        )

    return make


def gpus(shares: list[dict[str, str]]) -> list[str]:
    return [share["CUDA_VISIBLE_DEVICES"] for share in shares]


def test_runs_at_a_time_share_the_gpus_evenly(machine):
    machine("/dev/nvidia10", "/dev/nvidia2", "/dev/nvidia0", "/dev/nvidiactl", "/dev/nvidia1")
    assert gpus(device_shares(2, {})) == ["0,1", "2,10"]
    assert gpus(device_shares(3, {})) == ["0", "1", "2"]  # and one stays idle
    assert gpus(device_shares(2, {"CUDA_VISIBLE_DEVICES": "GPU-a, GPU-b"})) == ["GPU-a", "GPU-b"]


def test_one_run_at_a_time_and_runs_on_cpus_have_all_devices(machine):
    machine("/dev/nvidia0", "/dev/nvidia1")
    assert device_shares(1, {"CUDA_VISIBLE_DEVICES": "3"}) == [{}]
    assert device_shares(3, {"JAX_PLATFORMS": "cpu"}) == [{}, {}, {}]
    machine()
    assert device_shares(2, {}) == [{}, {}]


def test_a_machine_with_gpus_and_a_jax_without_is_one_of_cpus(machine, monkeypatch):
    machine("/dev/nvidia0")
    monkeypatch.setattr(devices, "plugins", set)
    assert device_shares(2, {}) == [{}, {}]


def test_more_runs_than_gpus_and_chips_of_a_tpu_are_refused(machine):
    machine("/dev/nvidia0", "/dev/nvidia1")
    with pytest.raises(UserError, match="--parallel 3 is more than the 2 GPUs"):
        device_shares(3, {})
    machine("/dev/accel0", "/dev/accel1")
    with pytest.raises(UserError, match="for one process at a time"):
        device_shares(2, {})

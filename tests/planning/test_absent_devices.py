"""Devices that are not there."""

import importlib.metadata

import pytest

from llada_jax.cluster import hardware
from llada_jax.errors import UserError
from llada_jax.planning.absent_devices import load_compiler, stand_in_mesh


def test_a_stand_in_mesh_has_the_devices_of_all_slices_and_their_platform():
    sizes = {"data": 2, "fsdp": -1, "tensor": 2}
    mesh = stand_in_mesh(sizes, hardware.machines_named("v5e-16"), 2)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 8, "sequence": 1, "tensor": 2, "expert": 1}
    assert {device.platform for device in mesh.devices.flat} == {"tpu"}
    assert len({device.id for device in mesh.devices.flat}) == 32


def test_a_missing_libtpu_is_answered_by_the_line_that_installs_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"needs libtpu, which is not installed: pip install 'llada_jax\[tpu\]'"
    ):
        load_compiler(hardware.machines_named("v5p-128"), {})


def test_a_missing_compiler_for_gpus_is_answered_by_the_line_that_installs_it(monkeypatch):
    def version(package):
        if package == "nvidia-cudnn-cu13":
            raise importlib.metadata.PackageNotFoundError(package)
        return "0"

    monkeypatch.setattr("importlib.metadata.version", version)
    sentence = (
        r"needs nvidia-cudnn-cu13, which is not installed: pip install 'llada_jax\[plan-gpu\]'"
    )
    with pytest.raises(UserError, match=sentence):
        load_compiler(hardware.machines_named("8xh100"), {})

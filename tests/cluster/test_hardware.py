"""The hardware table against figures known elsewhere: JAX's own table, and the published slices."""

import subprocess
import sys
from types import SimpleNamespace

import pytest

from llada_jax.cluster import hardware
from llada_jax.errors import UserError


def device(kind):
    return SimpleNamespace(device_kind=kind)


@pytest.mark.parametrize(
    ("kind", "tflops"),
    [
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5", 459),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
        ("TPU7x", 2307 / 2),  # two devices per chip
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H200", 989),
        ("NVIDIA B200", 2250),
    ],
)
def test_peak_of_a_device_is_the_published_dense_bf16_figure(kind, tflops):
    assert hardware.peak_flops(device(kind)) == pytest.approx(tflops * 1e12)


@pytest.mark.parametrize(
    "kind",
    [
        "cpu",
        "TPU v99",
        "TPU",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA H200 NVL",
        "NVIDIA H100",
        "",
    ],
)
def test_unknown_hardware_has_no_peak(kind):
    assert hardware.peak_flops(device(kind)) is None


def test_every_accelerator_is_found_by_its_own_device_kind_alone():
    kinds = {kind: chip for chip in hardware.ACCELERATORS.values() for kind in chip.device_kinds}
    assert len(kinds) >= 15
    for kind, chip in kinds.items():
        assert hardware.accelerator_of(device(kind)) is chip


def test_tpu_figures_agree_with_the_table_inside_jax():
    """jax._src is private, so this is skipped when it moves; our table does not need it."""
    tpu_info = pytest.importorskip("jax._src.pallas.mosaic.tpu_info")
    names = {
        "v4": "TPU_V4",
        "v5e": "TPU_V5E",
        "v5p": "TPU_V5P",
        "v6e": "TPU_V6E",
        "tpu7x": "TPU_7X",
    }
    theirs = {name: tpu_info.ChipVersion[version] for name, version in names.items()}
    for name, chip_version in theirs.items():
        cores_per_chip = 1 if name in ("v5e", "v6e") else 2
        core = tpu_info.get_tpu_info_for_chip(chip_version, 1)
        ours = hardware.ACCELERATORS[name]
        assert ours.peak_flops == pytest.approx(
            core.bf16_ops_per_second * cores_per_chip, rel=0.01
        ), name
        assert ours.hbm_bytes == pytest.approx(
            core.hbm_capacity_bytes * cores_per_chip, rel=0.02
        ), name
        # the two tables differ by a tenth on v5p: 2.77 (Google's page) against 2.46 TB/s
        assert ours.hbm_bandwidth == pytest.approx(
            core.mem_bw_bytes_per_second * cores_per_chip, rel=0.13
        ), name


@pytest.mark.parametrize(
    ("name", "chips", "hosts", "devices", "topology", "accelerator"),
    [
        ("v4-8", 4, 1, 4, "2x2x1", "tpu-v4-podslice"),
        ("v4-128", 64, 16, 64, "4x4x4", "tpu-v4-podslice"),
        ("v5litepod-8", 8, 2, 8, "2x4", "tpu-v5-lite-podslice"),
        ("v5litepod-256", 256, 64, 256, "16x16", "tpu-v5-lite-podslice"),
        ("v5p-8", 4, 1, 4, "2x2x1", "tpu-v5p-slice"),
        ("v5p-64", 32, 8, 32, "2x4x4", "tpu-v5p-slice"),
        ("v5p-128", 64, 16, 64, "4x4x4", "tpu-v5p-slice"),
        ("v5p-1024", 512, 128, 512, "8x8x8", "tpu-v5p-slice"),
        ("v5p-12288", 6144, 1536, 6144, "16x16x24", "tpu-v5p-slice"),
        ("v6e-1", 1, 1, 1, "1x1", "tpu-v6e-slice"),
        ("v6e-4", 4, 1, 4, "2x2", "tpu-v6e-slice"),
        ("v6e-256", 256, 64, 256, "16x16", "tpu-v6e-slice"),
        ("tpu7x-128", 64, 16, 128, "4x4x4", "tpu7x"),
        ("tpu7x-512", 256, 64, 512, "4x8x8", "tpu7x"),
    ],
)
def test_slices_have_the_published_shape(name, chips, hosts, devices, topology, accelerator):
    found = hardware.slice_named(name)
    assert (found.num_chips, found.num_hosts, found.num_devices) == (chips, hosts, devices)
    assert (found.topology_name, found.accelerator.gke_accelerator) == (topology, accelerator)


def test_every_slice_is_a_whole_number_of_hosts():
    assert len(hardware.SLICES) > 40
    for found in hardware.SLICES.values():
        assert found.num_hosts * found.chips_per_host == found.num_chips
        assert found.accelerator.platform == "tpu"


@pytest.mark.parametrize(
    ("name", "hosts"),
    [
        ("v5litepod-8", 1),  # one TPU VM with 8 chips, but two GKE nodes
        ("v6e-8", 1),
        ("v6e-1", 1),
        ("v6e-16", 4),
        ("v5p-8", 1),
        ("v5p-16", 2),
        ("tpu7x-8", 0),  # not offered as TPU VMs
    ],
)
def test_tpu_vms_are_counted_apart_from_gke_nodes(name, hosts):
    assert hardware.slice_named(name).num_tpu_vm_hosts == hosts


def test_arguments_for_compiling_ahead_of_time():
    assert hardware.slice_named("v5p-128").aot_arguments == {
        "platform": "tpu",
        "topology_name": "v5:4x4x4",
    }
    assert hardware.slice_named("v5e-16").aot_arguments == {
        "platform": "tpu",
        "topology_name": "v5e:4x4",
    }
    assert hardware.slice_named("v6e-1").aot_arguments["chips_per_host_bounds"] == (1, 1, 1)
    assert hardware.slice_named("tpu7x-16").aot_arguments == {
        "platform": "tpu",
        "topology_name": "tpu7x:2x2x2",
        "chip_config_name": "default",
        "chips_per_host_bounds": (2, 2, 1),
    }


def test_v5e_is_read_as_v5litepod():
    assert hardware.slice_named("v5e-16") is hardware.slice_named("v5litepod-16")


def test_an_unknown_slice_names_what_there_is():
    with pytest.raises(
        UserError, match=r"no slice 'v5p-127': choose one of v5p-8, v5p-16, .*v5p-128"
    ):
        hardware.slice_named("v5p-127")
    with pytest.raises(UserError, match=r"no slice 'v5litepod-3': choose one of v5litepod-1, "):
        hardware.slice_named("v5e-3")
    with pytest.raises(UserError, match="Unknown slice 'v6-256'. Did you mean 'v6e-256'"):
        hardware.slice_named("v6-256")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("h100", "'h100': GPUs are written with their number, as in 8xh100."),
        ("8h100", "as in 8xh100."),
        ("h100x8", "as in 8xh100."),
        ("8xH100", "as in 8xh100."),
        ("A100", "as in 8xa100-40gb or 8xa100-80gb."),
        ("gb200", "as in 4xgb200."),
        ("cpu", "TPU slices are called v4-N, v5litepod-N, v5p-N, v6e-N, tpu7x-N, and GPUs NxNAME"),
    ],
)
def test_a_name_of_no_machines_is_answered_with_the_form_of_such_names(name, says):
    for named in (hardware.machines_named, hardware.slice_named):
        with pytest.raises(UserError) as refused:
            named(name)
        assert says in str(refused.value)


def test_usable_memory_is_positive_and_at_most_what_the_chip_holds():
    for chip in hardware.ACCELERATORS.values():
        assert 0.85 * chip.hbm_bytes < chip.usable_hbm_bytes <= 1.01 * chip.hbm_bytes, chip.name


# Copied from the sources and not from the table. TPUs: cloud.google.com/tpu/docs, the pages v4,
# v5e, v5p, v6e and tpu7x (GB/s of "interchip interconnect bandwidth", both directions together),
# and the DCN of a pod divided by its chips, or of a host of 4 chips (v4:
# jax-ml.github.io/scaling-book).
# Usable memory in GiB: what libtpu 0.0.42 prints as "exceeds available HBM" per device.
TPUS = {
    "v4": (600, 25 / 4, 30.75),
    "v5e": (400, 6400 / 8 / 256, 15.75),
    "v5p": (1200, 50 / 8, 95.74),
    "v6e": (800, 25600 / 8 / 256, 31.25),
    "tpu7x": (1200, 100 / 8, 2 * 94.75),
}
# NVIDIA's data sheets: TB/s of memory, GB/s of NVLink, or of PCIe 4.0 and 5.0 x16 where there is no
# NVLink (64 and 128).
GPUS = {
    "a100-40gb": (1.555, 600),
    "a100-80gb": (2.039, 600),
    "h100-pcie": (2.0, 128),
    "h100": (3.35, 900),
    "gh200": (4.0, 900),
    "h200": (4.8, 900),
    "b200": (8.0, 1800),
    "gb200": (8.0, 1800),
    "l40s": (0.864, 64),
    "l4": (0.3, 64),
}


def test_links_and_usable_memory_of_tpus_are_those_of_their_sources():
    found = {
        chip.name: (chip.link_bandwidth / 1e9, chip.dcn_bandwidth / 1e9, chip.usable_hbm_bytes)
        for chip in hardware.ACCELERATORS.values()
        if chip.platform == "tpu"
    }
    assert found == {
        name: (link, dcn, int(usable * 2**30)) for name, (link, dcn, usable) in TPUS.items()
    }


def test_links_and_memory_bandwidth_of_gpus_are_those_of_their_data_sheets():
    for chip in hardware.ACCELERATORS.values():
        if chip.platform == "gpu":
            memory, link = GPUS[chip.name]
            assert chip.hbm_bandwidth == pytest.approx(memory * 1e12, rel=5e-3), chip.name
            assert chip.link_bandwidth == link * 1e9, chip.name
            # the share that XLA_PYTHON_CLIENT_MEM_FRACTION=0.9 leaves to a program
            assert chip.usable_hbm_bytes == int(0.9 * chip.hbm_bytes), chip.name
            assert chip.dcn_bandwidth == 0, chip.name  # that depends on the cluster


def test_the_table_imports_without_jax():
    code = "import sys, llada_jax.cluster.hardware; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_gpus_are_named_by_their_number():
    found = hardware.machines_named("64xh100")
    assert (found.accelerator.name, found.num_chips, found.num_hosts, found.chips_per_host) == (
        "h100",
        64,
        8,
        8,
    )
    assert hardware.machines_named("4xgh200").num_hosts == 4
    assert hardware.machines_named("2xa100-80gb").num_hosts == 1
    assert hardware.machines_named("v5p-128") is hardware.slice_named("v5p-128")
    with pytest.raises(
        UserError,
        match="12xh100 is not a whole number of hosts: each host has 8 h100; choose a multiple",
    ):
        hardware.machines_named("12xh100")
    with pytest.raises(UserError, match="Unknown GPU 'v5p'"):
        hardware.machines_named("8xv5p")

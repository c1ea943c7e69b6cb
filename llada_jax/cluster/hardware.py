"""Accelerators: what each chip can do, how many are in a host, and what the slices are called.

One table answers everything that asks about hardware: the log of a run (model FLOP utilisation),
planning (memory, time, compiling for an absent slice) and the launchers (topologies, hosts). Peaks
are dense bfloat16 without sparsity. A figure that is not known is absent and never guessed:
`peak_flops` returns None, and no utilisation is reported.
"""

import difflib
import math
import re
from dataclasses import dataclass

from llada_jax.errors import UserError, look_up

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Accelerator:
    """One kind of chip. All figures are per chip; a JAX device is `1 / devices_per_chip` of it.

    Attributes:
        name: what users call it: "v5p", "h100".
        device_kinds: every `jax.Device.device_kind` that it reports, exactly.
        peak_flops: dense bfloat16 FLOP/s.
        hbm_bytes: memory as sold. usable_hbm_bytes: what a program may fill.
        hbm_bandwidth: byte/s. link_bandwidth: byte/s over all ICI or NVLink links, both directions
            together.
        dcn_bandwidth: byte/s over the data centre network (0 where it depends on the cluster).
        devices_per_chip: JAX devices.
        chips_per_host: chips of one virtual machine of a multi-host slice, or GPUs of one node.
        gke_accelerator: value of the node label gke-tpu-accelerator or gke-accelerator ("" if not
            offered on GKE).
        tpu_vm_runtime: software version for TPU VMs and queued resources ("" where there are none).
        chips_per_tpu_vm: chips of the largest single TPU VM (0 where there are none).
        aot_name: the first half of the topology name that JAX compiles for, ahead of time
            ("v5:4x4x4"); "" for GPUs.
        aot_chip_config: libtpu's name of the chip mode that real slices run in ("" for its own
            default).
    """

    name: str
    device_kinds: tuple[str, ...]
    peak_flops: float
    hbm_bytes: int
    usable_hbm_bytes: int
    hbm_bandwidth: float
    link_bandwidth: float
    dcn_bandwidth: float = 0.0
    devices_per_chip: int = 1
    chips_per_host: int
    gke_accelerator: str
    tpu_vm_runtime: str = ""
    chips_per_tpu_vm: int = 0
    aot_name: str = ""
    aot_chip_config: str = ""

    @property
    def platform(self) -> str:
        return "tpu" if self.aot_name else "gpu"

    @property
    def peak_flops_per_device(self) -> float:
        return self.peak_flops / self.devices_per_chip

    @property
    def usable_bytes_per_device(self) -> int:
        return self.usable_hbm_bytes // self.devices_per_chip


@dataclass(frozen=True, kw_only=True)
class Slice:
    """Chips joined by ICI, as ordered under one name such as "v5p-128"; or a number of GPUs.

    Attributes:
        topology: chips along each axis of the mesh or torus, e.g. (4, 4, 4). GPUs: (their number,).
    """

    name: str
    accelerator: Accelerator
    topology: tuple[int, ...]

    @property
    def topology_name(self) -> str:
        """As GKE writes it: "4x4x4"."""
        return "x".join(str(size) for size in self.topology)

    @property
    def num_chips(self) -> int:
        return math.prod(self.topology)

    @property
    def num_devices(self) -> int:
        return self.num_chips * self.accelerator.devices_per_chip

    @property
    def chips_per_host(self) -> int:
        """Chips of one GKE virtual machine."""
        return min(self.num_chips, self.accelerator.chips_per_host)

    @property
    def num_hosts(self) -> int:
        """GKE virtual machines, or GPU nodes. libtpu groups absent devices into processes alike."""
        return self.num_chips // self.chips_per_host

    @property
    def num_tpu_vm_hosts(self) -> int:
        """TPU VM workers (0: the chip is offered on GKE only).

        NOTE: v5litepod-8 and v6e-8 are one TPU VM with 8 chips, but two GKE nodes with 4 each.
        """
        if not self.accelerator.tpu_vm_runtime:
            return 0
        return 1 if self.num_chips <= self.accelerator.chips_per_tpu_vm else self.num_hosts

    @property
    def aot_arguments(self) -> dict:
        """Keyword arguments of `jax.experimental.topologies.get_topology_desc` for this slice.

        libtpu assumes 2 x 2 chips per host and its own chip mode; whatever differs is stated.
        """
        bounds = {1: (1, 1, 1), 4: (2, 2, 1)}[self.chips_per_host]
        arguments: dict[str, object] = {
            "topology_name": f"{self.accelerator.aot_name}:{self.topology_name}"
        }
        if self.accelerator.aot_chip_config:
            arguments |= {
                "chip_config_name": self.accelerator.aot_chip_config,
                "chips_per_host_bounds": bounds,
            }
        elif bounds != (2, 2, 1):
            arguments |= {"chips_per_host_bounds": bounds}
        return {"platform": "tpu", **arguments}


# TPUs. Peaks, memory and ICI are from the Cloud TPU pages, where they state them. Usable memory:
# what the compiler of libtpu 0.0.42 states when a program does not fit. DCN: the same pages (v5e
# 6.4 Tbit/s and v6e 25.6 Tbit/s a pod of 256 chips, v5p 50 and TPU7x 100 Gbit/s a chip); v4 from 25
# GB/s per host of 4 chips (the "How to Scale Your Model" book).
_TPUS = (
    Accelerator(
        name="v4",
        device_kinds=("TPU v4",),
        peak_flops=275e12,
        hbm_bytes=32 * GIB,
        usable_hbm_bytes=int(30.75 * GIB),
        hbm_bandwidth=1.2e12,
        link_bandwidth=600e9,
        dcn_bandwidth=6.25e9,
        chips_per_host=4,
        gke_accelerator="tpu-v4-podslice",
        chips_per_tpu_vm=4,
        tpu_vm_runtime="tpu-ubuntu2204-base",
        aot_name="v4",
        # In this mode both TensorCores act as one JAX device; libtpu's own default is two.
        aot_chip_config="megacore",
    ),
    Accelerator(
        name="v5e",
        device_kinds=("TPU v5 lite", "TPU v5e"),
        peak_flops=197e12,
        hbm_bytes=16 * GIB,
        usable_hbm_bytes=int(15.75 * GIB),
        hbm_bandwidth=0.81e12,
        link_bandwidth=400e9,
        dcn_bandwidth=3.125e9,
        chips_per_host=4,
        gke_accelerator="tpu-v5-lite-podslice",
        chips_per_tpu_vm=8,
        tpu_vm_runtime="v2-alpha-tpuv5-lite",
        aot_name="v5e",
    ),
    Accelerator(
        name="v5p",
        device_kinds=("TPU v5", "TPU v5p"),
        peak_flops=459e12,
        hbm_bytes=95 * GIB,
        # The compiler states more than the 95 GiB that are sold.
        usable_hbm_bytes=int(95.74 * GIB),
        hbm_bandwidth=2.77e12,
        link_bandwidth=1200e9,
        dcn_bandwidth=6.25e9,
        chips_per_host=4,
        gke_accelerator="tpu-v5p-slice",
        chips_per_tpu_vm=4,
        tpu_vm_runtime="v2-alpha-tpuv5",
        aot_name="v5",
    ),
    Accelerator(
        name="v6e",
        device_kinds=("TPU v6 lite", "TPU v6e"),
        peak_flops=918e12,
        hbm_bytes=32 * GIB,
        usable_hbm_bytes=int(31.25 * GIB),
        hbm_bandwidth=1.64e12,
        link_bandwidth=800e9,
        dcn_bandwidth=12.5e9,
        chips_per_host=4,
        gke_accelerator="tpu-v6e-slice",
        chips_per_tpu_vm=8,
        tpu_vm_runtime="v2-alpha-tpuv6e",
        aot_name="v6e",
    ),
    Accelerator(
        name="tpu7x",
        device_kinds=("TPU7x",),
        peak_flops=2307e12,
        hbm_bytes=192 * GIB,
        usable_hbm_bytes=int(2 * 94.75 * GIB),
        hbm_bandwidth=7.38e12,
        link_bandwidth=1200e9,
        dcn_bandwidth=12.5e9,
        devices_per_chip=2,
        chips_per_host=4,
        gke_accelerator="tpu7x",
        # GKE only: no tpu_vm_runtime
        aot_name="tpu7x",
        aot_chip_config="default",
    ),
)


def _gpu(name, device_kinds, tflops, hbm_gib, hbm_tb_per_s, nvlink_gb_per_s, *, per_host=8, gke=""):
    """Returns a GPU's row. 90% of its memory is usable: the presets of compiler flags set
    XLA_PYTHON_CLIENT_MEM_FRACTION=0.9, where JAX's own default is 75%.
    """
    return Accelerator(
        name=name,
        device_kinds=device_kinds,
        peak_flops=tflops * 1e12,
        hbm_bytes=hbm_gib * GIB,
        usable_hbm_bytes=int(0.9 * hbm_gib * GIB),
        hbm_bandwidth=hbm_tb_per_s * 1e12,
        link_bandwidth=nvlink_gb_per_s * 1e9,
        chips_per_host=per_host,
        gke_accelerator=gke,
    )


# GPUs: NVIDIA's data sheets, half of the "with sparsity" figure where only that is printed. The
# kinds match exactly, so that a MIG slice, a PCIe or an NVL card is not taken for the SXM module of
# the same name.
# Columns: name, device kinds, TFLOP/s, GiB, TB/s, GB/s of NVLink (of PCIe where there is none).
_GPUS = (
    _gpu("a100-40gb", ("NVIDIA A100-SXM4-40GB",), 312, 40, 1.56, 600, gke="nvidia-tesla-a100"),
    _gpu("a100-80gb", ("NVIDIA A100-SXM4-80GB",), 312, 80, 2.04, 600, gke="nvidia-a100-80gb"),
    _gpu("h100-pcie", ("NVIDIA H100 PCIe",), 756, 80, 2.0, 128),
    _gpu("h100", ("NVIDIA H100 80GB HBM3",), 989, 80, 3.35, 900, gke="nvidia-h100-mega-80gb"),
    _gpu("gh200", ("NVIDIA GH200 120GB", "NVIDIA GH200 480GB"), 989, 96, 4.0, 900, per_host=1),
    _gpu("h200", ("NVIDIA H200",), 989, 141, 4.8, 900, gke="nvidia-h200-141gb"),
    _gpu("b200", ("NVIDIA B200",), 2250, 180, 8.0, 1800, gke="nvidia-b200"),
    _gpu("gb200", ("NVIDIA GB200",), 2500, 186, 8.0, 1800, per_host=4, gke="nvidia-gb200"),
    _gpu("l40s", ("NVIDIA L40S",), 362, 48, 0.864, 64),
    _gpu("l4", ("NVIDIA L4",), 121, 24, 0.3, 64, gke="nvidia-l4"),
)

ACCELERATORS = {chip.name: chip for chip in _TPUS + _GPUS}

# Topologies that can be ordered. The number in a slice's name counts TensorCores on v4 and v5p and
# JAX devices on TPU7x (2 per chip each), and chips on v5e and v6e.
_TORUS_2D = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_TORUS_3D = (
    *((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), (4, 4, 4)),
    *((4, 4, 8), (4, 8, 8), (8, 8, 8), (8, 8, 16), (8, 16, 16)),
)
# (prefix of the user's name, accelerator, what the number counts of each chip, topologies)
_SLICE_SERIES = (
    ("v4", "v4", 2, _TORUS_3D),
    ("v5litepod", "v5e", 1, _TORUS_2D),
    ("v5p", "v5p", 2, (*_TORUS_3D, (16, 16, 16), (16, 16, 24))),
    ("v6e", "v6e", 1, _TORUS_2D),
    ("tpu7x", "tpu7x", 2, _TORUS_3D),
)
SLICES = {
    name: Slice(name=name, accelerator=ACCELERATORS[chip], topology=topology)
    for prefix, chip, count, topologies in _SLICE_SERIES
    for topology in topologies
    for name in [f"{prefix}-{math.prod(topology) * count}"]
}


def slice_named(name: str) -> Slice:
    """Returns the slice that is ordered under a name such as "v5p-128".

    "v5e-16" is read as "v5litepod-16", which is what the cloud calls it.

    Raises:
        UserError: lists the sizes of the series, or how slices and GPUs are named when the series
            is unknown too.
    """
    name = re.sub(r"^v5e-", "v5litepod-", name)
    series = [known for known in SLICES if known.split("-")[0] == name.split("-")[0]]
    if series and name not in SLICES:
        raise UserError(f"There is no slice {name!r}: choose one of {', '.join(series)}.")
    if name not in SLICES:
        close = difflib.get_close_matches(name, SLICES, n=1, cutoff=0.6)
        remedy = f". Did you mean {close[0]!r}?" if close else f": {_how_machines_are_named(name)}."
        raise UserError(f"Unknown slice {name!r}{remedy}")
    return SLICES[name]


def machines_named(name: str) -> Slice:
    """Returns a TPU slice by its name ("v5p-128"), or GPUs by their number ("64xh100": 8 hosts of
    8).

    Raises:
        UserError: there are no such machines; lists what exists.
    """
    gpus = re.fullmatch(r"([0-9]{1,18})x([a-z].*)", name)
    if not gpus:
        return slice_named(name)
    table = {chip.name: chip for chip in _GPUS}
    number, chip = int(gpus.group(1)), look_up(table, gpus.group(2), "GPU")
    if number < 1 or (number > chip.chips_per_host and number % chip.chips_per_host):
        raise UserError(
            f"{name} is not a whole number of hosts: each host has {chip.chips_per_host} "
            f"{chip.name}; choose a multiple of {chip.chips_per_host}."
        )
    return Slice(name=name, accelerator=chip, topology=(number,))


def check_slices(machines: Slice, num_slices: int) -> None:
    """Raises UserError for several slices of GPUs, whose number says how many hosts there are."""
    chip = machines.accelerator
    if num_slices > 1 and chip.platform == "gpu":
        together = num_slices * machines.num_hosts * chip.chips_per_host
        raise UserError(
            f"--slices {num_slices}: {machines.name} comes in hosts, not in slices; leave it out "
            f"and write {together}x{chip.name}."
        )


def _how_machines_are_named(name: str) -> str:
    """Returns how to write what a user may have meant by a name that is not known."""
    bare = re.sub(r"^\d+x?|x\d+$", "", name.lower())
    alike = [chip for chip in _GPUS if chip.name == bare]
    alike = alike or [chip for chip in _GPUS if bare and chip.name.startswith(bare)]
    if alike:
        forms = " or ".join(f"{chip.chips_per_host}x{chip.name}" for chip in alike)
        return f"GPUs are written with their number, as in {forms}"
    series = ", ".join(f"{prefix}-N" for prefix, *_ in _SLICE_SERIES)
    gpus = ", ".join(chip.name for chip in _GPUS)
    return f"TPU slices are called {series}, and GPUs NxNAME, as in 8xh100 ({gpus})"


def accelerator_of(device) -> Accelerator | None:
    """Returns the row for a `jax.Device`, or None for hardware that is not in the table (a CPU)."""
    for chip in ACCELERATORS.values():
        if device.device_kind in chip.device_kinds:
            return chip
    return None


def peak_flops(device) -> float | None:
    """Returns the dense bfloat16 FLOP/s of one JAX device, None if it is not in the table."""
    chip = accelerator_of(device)
    return chip.peak_flops_per_device if chip else None

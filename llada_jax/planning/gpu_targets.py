"""What XLA has to know of a GPU to compile for it where there is none.

`target_config` writes stream_executor's GpuTargetConfigProto in text form. XLA reads from it which
instructions there are, how much shared memory a block may take, and for how much memory it
schedules. Memory and bandwidth are those of llada_jax.cluster.hardware.

Sources: the limits of a compute capability are those of the CUDA C++ Programming Guide (table
"Technical Specifications per Compute Capability"); multiprocessors, L2 and clocks are those of
NVIDIA's architecture papers and data sheets (A100, H100, Ada, Blackwell), and of the device queries
that openxla/xla keeps under xla/backends/gpu/target_config/specs.
"""

from typing import NamedTuple

from llada_jax.cluster.hardware import Accelerator
from llada_jax.errors import UserError

_KIB, _MIB = 2**10, 2**20


class Capability(NamedTuple):
    """The limits of a compute capability, in bytes, threads and FP32 units per multiprocessor."""

    major: int
    minor: int
    shared_memory: int
    shared_memory_per_block: int
    threads: int
    fp32_units: int


class Card(NamedTuple):
    """A kind of GPU: multiprocessors, bytes of L2, and the highest clock in GHz."""

    capability: Capability
    multiprocessors: int
    l2_bytes: int
    clock: float


_AMPERE = Capability(8, 0, 164 * _KIB, 163 * _KIB, 2048, 64)
_ADA = Capability(8, 9, 100 * _KIB, 99 * _KIB, 1536, 128)
_HOPPER = Capability(9, 0, 228 * _KIB, 227 * _KIB, 2048, 128)
_BLACKWELL = Capability(10, 0, 228 * _KIB, 227 * _KIB, 2048, 128)

# {name of the accelerator: its card}
CARDS = {
    "a100-40gb": Card(_AMPERE, 108, 40 * _MIB, 1.41),
    "a100-80gb": Card(_AMPERE, 108, 40 * _MIB, 1.41),
    "h100-pcie": Card(_HOPPER, 114, 50 * _MIB, 1.755),
    "h100": Card(_HOPPER, 132, 50 * _MIB, 1.98),
    "gh200": Card(_HOPPER, 132, 50 * _MIB, 1.98),
    "h200": Card(_HOPPER, 132, 50 * _MIB, 1.98),
    "b200": Card(_BLACKWELL, 148, 126 * _MIB, 1.965),
    "gb200": Card(_BLACKWELL, 152, 126 * _MIB, 2.062),
    "l40s": Card(_ADA, 142, 96 * _MIB, 2.52),
    "l4": Card(_ADA, 58, 48 * _MIB, 2.04),
}

# The oldest that jax 0.10.2 takes. XLA only asks whether they are new enough for a feature.
_CUDA, _CUDNN = (13, 0), (9, 12)


def target_config(chip: Accelerator) -> str:
    """Returns the GpuTargetConfigProto of a GPU, as text.

    Raises:
        UserError: nothing is known of the card beyond what `plan` needs without --compile.
    """
    if chip.name not in CARDS:
        raise UserError(
            f"--compile does not support {chip.name}: choose one of {', '.join(CARDS)}, or "
            "leave out --compile."
        )
    card = CARDS[chip.name]
    limits = card.capability
    return f"""
gpu_device_info {{
  cuda_compute_capability {{ major: {limits.major} minor: {limits.minor} }}
  core_count: {card.multiprocessors}
  fpus_per_core: {limits.fp32_units}
  clock_rate_ghz: {card.clock}
  l2_cache_size: {card.l2_bytes}
  device_memory_size: {chip.hbm_bytes}
  memory_bandwidth: {int(chip.hbm_bandwidth)}
  shared_memory_per_core: {limits.shared_memory}
  shared_memory_per_block: {48 * _KIB}
  shared_memory_per_block_optin: {limits.shared_memory_per_block}
  threads_per_core_limit: {limits.threads}
  threads_per_block_limit: 1024
  threads_per_warp: 32
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  block_dim_limit_x: {2**31 - 1}
  block_dim_limit_y: {2**16 - 1}
  block_dim_limit_z: {2**16 - 1}
  registers_per_core_limit: {2**16}
  registers_per_block_limit: {2**16}
}}
platform_name: "CUDA"
runtime_version {{ major: {_CUDA[0]} minor: {_CUDA[1]} }}
dnn_version_info {{ major: {_CUDNN[0]} minor: {_CUDNN[1]} }}
device_description_str: "{chip.device_kinds[0]}"
"""

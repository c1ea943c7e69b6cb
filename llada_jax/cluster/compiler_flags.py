"""Named presets of compiler flags for TPUs and GPUs.

They hold what published recipes set beyond the compilers' defaults: MaxText's for v5p and Trillium,
and NVIDIA's JAX-Toolbox for GPUs. A preset is kept where it changes the compiled program, which
docs/log.md shows, and `llada-jax plan --compile --flags` without a chip; whether it makes a run
faster has to be measured. A compiler ends the process at a flag that it does not know, so
tests/cluster/test_compiler_flags.py gives all of them to the installed compilers.
"""

from llada_jax.errors import UserError, look_up

# Gathers and scatters on the SparseCores, as native collectives next to the products, where the
# compiler would otherwise stop the TensorCores for an all-reduce of the whole array.
_SPARSE_CORES = (
    "--xla_enable_async_all_gather=true --xla_tpu_prefer_async_allgather_to_allreduce=true "
    "--xla_tpu_enable_async_collective_fusion_fuse_all_gather=false "
    "--xla_tpu_enable_sparse_core_collective_offload_all_gather=true "
    "--xla_tpu_enable_sparse_core_collective_offload_2d_all_gather=true "
    "--xla_tpu_enable_sparse_core_collective_offload_3d_all_gather=true "
    "--xla_tpu_enable_sparse_core_collective_offload_reduce_scatter=true "
    "--xla_tpu_enable_sparse_core_collective_offload_nd_reduce_scatter=true "
    "--xla_tpu_enable_sparse_core_reduce_scatter_v2=true "
    "--xla_tpu_use_tc_device_shape_on_sc=true --xla_sc_disable_megacore_partitioning=true"
)
_GPU = (
    "--xla_gpu_enable_latency_hiding_scheduler=true --xla_gpu_enable_command_buffer= "
    "--xla_gpu_all_reduce_combine_threshold_bytes=1073741824 "
    "--xla_gpu_all_gather_combine_threshold_bytes=1073741824 "
    "--xla_gpu_reduce_scatter_combine_threshold_bytes=134217728 "
    "--xla_gpu_enable_pipelined_all_gather=true "
    "--xla_gpu_enable_pipelined_reduce_scatter=true --xla_gpu_enable_pipelined_all_reduce=true "
    "--xla_gpu_enable_while_loop_double_buffering=true "
    "--xla_gpu_enable_all_gather_combine_by_dim=false "
    "--xla_gpu_enable_reduce_scatter_combine_by_dim=false"
)
# {name of a preset: environment variables}. The compilers read them when JAX starts its backend, so
# a launcher sets them before `llada-jax` starts; a knob of the config would come too late.
FLAGS = {
    "v5p": {"LIBTPU_INIT_ARGS": _SPARSE_CORES},
    "v6e": {"LIBTPU_INIT_ARGS": f"{_SPARSE_CORES} --xla_tpu_scoped_vmem_limit_kib=98304"},
    "tpu7x": {"LIBTPU_INIT_ARGS": _SPARSE_CORES},
    # Finds silent data corruption: everything is computed five more times and compared, so use it
    # for a few steps only.
    "sdc-check": {
        "LIBTPU_INIT_ARGS": (
            "--xla_tpu_enable_sdc_checker=true --xla_tpu_sdc_check_halt_on_detection=true "
            "--xla_tpu_sdc_replicate_llo=true --xla_tpu_sdc_check_repeat_count=5"
        )
    },
    # LLaDA-8B on 64 H100 hides its gathers and scatters with these flags (docs/benchmarks.md).
    "gpu": {"XLA_FLAGS": _GPU, "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.9"},
    # The same flags, and one hardware queue, so that the order of the launches is that of the
    # schedule.
    "hopper": {
        "XLA_FLAGS": _GPU,
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.9",
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    },
}


def flags_named(names: str) -> dict[str, str]:
    """Returns the environment variables of presets joined by "+", as in "v6e+sdc-check"; "" has
    none.

    Where several presets set compiler flags, the flags are appended; any other variable is that of
    the last preset.

    Raises:
        UserError: a name is not in FLAGS.
    """
    environment = {}
    for name in names.split("+") if names else ():
        for variable, value in look_up(FLAGS, name, "preset of compiler flags").items():
            joins = variable.endswith(("_ARGS", "_FLAGS")) and variable in environment
            environment[variable] = f"{environment[variable]} {value}" if joins else value
    return environment


# {platform: the variable that its compiler reads}
_READ_BY = {"tpu": "LIBTPU_INIT_ARGS", "gpu": "XLA_FLAGS"}


def check_flags(flags: dict[str, str], platform: str) -> None:
    """Raises UserError where flags are for the compiler of another platform, which would leave the
    program as it is without a word.

    Args:
        flags: from `flags_named`.
        platform: "tpu" or "gpu".
    """
    read = _READ_BY[platform]
    unread = [name for name in _READ_BY.values() if name != read and name in flags]
    if unread:
        fitting = ", ".join(name for name, environment in FLAGS.items() if read in environment)
        raise UserError(
            f"A preset of --flags sets {unread[0]}, which the compiler for {platform.upper()}s "
            f"does not read; choose among {fitting}."
        )

"""Compiled programs that outlive the process, for every process of a run."""

import warnings
from collections.abc import Sequence
from typing import Any

import jax


def write_from_every_process() -> None:
    """Lets the processes after the first write to the compilation cache too, on CPUs.

    JAX lets process 0 write alone, because all processes look for the same entries, and many
    writers of one file would be in each other's way. On CPUs the key of an entry contains the
    devices of the process, and without an entry of its own every other process would compile again
    at each start.
    """
    if jax.process_index() == 0 or jax.default_backend() != "cpu":
        return
    from jax._src import compiler

    compiler._cache_write = _write


def _write(
    cache_key: str,
    compile_time_secs: float,
    module_name: str,
    backend: Any,
    executable: Any,
    # jax 0.12 has none
    host_callbacks: Sequence[Any] = (),
) -> None:
    """What JAX does in process 0, by the same rules."""
    from jax._src import compilation_cache

    minimum = jax.config.jax_persistent_cache_min_compile_time_secs  # type: ignore[attr-defined]
    if host_callbacks or compile_time_secs < minimum:
        return
    try:
        compilation_cache.put_executable_and_time(
            cache_key, module_name, executable, backend, int(compile_time_secs)
        )
    except Exception as error:
        # As in JAX: a cache that cannot be written never ends a run.
        warnings.warn(
            f"{module_name} was not kept in the compilation cache ({error}); the next start "
            "compiles it again.",
            stacklevel=2,
        )

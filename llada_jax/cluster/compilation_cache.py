"""Compiled programs that outlive the process, for every process of a run."""

import os
import warnings
from collections.abc import Sequence
from typing import Any

import jax

from llada_jax.storage import remote


def directory_of(setting: str) -> str | None:
    """Returns the directory that config.log.compilation_cache means; None: nothing is kept.

    Raises:
        UserError: it is a URL of a kind that is unknown, or of a bucket that does not answer.
    """
    if setting == "auto":
        # "~" where there is none: in a container, whose user may have no name
        home = os.path.expanduser("~")
        of_home = "" if home == "~" else f"{home}/.cache/llada_jax"
        setting = jax.config.jax_compilation_cache_dir or of_home  # type: ignore[attr-defined]
    return os.fspath(remote.path_of(setting)) if setting else None


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

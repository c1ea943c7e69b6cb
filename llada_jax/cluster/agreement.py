"""The agreement of the processes of a run: that they were started alike, and answers for all."""

import functools
import hashlib
import importlib.metadata
import itertools
import json
import os
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from llada_jax.cluster import distributed
from llada_jax.errors import UserError

# How long the processes wait for each other here, in ms. Between the calls each reads files.
_TIMEOUT_MS = 600_000
# Libraries that decide which program is compiled, or which row of the data is read when.
_LIBRARIES = ("jax", "jaxlib", "flax", "optax", "numpy", "grain")
# What else decides which program is compiled and what it computes: settings of JAX, most of which
# are read from a variable of the environment with that name in capitals, and flags of compilers.
_SETTINGS = (
    "jax_debug_infs",
    "jax_debug_nans",
    "jax_default_matmul_precision",
    "jax_default_prng_impl",
    "jax_disable_jit",
    "jax_numpy_dtype_promotion",
    "jax_random_seed_offset",
    "jax_threefry_partitionable",
)
_COMPILER_FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
# How many facts an error names, of all that differ.
_MAX_NAMED = 6

_calls = itertools.count()


def on_first_process(question) -> bool:
    """Returns the first process' answer in every process.

    For questions about files that the first process writes: the others may not see them yet, and
    processes that answer differently wait for each other forever.
    """
    answer = question() if jax.process_index() == 0 else False
    return bool(multihost_utils.broadcast_one_to_all(np.array(answer)))


def check_same_everywhere(facts: Mapping[str, object]) -> None:
    """Raises UserError, in every process, when the processes of a run do not agree on the facts.

    Asked before the first step: processes that compile different programs hang in their first
    collective without a word, and processes that read different data train on without one. The
    facts travel through the coordinator and not in a collective, which processes with different
    versions of jax may not have in common.

    Args:
        facts: {name: value} as the user is to read them; the same names in every process.
    """
    if jax.process_count() == 1:
        return
    # The public API has barriers and no way to exchange text.
    from jax._src.distributed import global_state

    client = global_state.client
    # Every process makes the same calls in the same order.
    place, me = f"llada_jax/same/{next(_calls)}", jax.process_index()
    ours = {name: _short(value) for name, value in facts.items()}
    if me == 0:
        client.key_value_set(f"{place}/first", json.dumps(ours))  # type: ignore[union-attr]
    first = json.loads(client.blocking_key_value_get(f"{place}/first", _TIMEOUT_MS))  # type: ignore[union-attr]
    # Only what differs is sent around: with 1,000 hosts, 1,000 copies of a config would be read
    # 1,000 times.
    differs = {
        name: [ours.get(name, "absent"), first.get(name, "absent")]
        for name in {**first, **ours}
        if ours.get(name) != first.get(name)
    }
    if differs:
        client.key_value_set(f"{place}/differs/{me}", json.dumps(differs))  # type: ignore[union-attr]
    client.wait_at_barrier(f"{place}/compared", _TIMEOUT_MS)  # type: ignore[union-attr]
    found = client.key_value_dir_get(f"{place}/differs")  # type: ignore[union-attr]
    error = None
    if found:
        by_process = {int(key.rpartition("/")[2]): json.loads(text) for key, text in found}
        error = UserError(
            f"The processes of this run differ: {differences(by_process)}; start all of them with "
            "the same command, environment, code and versions, and with the same files."
        )
        distributed.will_end_with(error)
    # The first process serves the answer, and must not end before all have read it.
    client.wait_at_barrier(f"{place}/read", _TIMEOUT_MS)  # type: ignore[union-attr]
    if error:
        raise error


def differences(by_process: dict[int, dict[str, list[str]]]) -> str:
    """Returns what differs from the first process, and on which processes, as part of a sentence.

    Args:
        by_process: {process: {fact: [its value, the value of the first process]}}.
    """
    where: dict[tuple[str, str, str], list[int]] = {}
    for process, differs in sorted(by_process.items()):
        for fact, (theirs, first) in differs.items():
            where.setdefault((fact, theirs, first), []).append(process)
    named = [
        f"{fact} is {first} on process 0 and {theirs} on {_processes(numbers)}"
        for (fact, theirs, first), numbers in where.items()
    ]
    if len(named) > _MAX_NAMED:
        named[_MAX_NAMED:] = [f"and {len(named) - _MAX_NAMED} more"]
    return "; ".join(named)


def program_facts() -> dict[str, str]:
    """Returns what decides which program a config becomes, as facts to compare: the versions of
    the libraries, a digest of this package, and settings of JAX and its compilers.
    """
    return {
        **{f"the version of {name}": importlib.metadata.version(name) for name in _LIBRARIES},
        "the code of llada_jax": _code_digest(),
        **{name.upper(): str(getattr(jax.config, name, "absent")) for name in _SETTINGS},
        **{name: _flags(os.environ.get(name, "")) for name in _COMPILER_FLAGS},
    }


def _flags(text: str) -> str:
    """Returns compiler flags in an order of their own, without those that name a path: a host may
    have a folder of its own for what the compiler writes.
    """
    return " ".join(sorted(word for word in text.split() if "/" not in word)) or "empty"


@functools.cache
def _code_digest() -> str:
    """Returns a digest of the source of this package: two checkouts may share a version."""
    root, digest = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _short(value) -> str:
    """Returns a value as a short text that differs where the values differ."""
    text = value if isinstance(value, str) else repr(value)
    if len(text) <= 60:
        return text
    return f"{text[:30]}... (digest {hashlib.sha256(text.encode()).hexdigest()[:12]})"


def _processes(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:5]))
    more = f" and {len(numbers) - 5} more" if len(numbers) > 5 else ""
    return f"process{'es' if len(numbers) > 1 else ''} {shown}{more}"

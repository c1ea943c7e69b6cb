"""Searches other meshes, remat policies and numbers of microbatches for the same run."""

import itertools
import math

from llada_jax.cluster.hardware import Slice
from llada_jax.errors import UserError
from llada_jax.planning.estimate import NETWORK_GBPS, estimate_run
from llada_jax.training.memory import Workload, exchange_of, parameter_ways
from llada_jax.training.step import Recipe

# From the most memory to the most recomputation.
REMATS = ("none", "dots", "attention", "full")

# The tensor axis exchanges activations in every layer; more than 8 ways is rarely worth that.
TENSOR_SIZES = (1, 2, 4, 8)

# The estimate may be too low by some percent, and a choice that does not fit is worth nothing.
USABLE_SHARE = 0.95


def find_choices(
    recipe: Recipe,
    workload: Workload,
    shape: dict[str, int],
    machines: Slice,
    num_slices: int,
    *,
    network_gbps: float = NETWORK_GBPS,
) -> list[dict]:
    """Returns the choices that fit and that no other choice beats in both time and memory.

    A choice is {"mesh", "remat", "microbatches", "peak" (bytes per device), "seconds_per_step"},
    the fastest first. Tried: data, fsdp and tensor (at most 8) as powers of two, all remat
    policies, and microbatches as powers of two up to one row per device; sequence and expert stay
    as they are.
    All of it is tried, because an estimate takes less than a millisecond: a cleverer search would
    have to be trusted.

    Args:
        recipe, workload, shape, network_gbps: of the run as configured, see `estimate_run`.

    Raises:
        UserError: nothing is estimated to fit.
    """
    rest = machines.num_devices * num_slices // (shape["sequence"] * shape["expert"])
    fitting = []
    # Slices are joined along data, so that data is a multiple of their number.
    for tensor, data in itertools.product(TENSOR_SIZES, (num_slices * 2**i for i in range(20))):
        if rest % (tensor * data):
            continue
        mesh = {**shape, "data": data, "fsdp": rest // (tensor * data), "tensor": tensor}
        for remat, num_microbatches in itertools.product(REMATS, (2**i for i in range(12))):
            if not is_divisible(recipe, workload.batch_size, num_microbatches, mesh):
                continue
            changed = workload._replace(remat=remat, num_microbatches=num_microbatches)
            found = estimate_run(
                recipe, changed, mesh, machines, num_slices, network_gbps=network_gbps
            )
            peak = found["memory"]["peak"]
            if peak < USABLE_SHARE * found["usable_bytes"]:
                fitting.append(
                    {
                        "mesh": mesh,
                        "remat": remat,
                        "microbatches": num_microbatches,
                        "peak": peak,
                        "seconds_per_step": found["seconds_per_step"],
                    }
                )
    if not fitting:
        raise UserError(
            f"No combination of mesh, remat policy and microbatches for {workload.batch_size} "
            f"rows is estimated to fit {machines.name}; take a larger --topology, or a shorter "
            "config.data.sequence_length."
        )
    return _not_dominated(fitting)


def _not_dominated(choices: list[dict]) -> list[dict]:
    """Returns the choices that need less memory than every faster one, the fastest first."""

    def seconds(choice: dict) -> float:
        # Twice the middle of the range, which orders alike: neither end alone is to be believed.
        return sum(choice["seconds_per_step"].values())

    frontier, least = [], math.inf
    for choice in sorted(choices, key=lambda choice: (seconds(choice), choice["peak"])):
        if choice["peak"] < least:
            frontier.append(choice)
            least = choice["peak"]
    return frontier


def is_divisible(
    recipe: Recipe, batch_size: int, num_microbatches: int, mesh: dict[str, int]
) -> bool:
    """Whether batch, width, heads, vocabulary and rows can be split over a mesh.

    True also means that every device has at least one row in each microbatch.
    """
    a, rows_split = recipe.architecture, mesh["data"] * mesh["fsdp"] * mesh["expert"]
    splits = [(batch_size, num_microbatches * rows_split), (a.d_model, parameter_ways(mesh))]
    splits += [
        (size, mesh["tensor"]) for size in (a.num_heads, a.num_kv_heads, a.d_ff, a.vocab_size)
    ]
    if any(size % ways for size, ways in splits):
        return False
    return mesh["sequence"] == 1 or bool(exchange_of(recipe, mesh))

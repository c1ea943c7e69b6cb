"""Other meshes, remat policies and numbers of microbatches for the same config."""

import itertools
import math

from llada_jax.cluster.hardware import Slice
from llada_jax.errors import UserError
from llada_jax.planning import absent_devices
from llada_jax.planning.estimate import arithmetic, recipe_of_shapes
from llada_jax.training.step import Recipe

REMATS = ("none", "dots", "attention", "full")  # from the most memory to the most recomputation


def search_choices(config, machines: Slice, num_slices: int, vocab_size: int) -> list[dict]:
    """Returns the choices of mesh, remat policy and microbatches that are estimated to fit, and
    that no other choice beats in both time and memory; the fastest first.

    Tried: data, fsdp and tensor (at most 8) as powers of two, microbatches up to one row a device;
    sequence and expert stay as they are.
    """
    base = absent_devices.stand_in_mesh(config.mesh, machines, num_slices)
    recipe = recipe_of_shapes(config, base, vocab_size)
    fixed = base.shape["sequence"] * base.shape["expert"]
    rest = machines.num_devices * num_slices // fixed
    choices = []
    for tensor, data in itertools.product((1, 2, 4, 8), (num_slices * 2**i for i in range(20))):
        if rest % (tensor * data):
            continue
        shape = {**base.shape, "data": data, "fsdp": rest // (tensor * data), "tensor": tensor}
        for remat, accumulation in itertools.product(REMATS, (2**i for i in range(12))):
            if not is_divisible(config.data.batch_size, accumulation, recipe, shape):
                continue
            choice = {"mesh": shape, "remat": remat, "microbatches": accumulation}
            changed = with_choice(config, choice)
            found = arithmetic(changed, recipe, shape, machines, num_slices)
            if found["memory"]["peak"] < 0.95 * found["usable_bytes"]:
                choices.append(
                    {
                        **choice,
                        "peak": found["memory"]["peak"],
                        "seconds_per_step": found["seconds_per_step"],
                    }
                )
    if not choices:
        raise UserError(
            f"No mesh, remat policy or microbatch of {config.data.batch_size} rows is estimated to "
            f"fit {machines.name}; take "
            "a larger --topology, or a shorter config.data.sequence_length."
        )
    middle = lambda choice: sum(choice["seconds_per_step"].values())  # noqa: E731
    choices.sort(key=lambda choice: (middle(choice), choice["peak"]))
    frontier, least = [], math.inf
    for choice in choices:
        if choice["peak"] < least:
            frontier.append(choice)
            least = choice["peak"]
    return frontier


def with_choice(config, choice: dict):
    """Returns a copy of the config with the mesh, remat policy and microbatches of a choice."""
    changed = config.copy_and_resolve_references()
    changed.mesh.update(choice["mesh"])
    changed.model.remat = choice["remat"]
    changed.optimizer.gradient_accumulation = choice["microbatches"]
    return changed


def is_divisible(
    batch_size: int, num_microbatches: int, recipe: Recipe, shape: dict[str, int]
) -> bool:
    """Whether batch, width, heads and vocabulary can be split over a mesh, and every device has at
    least one row.
    """
    a, ways = recipe.architecture, shape["data"] * shape["fsdp"] * shape["expert"]
    split = [(batch_size, num_microbatches * ways), (a.d_model, shape["fsdp"])]
    split += [
        (size, shape["tensor"]) for size in (a.num_heads, a.num_kv_heads, a.d_ff, a.vocab_size)
    ]
    return all(size % ways == 0 for size, ways in split)

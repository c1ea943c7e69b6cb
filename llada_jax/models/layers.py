"""The layers of a network, one after the other: a loop over stacked arrays, or each by itself."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec


def by_layer(params: dict) -> dict:
    """Returns the parameters with a tuple of layers in place of the stacked arrays of "blocks".

    What a network without a loop reads: of a stacked array it would copy its layer's part in every
    pass, which for a few tokens takes twice the time of the products. The stacked arrays are
    dropped one by one.
    """
    stacked = params.pop("blocks")
    layers: list[dict] = []
    for name in list(stacked):
        parts = _unstack(stacked.pop(name))
        layers = layers or [{} for _ in parts]
        for layer, part in zip(layers, parts, strict=True):
            layer[name] = part
    return {**params, "blocks": tuple(layers)}


def place_of_layer(stacked: NamedSharding) -> NamedSharding:
    """Returns the sharding of one layer's part of a stacked array, by that of the whole."""
    return NamedSharding(stacked.mesh, PartitionSpec(*stacked.spec[1:]))


def _unstack(stacked: jax.Array) -> list[jax.Array]:
    """Returns the parts, each split over the devices as the whole was."""
    place = stacked.sharding
    if isinstance(place, NamedSharding):
        place = place_of_layer(place)
    return jax.jit(_parts, out_shardings=place)(stacked)


def _parts(stacked: jax.Array) -> list[jax.Array]:
    return [stacked[number] for number in range(len(stacked))]


def run_layers(
    blocks: nnx.Module,
    run: Callable[[Any, Any, Any], tuple[Any, Any]],
    x: Any,
    per_layer: Any = None,
    *,
    layers: tuple[dict, ...] | None,
    is_unrolled: bool,
    checkpointed: Callable[[Callable], Callable] = lambda step: step,
) -> tuple[Any, Any]:
    """Returns x after all layers, and what `run` returns besides: (block, x, more) -> (x, out).

    Args:
        blocks: of a Transformer, all layers stacked; their numbers are not read where there are
            `layers`.
        per_layer: `more` of all layers: stacked arrays, and tuples of arrays without a loop. What
            is returned has the same form.
        layers: the parameters of each layer, see `by_layer`.
        is_unrolled: compile every layer by itself, and not one loop over them.
        checkpointed: is given a step, and returns the one that is run.
    """
    graphdef, stacked = nnx.split(blocks)

    @checkpointed
    def step(x: Any, one: Any) -> tuple[Any, Any]:
        params, more = one
        return run(nnx.merge(graphdef, params), x, more)

    if layers is None and not is_unrolled:
        return jax.lax.scan(step, x, (stacked, per_layer))
    outs = []
    for number, params in enumerate(_states(stacked, layers)):
        more = jax.tree.map(
            lambda parts, number=number: parts[number],
            per_layer,
            is_leaf=lambda node: type(node) is tuple,
        )
        x, out = step(x, (params, more))
        outs.append(out)
    return x, jax.tree.map(lambda *parts: parts, *outs)


def _states(stacked: Any, layers: tuple[dict, ...] | None) -> Iterator[Any]:
    """Yields the state of each layer's block."""
    if layers is None:
        num_layers = len(jax.tree.leaves(stacked)[0])
        for number in range(num_layers):
            yield jax.tree.map(lambda array, number=number: array[number], stacked)
        return
    for layer in layers:
        state = jax.tree.map(lambda leaf: leaf, stacked)
        nnx.replace_by_pure_dict(state, layer)
        yield state

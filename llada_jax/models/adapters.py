"""Low-rank adapters (LoRA, arXiv 2106.09685): a trained product A B that is added to a frozen
matrix.

While they are trained, a layer multiplies by the matrix and by the two factors; for everything
else, `merged` makes a network of the sum, and nothing knows of adapters.
"""

import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from llada_jax.cluster.sharding import reduced
from llada_jax.errors import UserError
from llada_jax.models.int8 import dequantised, quantised

# The matrices that can have adapters, and how many of their dims are inputs; the stacked layers
# come before these.
NUM_INPUT_DIMS = {
    "blocks/q": 1,
    "blocks/k": 1,
    "blocks/v": 1,
    "blocks/attn_out": 2,
    "blocks/ff_gate": 1,
    "blocks/ff_up": 1,
    "blocks/ff_out": 1,
}


class Lora(NamedTuple):
    """Which adapters a network has; rank 0: none.

    alpha: A B is multiplied by alpha / rank. targets: a regular expression that is found in the
    names of the matrices that have one, such as "blocks/q". frozen_dtype: in which the matrices of
    the frozen network are kept; its norms and biases are float32. "int8" is for the matrices of the
    layers alone: those of embedding and head are bfloat16 then.
    """

    rank: int = 0
    alpha: float = 16.0
    targets: str = "blocks/[^f]"
    frozen_dtype: str = "float32"

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def dtype_of(self, path: str) -> Any:
        """Returns the dtype of an array of the frozen network, such as "blocks/q" or
        "scales/blocks/q".
        """
        if re.search("norm|bias|scales/", path):
            return jnp.dtype("float32")
        is_whole = self.frozen_dtype != "int8" or path in self.int8_paths
        return jnp.dtype(self.frozen_dtype if is_whole else "bfloat16")

    @property
    def int8_paths(self) -> tuple[str, ...]:
        """The matrices of the frozen network that are kept in int8."""
        return tuple(NUM_INPUT_DIMS) if self.frozen_dtype == "int8" else ()

    @property
    def paths(self) -> list[str]:
        """The adapted matrices; UserError when there are none."""
        found = [path for path in NUM_INPUT_DIMS if re.search(self.targets, path)]
        if not found:
            raise UserError(
                f"config.lora.targets={self.targets!r} is found in none of the matrices that can "
                f"have adapters: {', '.join(NUM_INPUT_DIMS)}; change it."
            )
        return found


def adapter_shapes(network: dict, lora: Lora) -> dict:
    """Returns the adapters of a network as float32 ShapeDtypeStructs: {"blocks": {"q": {"a": [L,
    inputs, rank], "b": [L, rank, outputs]}}}.
    """
    shapes = {}
    for path in lora.paths:
        group, name = path.split("/")
        dims = adapter_dims(path, network[group][name].shape, lora)
        shapes[name] = {
            part: jax.ShapeDtypeStruct(shape, jnp.float32) for part, shape in zip("ab", dims)
        }
    return {"blocks": shapes}


def adapter_dims(path: str, shape: tuple[int, ...], lora: Lora) -> tuple[tuple[int, ...], ...]:
    """Returns the shapes of A and B of a matrix: (L, inputs, rank) and (L, rank, outputs)."""
    num_layers, *dims = shape
    split = NUM_INPUT_DIMS[path]
    inputs, outputs = math.prod(dims[:split]), math.prod(dims[split:])
    return (num_layers, inputs, lora.rank), (num_layers, lora.rank, outputs)


def make_adapters(network: dict, key: Array, lora: Lora) -> dict:
    """Returns fresh adapters, which change nothing: A is normal with the variance 1 / inputs, B is
    zero.
    """
    adapters = {}
    for number, (name, shapes) in enumerate(adapter_shapes(network, lora)["blocks"].items()):
        a, b = shapes["a"], shapes["b"]
        normal = jax.random.normal(jax.random.fold_in(key, number), a.shape, a.dtype)
        adapters[name] = {"a": normal * a.shape[1] ** -0.5, "b": jnp.zeros(b.shape, b.dtype)}
    return {"blocks": adapters}


def joined(network: dict, adapters: dict, lora: Lora) -> dict:
    """Returns parameters that compute what those of `merged` do, without a sum of matrices:
    "adapters" next to the network's own, {"q_a": [L, inputs, rank], "q_b": ..., ...}.
    """
    factors = {}
    for name, pair in adapters["blocks"].items():
        factors[f"{name}_a"], factors[f"{name}_b"] = pair["a"], lora.scale * pair["b"]
    return {**network, "adapters": factors}


def stored(network: dict, lora: Lora) -> dict:
    """Returns the network as it is kept while adapters are trained: where matrices are int8, with
    "scales" next to its parameters, {"blocks": {"q": [L, 1, N, H], ...}}.

    Args:
        network: float32, but for matrices that `round_in_place` has rounded before.
    """
    if lora.frozen_dtype == "float32":
        return network
    blocks = dict(network["blocks"])
    scales = dict(network.get("scales", {"blocks": {}})["blocks"])
    for path in lora.int8_paths:
        name = path.split("/")[1]
        if name not in scales:
            blocks[name], scales[name] = quantised(blocks[name], NUM_INPUT_DIMS[path])
    kept = {**network, "blocks": blocks} | ({"scales": {"blocks": scales}} if scales else {})
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf.astype(lora.dtype_of(_text(path))), kept
    )


def round_in_place(network: dict, path: str, lora: Lora) -> None:
    """Replaces one parameter, if it is a matrix of the layers, by what `stored` makes of it: a
    network that is read one parameter after the other then never exists in float32.
    """
    if path not in NUM_INPUT_DIMS or lora.frozen_dtype == "float32":
        return
    blocks, name = network["blocks"], path.split("/")[1]
    if path in lora.int8_paths:
        round_matrix = jax.jit(quantised, static_argnums=1)
        scales = network.setdefault("scales", {"blocks": {}})["blocks"]
        blocks[name], scales[name] = round_matrix(blocks[name], NUM_INPUT_DIMS[path])
    else:
        blocks[name] = blocks[name].astype(lora.dtype_of(path))
    # dispatch is asynchronous, and the next would be read before this one is let go
    blocks[name].block_until_ready()


def abstract_stored(abstract: dict, lora: Lora) -> dict:
    """Returns `stored` of ShapeDtypeStructs with shardings; scales are sharded like the outputs of
    their matrices.
    """
    sharding_of = {
        _text(path): leaf.sharding for path, leaf in jax.tree_util.tree_leaves_with_path(abstract)
    }

    def place(path: Any, leaf: Any) -> Any:
        sharding = reduced(sharding_of[_text(path).removeprefix("scales/")], leaf.shape)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    shapes = jax.eval_shape(lambda network: stored(network, lora), abstract)
    return jax.tree_util.tree_map_with_path(place, shapes)


def _text(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def merged(network: dict, adapters: dict, lora: Lora) -> dict:
    """Returns the network that is kept as `stored` with its adapters added, in float32."""
    network = dict(network)
    scales = network.pop("scales", {"blocks": {}})["blocks"]
    network = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), network)
    blocks = dict(network["blocks"])
    for name, scale in scales.items():
        blocks[name] = dequantised(blocks[name], scale)
    for name, pair in adapters["blocks"].items():
        blocks[name] = with_adapter(blocks[name], pair["a"], pair["b"], lora)
    return {**network, "blocks": blocks}


def with_adapter(matrix: Any, a: Any, b: Any, lora: Lora) -> Any:
    """Returns one stacked matrix with its adapter added, in numpy or jax, as the arrays are."""
    return matrix + (lora.scale * (a @ b)).reshape(matrix.shape)

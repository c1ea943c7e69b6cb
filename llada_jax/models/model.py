"""What objectives and samplers call: a Transformer without its numbers, bound to parameters inside
jax.jit.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import Mesh, NamedSharding

from llada_jax.cluster.sharding import check_divisible, spec
from llada_jax.models.attention import IN_PIECES, ON_CANVASES
from llada_jax.models.cache import KeysValues, hidden_with_cache
from llada_jax.models.shadow import hidden_with_shadow
from llada_jax.models.token_scores import TokenScores
from llada_jax.models.transformer import Architecture, Transformer


# eq=False: hashed by identity, because its methods are static arguments of jitted functions.
@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A Transformer without its numbers; every function takes the parameters first.

    build: makes the module from a random key.
    graphdef, variables: the module's structure and its abstract variables, which `bind` fills.
    abstract: the parameters as a nested dict of ShapeDtypeStructs.
    names: the same dict with the logical axis names of each parameter.
    architecture, settings: the arguments of make_model.
    """

    build: Callable[[Array], Transformer]
    graphdef: nnx.GraphDef
    variables: nnx.State
    abstract: dict
    names: dict
    architecture: Architecture
    settings: dict

    @property
    def is_unrolled(self) -> bool:
        """Whether its layers are compiled one by one, and no loop over them."""
        return self.settings.get("is_unrolled", False)

    @functools.cached_property
    def for_any_rows(self) -> "Model":
        """The network for rows of several segments too, which ON_CANVASES does not tell apart."""
        if self.settings.get("attention") != ON_CANVASES:
            return self
        return make_model(self.architecture, **{**self.settings, "attention": IN_PIECES})

    def bind(self, params: dict) -> Transformer:
        """Returns the module that computes with `params`; call it inside jax.jit.

        The blocks may be a tuple of layers, see llada_jax.models.layers.by_layer.
        `params["adapters"]` and `params["scales"]`, if there are some, are those of `joined` and of
        `stored` in llada_jax.models.adapters.
        """
        params = dict(params)
        layers = None
        if isinstance(params["blocks"], tuple):
            layers = params.pop("blocks")
        extras = params.pop("adapters", {})
        scales = params.pop("scales", {"blocks": {}})["blocks"]
        extras = {**extras, **{f"{name}_scale": array for name, array in scales.items()}}
        # A copy, because replacing works in place and `variables` belongs to all calls.
        variables = jax.tree.map(lambda leaf: leaf, self.variables)
        nnx.replace_by_pure_dict(variables, params)
        module = nnx.merge(self.graphdef, variables)
        module.layers = nnx.data(layers)
        for name, array in extras.items():
            setattr(module.blocks, name, nnx.Param(array))
        return module

    def nll_fn(
        self,
        params: dict,
        noisy_BT: Array,
        targets_BT: Array,
        where_BT: Array,
        segment_ids_BT: Array | None,
        positions_BT: Array,
    ) -> TokenScores:
        """What objectives call; see Transformer.token_nll."""
        return self.bind(params).token_nll(
            noisy_BT, targets_BT, where_BT, segment_ids_BT, positions_BT
        )

    def hidden_fn(
        self, params: dict, tokens_BT: Array, segment_ids_BT: Array | None, positions_BT: Array
    ) -> Array:
        """Returns what the head reads, [B, T, D]; see Transformer.hidden."""
        return self.bind(params).hidden(tokens_BT, segment_ids_BT, positions_BT)

    def head_fn(self, params: dict, hidden_BTD: Array) -> Array:
        """Returns float32 logits [B, T, V] of hidden vectors, of any of the row's positions."""
        return self.bind(params).head(hidden_BTD)

    def logits_fn(
        self,
        params: dict,
        tokens_BT: Array,
        segment_ids_BT: Array | None,
        positions_BT: Array,
        start: int | Array = 0,
        length: int | None = None,
    ) -> Array:
        """What samplers call: the logits of the columns that they read, and of no others.

        The whole row goes through the network and only the columns from `start` on through the
        head. The logits are by far the largest array of a sampler: 16 rows of 768 tokens take 5.8
        GiB at a vocabulary of 126,464, and a block of 32 columns takes 0.24 GiB.

        Args:
            tokens_BT, segment_ids_BT, positions_BT: see Transformer.__call__.
            start: the first column of which logits are wanted; may be traced.
            length: how many columns, static; None means all of the row, and `start` is not read.

        Returns:
            float32 [B, length, V].
        """
        hidden_BTD = self.hidden_fn(params, tokens_BT, segment_ids_BT, positions_BT)
        if length is not None:
            # After `hidden`, whose output shift moves vectors across the edge of the window.
            hidden_BTD = jax.lax.dynamic_slice_in_dim(hidden_BTD, start, length, axis=1)
        return self.head_fn(params, hidden_BTD)

    def cached_fn(
        self,
        params: dict,
        tokens_BW: Array,
        segment_ids_BT: Array,
        positions_BW: Array,
        cache: KeysValues | None,
        *,
        start: int | Array,
        length: int,
    ) -> tuple[Array, KeysValues]:
        """What samplers with a cache call: returns the logits of the columns start ... start +
        length - 1, float32 [B, length, V], and the keys and values of the rows.

        Args:
            tokens_BW, positions_BW: int32, of whole rows (W = T) without a cache, and of the
                columns start ... start + W - 1 with one.
            segment_ids_BT: int32, of whole rows.
            cache: what all other columns are seen as; None: they are computed too.
        """
        module = self.bind(params)
        rows = (tokens_BW, segment_ids_BT, positions_BW)
        if cache is None:
            hidden_BTD, cache = hidden_with_cache(module, *rows)
            hidden_BLD = jax.lax.dynamic_slice_in_dim(hidden_BTD, start, length, axis=1)
        else:
            hidden_BWD, cache = hidden_with_cache(module, *rows, cache, start)
            hidden_BLD = hidden_BWD[:, :length]
        return module.head(hidden_BLD), cache

    def shadow_fn(
        self,
        params: dict,
        tokens_BT: Array,
        segment_ids_BT: Array,
        positions_BT: Array,
        shadow_token: int | Array,
        *,
        start: int | Array,
        length: int,
    ) -> tuple[Array, Array]:
        """Returns what `logits_fn` returns, and the logits of a shadow of these columns, float32
        [B, length, V]: `shadow_token` in their positions, each seeing all but the token in its own
        place; see llada_jax.models.shadow.
        """
        module = self.bind(params)
        hidden_BLD, shadow_BLD = hidden_with_shadow(
            module,
            tokens_BT,
            segment_ids_BT,
            positions_BT,
            shadow_token,
            start=start,
            length=length,
        )
        return module.head(hidden_BLD), module.head(shadow_BLD)

    def init(self, key: jax.Array) -> dict:
        """Returns freshly initialised parameters as a plain dict."""
        return nnx.to_pure_dict(nnx.split(self.build(key))[1])


def compute_dtype(name: str, platform: str) -> jnp.dtype:
    """Returns the dtype of config.model.dtype: "auto" is float32 on CPU and bfloat16 elsewhere."""
    if name == "auto":
        name = "float32" if platform == "cpu" else "bfloat16"
    return jnp.dtype(name)


def make_model(architecture: Architecture, **kwargs: Any) -> Model:
    """Returns the model of an Architecture; kwargs go to Transformer (dtype, attention, mask,
    remat, nll_chunk, capacity, is_unrolled).
    """

    def build(key: Array) -> Transformer:
        return Transformer(architecture, key, **kwargs)

    graphdef, variables = nnx.split(nnx.eval_shape(lambda: build(jax.random.key(0))))
    # The blocks are stacked, and their leading dim has a name of its own.
    names = {}
    for path, variable in nnx.to_flat_state(variables):
        logical = variable.get_metadata()["logical"]
        names[path] = ("layers", *logical) if path[0] == "blocks" else logical
    return Model(
        build,
        graphdef,
        variables,
        nnx.to_pure_dict(variables),
        nnx.traversals.unflatten_mapping(names),
        architecture,
        kwargs,
    )


def is_matrix(name: str) -> bool:
    """Whether the parameter of this name is multiplied in the compute dtype: no norm, no bias."""
    return not name.endswith(("norm", "bias"))


def in_compute_dtype(params: dict, dtype: Any) -> dict:
    """Returns the parameters with the matrices in the dtype in which they are multiplied, which
    changes no result and halves their memory in bfloat16. Norms and biases are added and multiplied
    in float32, and stay.

    The arrays of `params` are dropped one by one, so that both copies of one parameter exist at a
    time.
    """

    def cast(tree: dict) -> dict:
        for name in list(tree):
            leaf = tree.pop(name)
            if isinstance(leaf, dict):
                tree[name] = cast(leaf)
            else:
                tree[name] = leaf.astype(dtype) if is_matrix(name) else leaf
        return tree

    return cast(params)


def check_mesh(a: Architecture, mesh: Mesh) -> None:
    """Raises UserError when the parameters cannot be split as the mesh asks."""
    sizes = {
        "width": ("embed", a.d_model),
        "query heads": ("heads", a.num_heads),
        "key/value heads": ("kv_heads", a.num_kv_heads),
        "feed-forward width": ("mlp", a.d_ff),
        "vocabulary": ("vocab", a.vocab_size),
    }
    check_divisible(mesh, {f"--mesh: the model's {what}": size for what, size in sizes.items()})


def parameter_shardings(model: Model, mesh: Mesh) -> dict:
    """Returns one NamedSharding per parameter, from its logical axes by the rule table."""
    return jax.tree.map(
        lambda names: NamedSharding(mesh, spec(names)),
        model.names,
        is_leaf=lambda x: type(x) is tuple,
    )


def abstract_parameters(model: Model, mesh: Mesh) -> dict:
    """Returns the parameters as ShapeDtypeStructs with shardings: what is read from files."""
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        model.abstract,
        parameter_shardings(model, mesh),
    )

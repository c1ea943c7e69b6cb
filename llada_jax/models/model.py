"""What objectives and samplers call: a Transformer without its numbers, bound to parameters inside
jax.jit.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from llada_jax.cluster.sharding import spec
from llada_jax.models.transformer import Architecture, Transformer


@dataclasses.dataclass(
    frozen=True, eq=False
)  # hashed by identity: its methods are static arguments of jitted functions
class Model:
    """A Transformer without its numbers: `abstract` is a dict of ShapeDtypeStructs, `names` of
    logical axes.
    """

    build: Callable[[jax.Array], Transformer]
    graphdef: nnx.GraphDef
    variables: nnx.State
    abstract: dict
    names: dict

    def bind(self, params: dict) -> Transformer:
        """Returns the module that computes with `params`; call it inside jax.jit."""
        variables = jax.tree.map(lambda leaf: leaf, self.variables)
        nnx.replace_by_pure_dict(variables, params)
        return nnx.merge(self.graphdef, variables)

    def nll_fn(self, params, noisy_BT, targets_BT, where_BT, segment_ids_BT, positions_BT):
        """What objectives call; see Transformer.token_nll."""
        return self.bind(params).token_nll(
            noisy_BT, targets_BT, where_BT, segment_ids_BT, positions_BT
        )

    def logits_fn(self, params, tokens_BT, segment_ids_BT, positions_BT):
        """What samplers call; see Transformer.__call__."""
        return self.bind(params)(tokens_BT, segment_ids_BT, positions_BT)

    def init(self, key: jax.Array) -> dict:
        """Returns freshly initialised parameters as a plain dict."""
        return nnx.to_pure_dict(nnx.split(self.build(key))[1])


def compute_dtype(name: str, platform: str):
    """Returns the dtype of config.model.dtype: "auto" is float32 on CPU and bfloat16 elsewhere."""
    if name == "auto":
        name = "float32" if platform == "cpu" else "bfloat16"
    return jnp.dtype(name)


def make_model(architecture: Architecture, **kwargs) -> Model:
    """Returns the model of an Architecture; kwargs go to Transformer (dtype, attention, remat,
    nll_chunk, causal).
    """

    def build(key):
        return Transformer(architecture, key, **kwargs)

    graphdef, variables = nnx.split(nnx.eval_shape(lambda: build(jax.random.key(0))))
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
    )


def parameter_shardings(model: Model, mesh: Mesh) -> dict:
    """Returns one NamedSharding a parameter, from its logical axes by the rule table."""
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

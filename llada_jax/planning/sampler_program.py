"""The compiled step of the sampler on devices that are not there, and what it needs of their
memory.
"""

from contextlib import nullcontext
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llada_jax.models.layers import place_of_layer
from llada_jax.models.model import Model, abstract_parameters, is_matrix
from llada_jax.samplers.network import Network
from llada_jax.samplers.remasking import commit_rule
from llada_jax.samplers.step import BlockProgram, Fixed, State, denoise_block


def kept_parameters(model: Model, mesh: Mesh, dtype: Any) -> dict:
    """Returns the parameters as shapes on a mesh, with the matrices in `dtype` and in layers where
    the network has no loop over them, as `load(..., keep_float32=False)` leaves them.
    """

    def kept(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        kept_dtype = dtype if is_matrix(path[-1].key) else leaf.dtype
        return jax.ShapeDtypeStruct(leaf.shape, kept_dtype, sharding=leaf.sharding)

    params = jax.tree_util.tree_map_with_path(kept, abstract_parameters(model, mesh))
    if not model.is_unrolled:
        return params

    def of_layer(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        place = place_of_layer(leaf.sharding)
        return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype, sharding=place)

    layer = {name: of_layer(leaf) for name, leaf in params["blocks"].items()}
    return {**params, "blocks": (layer,) * model.architecture.num_layers}


def traced_block(
    model: Model,
    params: dict,
    *,
    num_rows: int,
    width: int,
    gen_length: int,
    block_length: int,
    cache: str = "none",
    mesh: Mesh | None = None,
    **options: Any,
) -> Any:
    """Returns the program that denoises one block, as llada_jax.samplers.denoise runs it for
    canvases of a shape: traced, but not compiled.

    Args:
        params: arrays or shapes.
        num_rows, width: of the canvas; its last `gen_length` columns are generated.
        cache: "none", "prefix" (for the first block, which has the longest rest) or "dual".
        mesh: where the parameters are; None: one device, the default one.
        options: other fields of llada_jax.samplers.step.BlockProgram than a plain request has.
    """
    place = None if mesh is None else NamedSharding(mesh, PartitionSpec())

    def array(*shape: int, dtype: Any = jnp.int32) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    number, fraction = array(), array(dtype=jnp.float32)
    canvas_BT, ids_B, ids_n = array(num_rows, width), array(num_rows), array(1)
    fixed = Fixed(
        is_fixed_BT=array(num_rows, width, dtype=bool),
        segment_ids_BT=canvas_BT,
        positions_BT=canvas_BT,
        row_B=ids_B,
        mask_id=number,
        fill_id=number,
        eos_ids_n=ids_n,
        suppress_n=array(0),
        steps_per_block=number,
        lookahead=number,
        refresh=number,
        amount=fraction,
        revise_amount=fraction,
        temperature=fraction,
        top_k=number,
        top_p=fraction,
        cfg_scale=fraction,
        num_ids=number,
    )
    program = BlockProgram(
        gen_length=gen_length,
        block_length=block_length,
        rule=commit_rule("low_confidence"),
        criterion="schedule",
        reviser="none",
        eos="free",
        is_bounded=False,
        width=width,
        is_stochastic=False,
        is_filtered=False,
        is_guided=False,
        window={"none": 0, "prefix": gen_length, "dual": block_length}[cache],
        is_cache_kept=False,
        with_confidence=False,
        sharding=place,
    )._replace(**options)
    bound = jax.tree_util.Partial
    cached_fn = None if cache == "none" else bound(model.cached_fn, params)
    network = Network(bound(model.logits_fn, params), cached_fn, None)
    confidence_BT = array(num_rows, width, dtype=jnp.float32) if program.with_confidence else ()
    state = State(canvas_BT, number, ids_B, ids_B, confidence_BT)
    with nullcontext() if mesh is None else jax.set_mesh(mesh):
        key = jax.eval_shape(lambda: jax.random.key(0))
        key = array(*key.shape, dtype=key.dtype)
        return denoise_block.trace(network, state, (), number, number, key, fixed, program=program)

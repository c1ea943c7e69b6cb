"""What the backward pass of a layer keeps, and so what it need not compute again."""

from collections.abc import Callable
from typing import Any

import jax

# The forward kernels of attention whose outputs have no name that could be saved: cuDNN's primitive
# in jax.nn.dot_product_attention, and the function of Triton's kernel, which a custom_vjp calls.
# Each returns the result of attention and the statistics of its softmax, which its backward pass
# reads: without the statistics recomputation runs the whole kernel again.
_CUDNN_FORWARD, _TRITON_FORWARD = "dot_product_attention_fwd_wrapper", "mha"

_is_named = jax.checkpoint_policies.save_only_these_names("attention")


def is_of_attention(primitive: Any, *avals: Any, **params: Any) -> Any:
    """Whether the backward pass reads this result from attention: its output or the statistics."""
    if primitive.name == _CUDNN_FORWARD:
        return True
    if primitive.name == "custom_vjp_call":
        return any(call.params.get("name") == _TRITON_FORWARD for call in params["call_jaxpr"].eqns)
    return _is_named(primitive, *avals, **params)


# {name of config.model.remat: what is kept}; everything else of a block is computed again.
REMAT_POLICIES: dict[str, Callable] = {
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable, is_of_attention
    ),
    "attention": is_of_attention,
    "full": jax.checkpoint_policies.nothing_saveable,
}

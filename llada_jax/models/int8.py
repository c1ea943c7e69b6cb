"""Matrices as int8 with one float32 scale for each output, for networks that are not trained.

    matrix = scale * whole numbers between -127 and 127,  scale = max |matrix| / 127

where the maximum is over the inputs of an output. Symmetric, so that zero stays zero, and by output
and not by input, so that the product can be multiplied by the scale instead of the matrix
(LLM.int8(), arXiv 2208.07339, section 2.1, without its outliers). A weight moves by at most half of
its scale.
"""

from typing import Any

import jax.numpy as jnp
from jax import Array

# The largest of the whole numbers: -128 would have no opposite.
LARGEST = 127


def quantised(matrix: Array, num_in: int) -> tuple[Array, Array]:
    """Returns stacked matrices [L, inputs, outputs] as int8, and their scales [L, 1, outputs] with
    as many ones as there are dims of inputs.

    Args:
        num_in: how many dims after the first are inputs.
    """
    matrix = matrix.astype(jnp.float32)
    largest = jnp.abs(matrix).max(axis=tuple(range(1, 1 + num_in)), keepdims=True)
    # an output without weights is zero under any scale
    scale = jnp.where(largest > 0, largest / LARGEST, 1.0)
    # rounding may carry the largest weight one step too far
    numbers = jnp.clip(jnp.round(matrix / scale), -LARGEST, LARGEST)
    return numbers.astype(jnp.int8), scale


def dequantised(numbers: Any, scale: Any) -> Any:
    """Returns the float32 matrix that int8 and scale stand for, in numpy or jax, as they are."""
    return numbers.astype(jnp.float32) * scale


def scale_shape(shape: tuple[int, ...], num_in: int) -> tuple[int, ...]:
    """Returns the shape of the scales of stacked matrices of a shape."""
    return (shape[0], *[1] * num_in, *shape[1 + num_in :])

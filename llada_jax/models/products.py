"""The matrix products of the network, and the dtype in which devices add up their gradients."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import AbstractMesh


def project(
    x: Array,
    kernel: Array,
    num_in: int = 1,
    out_dtype: Any = None,
    *,
    gradient_dtype: Any = None,
    is_split: bool = False,
) -> Array:
    """Contracts the last `num_in` dims of x with the first of the kernel, in the dtype of x;
    accumulates in `out_dtype`.

    On CPUs as one matrix product over all B * T rows: the gradient of a kernel then contracts one
    dim and not two, for which XLA has no fast path there (2 to 5 times slower). Where the positions
    are sharded too, B and T cannot be merged. Other devices take the dims as they are: merged heads
    have another layout there than split ones, and every layer would copy from one to the other.

    Args:
        gradient_dtype: in which a device leaves its part of the kernel's gradient, and so the dtype
            in which the parts are added up over devices: float32, or None for the dtype of x.
        is_split: the positions are sharded although the mesh does not split the sequence.
    """
    mesh = jax.sharding.get_abstract_mesh()
    # a kernel that is stored in the dtype of x could not have another gradient
    is_narrow = gradient_dtype in (None, x.dtype) or kernel.dtype == x.dtype
    product = _product if is_narrow else _product_with_float32_gradient
    kernel = kernel.astype(x.dtype) if is_narrow else kernel
    if is_split or not _merges_rows(mesh):
        return product(x, kernel, num_in, out_dtype)
    rows, outs = x.shape[: x.ndim - num_in], kernel.shape[num_in:]
    flat_x, flat_kernel = x.reshape(math.prod(rows), -1), kernel.reshape(-1, math.prod(outs))
    return product(flat_x, flat_kernel, 1, out_dtype).reshape(*rows, *outs)


def _merges_rows(mesh: AbstractMesh) -> bool:
    """Whether products are done over all rows and positions at once."""
    if mesh.empty or mesh.abstract_device is None:
        return jax.default_backend() == "cpu"
    return mesh.shape["sequence"] == 1 and mesh.abstract_device.platform == "cpu"


def _product(x: Array, kernel: Array, num_in: int, out_dtype: Any) -> Array:
    return jnp.tensordot(x, kernel.astype(x.dtype), num_in, preferred_element_type=out_dtype)


# The gradient of a kernel that was cast has the dtype of the cast, and the partitioner adds up the
# parts of the devices before they are cast back. Only a rule of our own has the product of the
# backward pass in float32; a cast of its result would come after each part was rounded.
_product_with_float32_gradient = jax.custom_vjp(_product, nondiff_argnums=(2, 3))


def _forward(
    x: Array, kernel: Array, num_in: int, out_dtype: Any
) -> tuple[Array, tuple[Array, Array]]:
    # cast here, so that the backward pass reads what the forward pass has gathered
    kernel = kernel.astype(x.dtype)
    return _product(x, kernel, num_in, out_dtype), (x, kernel)


def _backward(
    num_in: int, out_dtype: Any, saved: tuple[Array, Array], grad: Array
) -> tuple[Array, Array]:
    x, kernel = saved
    to_x = jax.vjp(lambda x: _product(x, kernel, num_in, out_dtype), x)[1]
    rows = tuple(range(x.ndim - num_in))
    return to_x(grad)[0], jnp.tensordot(x, grad, (rows, rows), preferred_element_type=jnp.float32)


_product_with_float32_gradient.defvjp(_forward, _backward)

"""The matrix products of the network, and the dtype in which devices add up their gradients."""

import functools
import math
from collections.abc import Callable
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

    The gradient of the result takes the dtype of x before it is multiplied. Where `out_dtype` is
    float32 and x is not, GPUs would otherwise multiply in TF32, at less than half the speed.

    Args:
        gradient_dtype: in which a device leaves its part of the kernel's gradient, and so the dtype
            in which the parts are added up over devices: float32, or None for the dtype of x.
        is_split: the positions are sharded although the mesh does not split the sequence.
    """
    # a kernel that is stored in the dtype of x could not have another gradient
    is_narrow = gradient_dtype in (None, x.dtype) or kernel.dtype == x.dtype
    kernel = kernel.astype(x.dtype) if is_narrow else kernel
    if is_narrow and out_dtype in (None, x.dtype):
        product: Callable = _product
    else:
        kernel_dtype = x.dtype if is_narrow else jnp.dtype(jnp.float32)
        product = functools.partial(
            _product_with_own_gradient, out_dtype=out_dtype, kernel_dtype=kernel_dtype
        )
    return product(x, kernel, num_in) if is_split else _over_rows(product, x, kernel, num_in)


def project_int8(x: Array, numbers: Array, scale: Array, num_in: int = 1) -> Array:
    """Contracts the last `num_in` dims of x with the first of a matrix that is kept in int8
    (llada_jax.models.int8), in the dtype of x.

    bfloat16 holds whole numbers up to 256 exactly, so the numbers are multiplied as they are and
    the product is scaled: a scaled matrix would be rounded, and would be one more array of its
    size. The matrix has no gradient.

    Args:
        scale: float32, its dims of inputs have size 1.
    """
    y = _over_rows(_int8_product, x, numbers, num_in)
    return (y.astype(jnp.float32) * scale.reshape(numbers.shape[num_in:])).astype(x.dtype)


def _over_rows(product: Callable, x: Array, kernel: Array, num_in: int) -> Array:
    """Returns product(x, kernel, num_in), done over all rows and positions at once where that is
    faster.
    """
    if not _merges_rows(jax.sharding.get_abstract_mesh()):
        return product(x, kernel, num_in)
    rows, outs = x.shape[: x.ndim - num_in], kernel.shape[num_in:]
    flat_x, flat_kernel = x.reshape(math.prod(rows), -1), kernel.reshape(-1, math.prod(outs))
    return product(flat_x, flat_kernel, 1).reshape(*rows, *outs)


def _merges_rows(mesh: AbstractMesh) -> bool:
    if mesh.empty or mesh.abstract_device is None:
        return jax.default_backend() == "cpu"
    return mesh.shape["sequence"] == 1 and mesh.abstract_device.platform == "cpu"


def _product(x: Array, kernel: Array, num_in: int, out_dtype: Any = None) -> Array:
    return jnp.tensordot(x, kernel.astype(x.dtype), num_in, preferred_element_type=out_dtype)


# The gradient of a kernel that was cast has the dtype of the cast, and the partitioner adds up the
# parts of the devices before they are cast back. Only a rule of our own has the product of the
# backward pass in float32; a cast of its result would come after each part was rounded.
@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _product_with_own_gradient(
    x: Array, kernel: Array, num_in: int, out_dtype: Any, kernel_dtype: Any
) -> Array:
    return _product(x, kernel, num_in, out_dtype)


def _forward(
    x: Array, kernel: Array, num_in: int, out_dtype: Any, kernel_dtype: Any
) -> tuple[Array, tuple[Array, Array]]:
    # cast here, so that the backward pass reads what the forward pass has gathered
    kernel = kernel.astype(x.dtype)
    return _product(x, kernel, num_in, out_dtype), (x, kernel)


def _backward(
    num_in: int, out_dtype: Any, kernel_dtype: Any, saved: tuple[Array, Array], grad: Array
) -> tuple[Array, Array]:
    x, kernel = saved
    grad, rows = grad.astype(x.dtype), tuple(range(x.ndim - num_in))
    grad_kernel = jnp.tensordot(x, grad, (rows, rows), preferred_element_type=kernel_dtype)
    return _gradient_of_x(kernel, grad, num_in), grad_kernel


_product_with_own_gradient.defvjp(_forward, _backward)


def _gradient_of_x(kernel: Array, grad: Array, num_in: int) -> Array:
    """Returns the gradient of x from that of its product with the kernel."""
    axes = (tuple(range(num_in - kernel.ndim, 0)), tuple(range(num_in, kernel.ndim)))
    return jnp.tensordot(grad, kernel.astype(grad.dtype), axes)


# A rule of our own here too: the backward pass reads the kernel as int8. Without recomputation
# each layer would otherwise leave it a copy in the dtype of x, which is the whole network again.
@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _int8_product(x: Array, numbers: Array, num_in: int) -> Array:
    return _product(x, numbers, num_in)


def _int8_forward(x: Array, numbers: Array, num_in: int) -> tuple[Array, Array]:
    return _int8_product(x, numbers, num_in), numbers


def _int8_backward(num_in: int, numbers: Array, grad: Array) -> tuple[Array, None]:
    return _gradient_of_x(numbers, grad, num_in), None


_int8_product.defvjp(_int8_forward, _int8_backward)

"""Attention to rows that the mesh splits: the same as to whole rows, on eight devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import fast_compilation
from support.networks import perturbed, variant

from llada_jax.cluster.sharding import AXES, batch_sharding, make_mesh
from llada_jax.errors import UserError
from llada_jax.masks import BIDIRECTIONAL, CAUSAL, Mask
from llada_jax.models import attention
from llada_jax.models.attention import (
    IN_PIECES,
    attend,
    attend_in_pieces,
    triton_attention,
    xla_attention,
)
from llada_jax.models.model import make_model, parameter_shardings
from llada_jax.models.splash import splash_attention
from llada_jax.models.split_rows import exchange_for, exchanged_heads

B, T, H = 2, 512, 16
BLOCKS = Mask(block_length=48)
# Documents and padding that begin in the middle of a device's columns; one device of four holds
# nothing but padding of the second row.
PACKED = np.array([[1] * 200 + [2] * 312, [1] * 70 + [2] * 230 + [0] * 212])
PADDED = np.array([[1] * 512, [1] * 300 + [0] * 212])


def mesh_of(**sizes):
    return make_mesh({**dict.fromkeys(AXES, 1), **sizes}, devices=jax.devices())


def arrays_of(num_heads, num_kv_heads, *, rows=B, length=T):
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, out_grad = (
        jax.random.normal(key, (rows, length, heads, H))
        for key, heads in zip(keys, (num_heads, num_kv_heads, num_kv_heads, num_heads), strict=True)
    )
    return (q, k, v), out_grad


def outputs_and_gradients(attend_to, arrays, out_grad, segments, compiler_options=None):
    """Returns [output where it is read, gradients of q, k and v]."""
    ids = None if segments is None else jnp.asarray(segments, jnp.int32)
    is_read = True if segments is None else (ids > 0)[:, :, None, None]

    def loss(q, k, v):
        out = attend_to(q, k, v, ids)
        return jnp.sum(out * jnp.where(is_read, out_grad, 0)), jnp.where(is_read, out, 0)

    function = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)
    (_, out), grads = jax.jit(function, compiler_options=compiler_options)(*arrays)
    return [out, *grads]


def check(name, mask, segments, heads, sizes, **changes):
    """Compares attention over a mesh with the reference on one device."""
    arrays, out_grad = arrays_of(*heads, **changes)
    whole = functools.partial(xla_attention, mask=mask)
    expected = outputs_and_gradients(whole, arrays, out_grad, segments)
    split = functools.partial(attend, implementation=name, mask=mask)
    with jax.set_mesh(mesh_of(**sizes)):
        found = outputs_and_gradients(split, arrays, out_grad, segments)
    for what, one, other in zip(("out", "q", "k", "v"), found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=3e-5, err_msg=what)


@pytest.mark.parametrize(
    ("name", "mask", "segments", "heads", "sizes"),
    [
        ("xla", BIDIRECTIONAL, PACKED, (4, 2), {"sequence": 4, "data": 2}),
        ("xla", CAUSAL, None, (4, 4), {"sequence": 4, "tensor": 2}),
        # more devices than key/value heads, and than rows
        (IN_PIECES, BLOCKS, PACKED, (4, 1), {"sequence": 2, "fsdp": 4}),
    ],
    ids=lambda value: str(value)[:24],
)
def test_the_reference_attends_from_the_columns_of_each_device(name, mask, segments, heads, sizes):
    check(name, mask, segments, heads, sizes)


def test_rows_that_the_devices_do_not_divide_are_left_to_xla():
    check("xla", BIDIRECTIONAL, None, (2, 2), {"sequence": 8}, length=12)


# (kernel, mask, segments, heads of all devices, mesh, how rows are brought together)
KERNELS = [
    ("splash", BIDIRECTIONAL, PACKED, (4, 1), {"sequence": 4, "data": 2}, "keys"),
    ("splash", CAUSAL, PACKED, (8, 4), {"sequence": 2, "tensor": 2, "data": 2}, "heads"),
    ("splash", BLOCKS, None, (4, 4), {"sequence": 4, "data": 2}, "heads"),
    ("triton", BIDIRECTIONAL, PACKED, (4, 4), {"sequence": 4, "fsdp": 2}, "heads"),
    ("cudnn", BIDIRECTIONAL, PADDED, (4, 1), {"sequence": 4, "data": 2}, "keys"),
    ("cudnn", CAUSAL, PADDED, (8, 4), {"sequence": 4, "data": 2}, "heads"),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "mask", "segments", "heads", "sizes", "exchange"),
    KERNELS,
    ids=[f"{name}-{exchange}-{number}" for number, (name, *_, exchange) in enumerate(KERNELS)],
)
def test_a_kernel_attends_to_split_rows_as_to_whole_ones(
    monkeypatch, name, mask, segments, heads, sizes, exchange
):
    """The accelerators' kernels are interpreted; cuDNN's, which needs a GPU, is computed by XLA."""
    for kernel in (splash_attention, triton_attention):
        interpreted = functools.partial(kernel, interpret=True)
        monkeypatch.setitem(attention.IMPLEMENTATIONS, kernel.__name__.split("_")[0], interpreted)
    real = jax.nn.dot_product_attention
    monkeypatch.setattr(
        jax.nn,
        "dot_product_attention",
        lambda *args, implementation, **kwargs: real(*args, implementation="xla", **kwargs),
    )
    tensor = sizes.get("tensor", 1)
    per_device = {"num_heads": heads[0] // tensor, "num_kv_heads": heads[1] // tensor}
    assert exchange_for(name, mask, **per_device, num_parts=sizes["sequence"]) == exchange
    check(name, mask, segments, heads, sizes)


@pytest.mark.slow
def test_rows_of_32k_tokens_equal_a_float64_softmax(monkeypatch):
    """One head, eight devices of 4,096 columns; some queries are compared, and the gradients of
    what these queries read."""
    length, segments = 2**15, np.repeat([1, 2, 0], [9_000, 23_000, 768])[None]
    (q, k, v), _ = arrays_of(1, 1, rows=1, length=length)
    read = np.array([0, 8_999, 9_000, 15_000, 31_999])
    out_grad = np.zeros((1, length, 1, H), np.float32)
    out_grad[0, read] = np.random.default_rng(1).normal(size=(len(read), 1, H))
    # small enough for a cache
    pieces = functools.partial(attend_in_pieces, most_scores=2**20)
    monkeypatch.setattr(attention, "attend_in_pieces", pieces)
    with jax.set_mesh(mesh_of(sequence=8)):
        out, *grads = outputs_and_gradients(
            functools.partial(attend, implementation="xla", mask=BIDIRECTIONAL),
            (q, k, v),
            out_grad,
            segments,
            fast_compilation.WITH_LLVM_PASSES,
        )
    # the softmax of the rows that are read, and its derivative by hand
    q64, k64, v64, g64 = (np.asarray(x, np.float64)[0, :, 0] for x in (q, k, v, out_grad))
    scores = q64[read] @ k64.T * H**-0.5
    scores[segments[0, read][:, None] != segments] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    np.testing.assert_allclose(np.asarray(out)[0, read, 0], weights @ v64, atol=1e-5)
    weights_grad = g64[read] @ v64.T
    mean = (weights * weights_grad).sum(-1, keepdims=True)
    scores_grad = weights * (weights_grad - mean) * H**-0.5
    q_grad = np.zeros_like(q64)
    q_grad[read] = scores_grad @ k64
    for grad, expected in zip(
        grads, (q_grad, scores_grad.T @ q64[read], weights.T @ g64[read]), strict=True
    ):
        np.testing.assert_allclose(np.asarray(grad)[0, :, 0], expected, atol=1e-5)


@pytest.mark.slow
def test_a_network_says_the_same_of_packed_rows_that_devices_share():
    """Scores of tokens and gradients; positions begin again in each document, and the embedding and
    the head are exchanged too."""
    model = make_model(variant(d_model=48, vocab_size=96), attention="xla", remat="dots")
    params, rng = perturbed(model), np.random.default_rng(0)
    tokens = rng.integers(0, 96, (4, 24)).astype(np.int32)
    segments = np.repeat([[1, 2, 0]], [9, 10, 5], axis=1).repeat(4, 0).astype(np.int32)
    positions = np.concatenate([np.arange(9), np.arange(10), np.zeros(5)]).astype(np.int32)
    weights = jnp.asarray(rng.normal(size=(4, 24)) * (segments > 0), jnp.float32)

    @jax.jit
    def scores(params, tokens):
        def loss(params):
            nll = model.nll_fn(
                params, tokens, tokens, segments > 0, segments, np.tile(positions, (4, 1))
            ).nll_BT
            return jnp.sum(nll * weights), nll

        return jax.value_and_grad(loss, has_aux=True)(params)

    expected = scores(params, tokens)
    mesh = mesh_of(fsdp=2, sequence=4)
    with jax.set_mesh(mesh):
        split = jax.tree.map(jax.device_put, params, parameter_shardings(model, mesh))
        assert split["embed"].sharding.shard_shape((96, 48)) == (96, 6)
        found = scores(split, jax.device_put(tokens, batch_sharding(mesh)))
    for (path, one), other in zip(
        jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(one, other, atol=2e-4, err_msg=jax.tree_util.keystr(path))


# ---- the choice


@pytest.mark.parametrize(
    ("name", "mask", "heads", "num_parts", "expected"),
    [
        ("splash", BIDIRECTIONAL, (32, 32), 8, "heads"),
        ("splash", BIDIRECTIONAL, (32, 32), 2, "heads"),
        ("splash", BIDIRECTIONAL, (32, 4), 2, "keys"),
        ("cudnn", BIDIRECTIONAL, (32, 4), 8, "keys"),
        ("cudnn", CAUSAL, (32, 4), 2, "heads"),
        ("triton", BIDIRECTIONAL, (32, 4), 4, "heads"),
        ("xla", CAUSAL, (32, 32), 64, "keys"),
        ("triton", BIDIRECTIONAL, (32, 4), 8, ""),
        ("splash", CAUSAL, (32, 4), 8, ""),
    ],
)
def test_the_exchange_is_the_possible_one_that_moves_less(name, mask, heads, num_parts, expected):
    per_device = dict(zip(("num_heads", "num_kv_heads"), heads, strict=True))
    assert exchange_for(name, mask, **per_device, num_parts=num_parts) == expected


def test_keys_of_all_parts_or_every_head_once():
    assert exchanged_heads("keys", 32, 4, 8) == 2 * 4 * 8
    assert exchanged_heads("heads", 32, 4, 8) == 32 + 4 + 4 + 32


def test_a_kernel_that_can_do_neither_is_refused_with_a_remedy():
    (q, k, v), _ = arrays_of(8, 4)
    with (
        jax.set_mesh(mesh_of(sequence=8)),
        pytest.raises(UserError, match="needs whole rows here, and 4 key/value heads .* a divisor"),
    ):
        attend(q, k, v, None, implementation="triton", mask=BIDIRECTIONAL)

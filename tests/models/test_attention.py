"""Every attention kernel against a float64 softmax over `may_attend`, and how one is chosen."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llada_jax.cluster.sharding import AXES, make_mesh
from llada_jax.errors import UserError
from llada_jax.masks import BIDIRECTIONAL, CAUSAL, Mask, may_attend
from llada_jax.models import attention
from llada_jax.models.attention import (
    IMPLEMENTATIONS,
    attend,
    choose,
    cudnn_attention,
    splash_attention,
    splash_head_mask,
    triton_attention,
    xla_attention,
)
from llada_jax.models.by_head import attention_by_head

B, T, H = 2, 256, 64
BLOCKS = Mask(block_length=32)
ODD_BLOCKS = Mask(block_length=48)  # does not divide the tiles of a kernel

# Ids of the segments of two rows: one document each, two documents, padding on either side.
SEGMENTS = {
    "whole": None,
    "packed": np.array([[1] * 100 + [2] * 156, [1] * 30 + [2] * 30 + [3] * 196]),
    "padded": np.array([[1] * 256, [1] * 200 + [0] * 56]),
    "left-padded": np.array([[0] * 100 + [1] * 156, [1] * 256]),
    "packed and padded": np.array([[1] * 100 + [2] * 156, [1] * 70 + [2] * 130 + [0] * 56]),
}


def inputs(num_heads, num_kv_heads, *, rows=B, length=T, head_dim=H, seed=0):
    rng = np.random.default_rng(seed)
    q = rng.normal(size=(rows, length, num_heads, head_dim)).astype(np.float32)
    k, v = (
        rng.normal(size=(rows, length, num_kv_heads, head_dim)).astype(np.float32) for _ in "kv"
    )
    return q, k, v


def allowed(mask, segments, length=T):
    """Returns what may be attended to, bool [rows or 1, length, length]."""
    segments = np.ones((1, length), int) if segments is None else np.asarray(segments)
    index = np.arange(length)
    return np.asarray(
        may_attend(
            mask,
            query_segment=segments[:, :, None],
            key_segment=segments[:, None, :],
            query_index=index[:, None],
            key_index=index[None, :],
        )
    )


def reference(q, k, v, segments, mask, out_grad):
    """Returns attention in float64 and plain numpy, and the gradients of sum(out * out_grad)."""
    q, k, v, out_grad = (np.asarray(x, np.float64) for x in (q, k, v, out_grad))
    num_groups, scale = q.shape[2] // k.shape[2], q.shape[-1] ** -0.5
    k, v = (np.repeat(x, num_groups, axis=2) for x in (k, v))
    scores = np.einsum("btnh,bsnh->bnts", q, k) * scale
    scores = np.where(allowed(mask, segments, q.shape[1])[:, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    out = np.einsum("bnts,bsnh->btnh", weights, v)
    # by hand: the derivative of a softmax is weights * (gradient - its mean under the weights)
    weights_grad = np.einsum("btnh,bsnh->bnts", out_grad, v)
    mean = (weights * weights_grad).sum(-1, keepdims=True)
    scores_grad = weights * (weights_grad - mean) * scale
    k_grad = np.einsum("bnts,btnh->bsnh", scores_grad, q)
    v_grad = np.einsum("bnts,btnh->bsnh", weights, out_grad)
    grouped = (*k.shape[:2], -1, num_groups, k.shape[3])
    return out, (
        np.einsum("bnts,bsnh->btnh", scores_grad, k),
        k_grad.reshape(grouped).sum(3),
        v_grad.reshape(grouped).sum(3),
    )


def check(kernel, arrays, segments, mask):
    """Compares outputs and gradients where they are read: not at padding."""
    q, k, v = arrays
    is_read = np.ones(q.shape[:2], bool) if segments is None else segments > 0
    out_grad = np.random.default_rng(1).normal(size=q.shape).astype(np.float32)
    out_grad = out_grad * is_read[:, :, None, None]
    ids = None if segments is None else jnp.asarray(segments, jnp.int32)

    def loss(q, k, v):
        out = kernel(q, k, v, ids, mask=mask)
        return jnp.sum(out * out_grad), out

    (_, out), grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    expected, expected_grads = reference(q, k, v, segments, mask, out_grad)
    np.testing.assert_allclose(np.asarray(out)[is_read], expected[is_read], atol=2e-5)
    for name, grad, expected_grad in zip("qkv", grads, expected_grads):
        np.testing.assert_allclose(grad, expected_grad, atol=2e-4, err_msg=name)


@pytest.mark.parametrize("mask", [BIDIRECTIONAL, CAUSAL, BLOCKS, ODD_BLOCKS])
@pytest.mark.parametrize("segments", SEGMENTS)
@pytest.mark.parametrize("ours", [xla_attention, attention_by_head])
def test_the_reference_follows_may_attend(ours, segments, mask):
    check(ours, inputs(4, 2, head_dim=16), SEGMENTS[segments], mask)


@pytest.mark.slow
@pytest.mark.parametrize("ours", [xla_attention, attention_by_head])
@settings(max_examples=10, derandomize=True)
@given(
    segments=st.lists(
        st.lists(st.integers(0, 3), min_size=9, max_size=9), min_size=2, max_size=2
    ).map(np.array),
    mask=st.builds(Mask, causal=st.booleans(), block_length=st.integers(0, 10)),
)
def test_the_reference_follows_may_attend_for_any_segments(ours, segments, mask):
    """Segments in any order, also torn ones, and rows of nothing but padding."""
    check(ours, inputs(2, 1, length=9, head_dim=4), segments, mask)


# One case for each form in which a mask reaches a kernel; all of them would take minutes.
INTERPRETED = [
    (splash_attention, "packed and padded", BIDIRECTIONAL, 4),
    (splash_attention, "left-padded", CAUSAL, 2),
    (splash_attention, "packed and padded", BLOCKS, 4),
    (splash_attention, "whole", ODD_BLOCKS, 2),
    (splash_attention, "whole", BIDIRECTIONAL, 2),
    (triton_attention, "packed and padded", BIDIRECTIONAL, 4),
    (triton_attention, "left-padded", CAUSAL, 2),
    (triton_attention, "packed and padded", CAUSAL, 4),
    (triton_attention, "whole", BIDIRECTIONAL, 2),
    (triton_attention, "whole", Mask(causal=True, block_length=32), 2),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kernel", "segments", "mask", "num_heads"),
    INTERPRETED,
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_kernels_follow_may_attend(kernel, segments, mask, num_heads):
    """With two key/value heads, so that four query heads are grouped."""
    interpreted = functools.partial(kernel, interpret=True)
    check(interpreted, inputs(num_heads, 2), SEGMENTS[segments], mask)


@settings(max_examples=60, derandomize=True)
@given(
    mask=st.builds(Mask, causal=st.booleans(), block_length=st.integers(0, 300)),
    rows=st.tuples(st.integers(0, 1), st.integers(0, 1)),
)
def test_the_tiles_of_a_splash_mask_are_those_of_may_attend(mask, rows):
    tile_of = [slice(number * 128, (number + 1) * 128) for number in rows]
    tile = splash_head_mask(mask, T, T)[tile_of[0], tile_of[1]]
    np.testing.assert_array_equal(tile, allowed(mask, None)[0][tile_of[0], tile_of[1]])


def test_a_splash_mask_of_blocks_skips_hidden_tiles_and_stores_equal_tiles_once():
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask_info as info

    def tiles(mask):
        heads = masks.MultiHeadMask([splash_head_mask(mask, 4096, 4096)] * 8)
        return info.process_mask(heads, (512, 512))[0]

    assert splash_head_mask(BLOCKS, 4096, 4096) is splash_head_mask(
        Mask(block_length=32), 4096, 4096
    )
    seen = tiles(BLOCKS)
    assert seen.partial_mask_blocks.shape == (1, 512, 512), "the diagonal, the same in all rows"
    # 0 hidden, 1 partial, 2 visible; tiles that lie behind the diagonal are not visited
    counts = np.bincount(np.ravel(seen.block_mask), minlength=3)
    assert counts[1:].tolist() == [8, 8 * 7 // 2]
    assert tiles(BIDIRECTIONAL).partial_mask_blocks is None


@pytest.mark.parametrize(
    ("mask", "length", "dtype", "num_kernels"),
    [
        (BIDIRECTIONAL, 4096, jnp.bfloat16, 2),
        # the gradient of the queries would be written once for each of four tiles of keys
        (BIDIRECTIONAL, 8192, jnp.bfloat16, 3),
        (CAUSAL, 4096, jnp.bfloat16, 3),
        (BLOCKS, 4096, jnp.bfloat16, 3),
        # the tiles would not fit the memory of a kernel
        (BIDIRECTIONAL, 4096, jnp.float32, 3),
    ],
)
def test_splash_has_one_backward_kernel_for_short_rows_that_see_all(
    mask, length, dtype, num_kernels
):
    shapes = [jax.ShapeDtypeStruct((1, length, 1, 128), dtype)] * 3

    def loss(q, k, v):
        return splash_attention(q, k, v, None, mask=mask).astype(jnp.float32).sum()

    traced = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(*shapes)
    assert str(traced).count("pallas_call[") == num_kernels


@pytest.mark.slow
def test_two_tiles_of_keys_share_the_gradient_of_the_queries():
    arrays = inputs(1, 1, rows=1, length=4096)
    segments = jnp.asarray(np.array([[1] * 1500 + [2] * 2000 + [0] * 596]))
    is_read = (segments > 0)[:, :, None, None]

    def gradients(kernel):
        def loss(q, k, v):
            out = kernel(q, k, v, segments, mask=BIDIRECTIONAL)
            return jnp.sum(jnp.where(is_read, jnp.sin(out), 0))

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*arrays)

    interpreted = functools.partial(splash_attention, interpret=True)
    for grad, expected in zip(gradients(interpreted), gradients(xla_attention), strict=True):
        np.testing.assert_allclose(grad, expected, atol=2e-5)


def test_splash_refuses_a_length_that_its_tiles_do_not_divide():
    with pytest.raises(UserError, match="multiple of 128, not 100; set config.model.attention"):
        splash_attention(*inputs(2, 2, length=100), None, mask=BIDIRECTIONAL)


@pytest.mark.parametrize("kernel", [triton_attention, cudnn_attention])
def test_kernels_refuse_masks_that_they_cannot_express(kernel):
    with pytest.raises(UserError, match="cannot express blocks, .* block_length=32; set config"):
        kernel(*inputs(2, 2), None, mask=BLOCKS)


@pytest.mark.parametrize("mask", [BIDIRECTIONAL, CAUSAL])
@pytest.mark.parametrize("segments", ["whole", "padded"])
def test_cudnn_attention_is_handed_lengths_and_never_a_mask(monkeypatch, segments, mask):
    """cuDNN needs a GPU; what jax.nn is asked to let it compute is computed here by XLA."""
    seen = {}
    real = jax.nn.dot_product_attention

    def stand_in(q, k, v, *, implementation, **kwargs):
        seen.update(kwargs, implementation=implementation)
        return real(q, k, v, implementation="xla", **kwargs)

    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    check(cudnn_attention, inputs(4, 2), SEGMENTS[segments], mask)
    assert seen["implementation"] == "cudnn"
    assert not {"mask", "bias"} & set(seen)
    if segments == "padded":
        np.testing.assert_array_equal(seen["query_seq_lengths"].shape, [B])
    else:
        assert seen["query_seq_lengths"] is None


def leaves_padding_unwritten(real):
    """Returns a kernel like cuDNN's in memory full of NaN: what lies beyond the lengths is NaN, in
    its output and in its gradients.
    """

    def beyond_is_nan(x, lengths):
        beyond = jnp.arange(x.shape[1]) >= lengths[:, None]
        return jnp.where(beyond[:, :, None, None], jnp.nan, x)

    @jax.custom_vjp
    def kernel(q, k, v, lengths):
        given = {"query_seq_lengths": lengths, "key_value_seq_lengths": lengths}
        return beyond_is_nan(real(q, k, v, implementation="xla", **given), lengths)

    def forward(q, k, v, lengths):
        return kernel(q, k, v, lengths), (q, k, v, lengths)

    def backward(saved, out_grad):
        q, k, v, lengths = saved
        given = {"query_seq_lengths": lengths, "key_value_seq_lengths": lengths}
        _, pull = jax.vjp(lambda *x: real(*x, implementation="xla", **given), q, k, v)
        return (*(beyond_is_nan(grad, lengths) for grad in pull(out_grad)), None)

    kernel.defvjp(forward, backward)
    return lambda q, k, v, *, query_seq_lengths, **_: kernel(q, k, v, query_seq_lengths)


@pytest.mark.slow
def test_what_cudnn_leaves_unwritten_at_padding_reaches_neither_output_nor_gradients(monkeypatch):
    """Not even where the inputs are NaN there, as after a layer that did not write them."""
    stand_in = leaves_padding_unwritten(jax.nn.dot_product_attention)
    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    segments = np.array([[1] * 256, [1] * 200 + [0] * 56])
    q, k, v = inputs(4, 2)
    # with gradients that are 0 at padding, as the reference has them
    check(cudnn_attention, (q, k, v), segments, BIDIRECTIONAL)
    full_of_nan = [np.where((segments > 0)[:, :, None, None], x, np.nan) for x in (q, k, v)]
    ids = jnp.asarray(segments, jnp.int32)
    weight = jnp.ones((H, H), jnp.float32)

    def loss(weight, q, k, v):
        # as a network does: the gradient of a matrix sums over all positions
        q, k, v = (x @ weight for x in (q, k, v))
        return cudnn_attention(q, k, v, ids, mask=BIDIRECTIONAL).sum()

    clean = jax.grad(loss)(weight, q, k, v)
    assert np.isfinite(clean).all()
    out = cudnn_attention(*full_of_nan, ids, mask=BIDIRECTIONAL)
    np.testing.assert_array_equal(out, cudnn_attention(q, k, v, ids, mask=BIDIRECTIONAL))
    for grad in jax.grad(lambda *x: cudnn_attention(*x, ids, mask=BIDIRECTIONAL).sum(), (0, 1, 2))(
        *full_of_nan
    ):
        assert np.isfinite(grad).all()


@pytest.mark.slow
def test_a_kernel_on_a_mesh_runs_per_device_and_equals_the_reference(monkeypatch):
    interpreted = functools.partial(splash_attention, interpret=True)
    monkeypatch.setitem(attention.IMPLEMENTATIONS, "splash", interpreted)
    q, k, v = inputs(4, 2, rows=4)
    segments = np.tile(SEGMENTS["packed and padded"], (2, 1))
    mesh = make_mesh({**dict.fromkeys(AXES, 1), "data": 4, "tensor": 2}, devices=jax.devices())
    with jax.set_mesh(mesh):
        out = jax.jit(functools.partial(attend, implementation="splash", mask=BLOCKS))(
            q, k, v, jnp.asarray(segments)
        )
    expected, _ = reference(q, k, v, segments, BLOCKS, q)
    np.testing.assert_allclose(np.asarray(out)[segments > 0], expected[segments > 0], atol=2e-5)


# ---- the choice


def chosen(name="auto", **changes):
    request = {
        "platform": "gpu",
        "packed": False,
        "mask": BIDIRECTIONAL,
        "sequence_length": 4096,
        "head_dim": 128,
        "dtype": "bfloat16",
    }
    return choose(name, **{**request, **changes})


@pytest.mark.parametrize(
    ("expected", "changes"),
    [
        ("xla_by_head", {"platform": "cpu", "packed": True}),
        ("xla", {"platform": "cpu", "sequence_length": 255}),
        ("splash", {"platform": "tpu", "packed": True}),
        ("splash", {"platform": "tpu", "packed": True, "mask": BLOCKS}),
        ("splash", {"platform": "tpu", "dtype": "float32", "head_dim": 256}),
        ("xla", {"platform": "tpu", "sequence_length": 100}),
        ("cudnn", {}),
        ("cudnn", {"mask": CAUSAL}),
        ("triton", {"platform": "cuda", "packed": True}),
        ("xla", {"sequence_length": 64}),
        ("xla", {"dtype": "float32"}),
        ("xla", {"head_dim": 256}),
        ("xla", {"head_dim": 60}),
        ("xla", {"mask": BLOCKS}),
        ("xla", {"mask": BLOCKS, "packed": True}),
        ("triton", {"mask": Mask(causal=True, block_length=32), "packed": True}),
    ],
    ids=str,
)
def test_auto_follows_the_platform_of_the_mesh_and_the_mask(expected, changes):
    assert chosen(**changes) == expected
    assert chosen("xla", **changes) == "xla"


@pytest.mark.parametrize(
    ("name", "changes", "sentence"),
    [
        ("splash", {}, "'splash' runs on tpu, and the mesh is of gpu devices; set config.model"),
        ("triton", {"platform": "cpu"}, "'triton' runs on gpu, and the mesh is of cpu devices"),
        ("triton", {"mask": BLOCKS}, "'triton' cannot express blocks, and the mask has block_len"),
        ("cudnn", {"mask": BLOCKS}, "'cudnn' cannot express blocks"),
        ("cudnn", {"packed": True}, "attend_across_documents=False asks; set config.model.atten"),
    ],
)
def test_a_kernel_that_cannot_do_it_is_refused_with_a_remedy(name, changes, sentence):
    with pytest.raises(UserError) as error:
        chosen(name, **changes)
    assert sentence in str(error.value)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_a_kernel_is_taken_by_name_where_it_can_do_it(name):
    platform = {"splash": "tpu", "xla": "cpu"}.get(name, "gpu")
    assert chosen(name, platform=platform) == name

"""Every attention kernel against a float64 softmax over `may_attend`, and how one is chosen."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.attention import (
    BLOCKS,
    ODD_BLOCKS,
    SEGMENTS,
    T,
    allowed,
    check,
    inputs,
    reference,
)

from llada_jax.cluster.sharding import AXES, make_mesh
from llada_jax.errors import UserError
from llada_jax.masks import BIDIRECTIONAL, CAUSAL, Mask
from llada_jax.models import attention
from llada_jax.models.attention import (
    IMPLEMENTATIONS,
    attend,
    check_shape,
    choose,
    cudnn_attention,
    triton_attention,
    xla_attention,
)
from llada_jax.models.by_head import attention_by_head
from llada_jax.models.splash import splash_attention, splash_head_mask


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
        ("cudnn", {"packed": True}, "attend_across_documents=False and config.data.split"),
    ],
)
def test_a_kernel_that_cannot_do_it_is_refused_with_a_remedy(name, changes, sentence):
    with pytest.raises(UserError) as error:
        chosen(name, **changes)
    assert sentence in str(error.value)


@pytest.mark.parametrize(
    ("name", "changes", "sentence"),
    [
        ("splash", {"sequence_length": 1000}, "a sequence length that is a multiple of 128, not 1"),
        ("cudnn", {"dtype": "float32"}, "needs numbers of 16 bits, not float32; set config.model"),
        ("cudnn", {"head_dim": 60}, "heads of a multiple of 8 and at most 256, not 60"),
        ("cudnn", {"head_dim": 264}, "heads of a multiple of 8 and at most 256, not 264"),
        ("cudnn", {"sequence_length": 1001}, "an even sequence length, not 1001"),
        (
            "triton",
            {"sequence_length": 1000},
            "'triton' needs a sequence length that is a multiple",
        ),
        ("triton", {"sequence_length": 96}, "a multiple of 128, not 96"),
        ("triton", {"head_dim": 136}, "heads of at most 128 in bfloat16, not 136"),
        ("triton", {"dtype": "float32"}, "at most 64 in float32, not 128; set config.model.att"),
    ],
)
def test_a_kernel_by_name_refuses_arrays_that_it_never_takes(name, changes, sentence):
    arrays = {"sequence_length": 4096, "head_dim": 128, "dtype": "bfloat16"}
    check_shape(name, **arrays)
    with pytest.raises(UserError) as error:
        check_shape(name, **{**arrays, **changes})
    assert sentence in str(error.value)


@pytest.mark.parametrize(
    ("name", "sequence_length", "head_dim", "dtype"),
    [
        ("splash", 384, 6, "float32"),
        ("cudnn", 1000, 256, "bfloat16"),
        ("triton", 384, 10, "bfloat16"),
        ("triton", 64, 64, "float32"),
        ("xla", 1001, 1000, "float32"),
        ("xla_by_head", 1001, 1000, "float32"),
    ],
)
def test_a_kernel_by_name_takes_what_the_compilers_take(name, sequence_length, head_dim, dtype):
    check_shape(name, sequence_length=sequence_length, head_dim=head_dim, dtype=dtype)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_a_kernel_is_taken_by_name_where_it_can_do_it(name):
    platform = {"splash": "tpu", "xla": "cpu"}.get(name, "gpu")
    assert chosen(name, platform=platform) == name

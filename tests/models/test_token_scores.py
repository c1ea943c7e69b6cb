"""Logits of the positions that carry loss alone, against sums in float64 over all of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llada_jax.cluster.sharding import make_mesh
from llada_jax.models.token_scores import ROWS, _Head, _pieces, _tokens, token_scores

B, T, D, V = 16, 8, 6, 21
ROOM = 10  # of the 16 positions of each of eight devices


def by_hand(x_BTD, kernel_DV, targets_BT, where_BT, weight_BT):
    """Returns nll [B, T], and the gradients of the weighted sum by x and the kernel, in float64."""
    logits_BTV = x_BTD.astype(np.float64) @ kernel_DV.astype(np.float64)
    p_BTV = np.exp(logits_BTV - logits_BTV.max(axis=-1, keepdims=True))
    p_BTV /= p_BTV.sum(axis=-1, keepdims=True)
    is_target_BTV = np.arange(V) == targets_BT[..., None]
    nll_BT = -np.log(p_BTV[is_target_BTV].reshape(B, T)) * where_BT
    grad_BTV = (p_BTV - is_target_BTV) * (where_BT * weight_BT)[..., None]
    return nll_BT, grad_BTV @ kernel_DV.T, np.einsum("btd,btv->dv", x_BTD, grad_BTV)


def places(counts, num_rows, num_columns):
    """Returns where_BT with so many True in each device's part of two rows or of two halves of
    four.
    """
    rng = np.random.default_rng(0)
    where_BT = np.zeros((B, T), bool)
    parts = [
        where_BT[r : r + num_rows, c : c + num_columns]
        for r in range(0, B, num_rows)
        for c in range(0, T, num_columns)
    ]
    for part, count in zip(parts, counts, strict=True):
        part[...] = rng.permutation(np.arange(part.size) < count).reshape(part.shape)
    return where_BT


@pytest.mark.parametrize(
    ("mesh", "num_rows", "num_columns"),
    [({"fsdp": 8}, 2, T), ({"data": 2, "fsdp": 2, "tensor": 2}, 4, T // 2)],
)
@pytest.mark.parametrize("nll_chunk", [T, 2])
def test_scores_and_gradients_are_those_of_all_positions_however_many_count(
    mesh, num_rows, num_columns, nll_chunk
):
    rng = np.random.default_rng(1)
    x_BTD, kernel_DV = np.float32(rng.normal(size=(B, T, D))), np.float32(rng.normal(size=(D, V)))
    targets_BT, weight_BT = rng.integers(0, V, (B, T)), np.float32(rng.random((B, T)))
    asked = []

    def capacity(rows, length, ways):
        asked.append((rows, length, ways))
        return ROOM

    def loss(x_BTD, kernel_DV, where_BT):
        scores = token_scores(
            x_BTD,
            targets_BT,
            where_BT,
            kernel_DV,
            dtype=jnp.float32,
            gradient_dtype=None,
            nll_chunk=nll_chunk,
            capacity=capacity,
        )
        return jnp.sum(weight_BT * scores.nll_BT), scores

    counts = {
        "none": [0] * 8,
        "all": [16] * 8,
        "exactly as many as there is room for": [ROOM] * 8,
        "one more": [ROOM + 1] * 8,
        "too many on one device alone": [3, ROOM, 16, 0, 7, 1, ROOM - 1, 5],
    }
    with jax.set_mesh(make_mesh(mesh)):
        run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
        for what, numbers in counts.items():
            where_BT = places(numbers, num_rows, num_columns)
            (_, scores), grads = run(x_BTD, kernel_DV, where_BT)
            expected = by_hand(x_BTD, kernel_DV, targets_BT, where_BT, weight_BT)
            for ours, theirs in zip((scores.nll_BT, *grads), expected, strict=True):
                np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5, err_msg=what)
            best_BT = np.argmax(x_BTD @ kernel_DV, axis=-1)
            np.testing.assert_array_equal(
                scores.is_correct_BT, (best_BT == targets_BT) & where_BT, err_msg=what
            )
    assert set(asked) == {(num_rows, num_columns, B // num_rows)}


@pytest.mark.parametrize("num_devices", [1, 2])
def test_a_piece_of_the_vocabulary_is_a_run_of_neighbours_on_every_device(num_devices):
    head = _Head(num_pieces=3, names=ROWS, dtype=jnp.float32, gradient_dtype=None)
    num_tokens = 90  # padded to 96: three pieces of 32
    kernel_DV = jnp.arange(2.0 * num_tokens).reshape(2, num_tokens)
    with jax.set_mesh(make_mesh({"fsdp": -1, "tensor": num_devices})):
        token_nC, kernel_nDC = _tokens(head, num_tokens), _pieces(head, kernel_DV)
    assert sorted(token_nC.ravel().tolist()) == list(range(96))
    runs = np.asarray(token_nC).reshape(3, num_devices, -1)
    np.testing.assert_array_equal(np.diff(runs, axis=2), 1)
    # and the part of a device stays on it
    assert all(np.all(runs[:, i] // (96 // num_devices) == i) for i in range(num_devices))
    for token_C, kernel_DC in zip(token_nC, kernel_nDC, strict=True):
        exists = token_C < num_tokens
        np.testing.assert_array_equal(kernel_DC[:, exists], kernel_DV[:, token_C[exists]])


def products_of_every_step(jaxpr):
    """Returns the matrix products of a program, except those under a condition."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            found.append(equation)
        elif equation.primitive.name != "cond":
            for inner in jax.tree.leaves(list(equation.params.values())):
                if hasattr(inner, "jaxpr"):
                    found += products_of_every_step(inner.jaxpr)
    return found


def test_logits_of_the_other_positions_are_computed_only_where_there_is_no_room():
    def scores(x_BTD, targets_BT, where_BT, kernel_DV, capacity):
        return token_scores(
            x_BTD,
            targets_BT,
            where_BT,
            kernel_DV,
            dtype=jnp.float32,
            gradient_dtype=None,
            nll_chunk=T,
            capacity=capacity,
        )

    arguments = (
        jnp.zeros((B, T, D)),
        jnp.zeros((B, T), int),
        jnp.zeros((B, T), bool),
        jnp.zeros((D, V)),
    )

    def positions_multiplied(capacity):
        jaxpr = jax.make_jaxpr(functools.partial(scores, capacity=capacity))(*arguments).jaxpr
        return [product.outvars[0].aval.size // V for product in products_of_every_step(jaxpr)]

    assert positions_multiplied(None) == [B * T]
    assert positions_multiplied(lambda rows, length, ways: B * T) == [B * T]
    # what the rest takes is inside of the condition
    assert positions_multiplied(lambda rows, length, ways: 70) == [70]

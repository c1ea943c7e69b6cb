"""Schedules against closed forms, optimizers against float64 numpy, parameter groups by path."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llada_jax.cluster.sharding import make_mesh
from llada_jax.config import default_config
from llada_jax.errors import UserError
from llada_jax.models.model import make_model
from llada_jax.models.transformer import Architecture
from llada_jax.objectives.masked_diffusion import masked_diffusion
from llada_jax.training.optim import OPTIMIZERS, by_path, make_optimizer, make_schedule
from llada_jax.training.state import abstract_metrics, abstract_state, create_state
from llada_jax.training.step import make_train_step


def schedule_of(num_steps=1000, tokens_per_step=1, **changes):
    knobs = {**default_config().schedule.to_dict(), **changes}
    return make_schedule(**knobs, num_steps=num_steps, tokens_per_step=tokens_per_step)


def test_the_published_schedule_at_its_published_token_counts():
    tokens_per_step = 1280 * 4096
    rate = schedule_of(name="llada", tokens_per_step=tokens_per_step)
    step_at = lambda tokens: tokens / tokens_per_step  # noqa: E731
    assert float(rate(0)) == pytest.approx(4e-4 / 2000)
    assert float(rate(999)) == pytest.approx(2e-4)
    for tokens, expected in [
        (1e11, 4e-4),
        (1.19e12, 4e-4),
        (1.21e12, 1e-4),
        (1.99e12, 1e-4),
        (2.3e12, 1e-5),
        (3e12, 1e-5),
    ]:
        assert float(rate(step_at(tokens))) == pytest.approx(expected, rel=1e-3), tokens
    assert float(rate(step_at(2.15e12))) == pytest.approx((1e-4 + 1e-5) / 2, rel=1e-3)


def test_a_stage_begins_with_the_first_step_behind_its_boundary():
    """1.2T tokens at 4e-4 are 1200 steps of a billion, and 0.8T more at 1e-4 are 800."""
    rate = schedule_of(name="llada", tokens_per_step=1e9, warmup_steps=0)
    rates = np.asarray(jax.vmap(rate)(jnp.arange(2301)), np.float64)
    assert (np.isclose(rates, 4e-4)).sum() == 1200
    assert (np.isclose(rates, 1e-4)).sum() == 801  # the decline starts from the same rate
    assert (np.diff(rates[2000:]) < 0).all()


def test_the_published_schedule_follows_tokens_not_steps():
    large, small = (
        schedule_of(name="llada", tokens_per_step=tokens, warmup_steps=0) for tokens in (1e7, 1e6)
    )
    for tokens in np.linspace(1e10, 2.29e12, 7):
        assert float(large(tokens / 1e7)) == pytest.approx(float(small(tokens / 1e6)), rel=1e-4)


def test_stages_may_end_at_whole_numbers_of_tokens_above_those_of_int32():
    stages = ((1_200_000_000_000, 4e-4, 4e-4), (2_000_000_000_000, 1e-4, 1e-5))
    whole, floats = (
        schedule_of(name="llada", stages=rows, tokens_per_step=tokens, warmup_steps=0)
        for rows, tokens in (
            (stages, 3 * 2**30),
            ([(float(until), *rates) for until, *rates in stages], 3.0 * 2**30),
        )
    )
    steps = jnp.arange(0, 800, 7)
    np.testing.assert_array_equal(jax.vmap(whole)(steps), jax.vmap(floats)(steps))
    assert float(whole(0)) == pytest.approx(4e-4)
    assert float(whole(799)) == pytest.approx(1e-5)


@pytest.mark.parametrize("shape", ["linear", "1-sqrt"])
def test_wsd_is_flat_and_then_decays_to_its_end(shape):
    rate = schedule_of(
        name="wsd",
        learning_rate=1.0,
        final_learning_rate=0.1,
        warmup_steps=10,
        decay_fraction=0.2,
        decay_shape=shape,
    )
    assert float(rate(4)) == pytest.approx(0.5)
    assert float(rate(10)) == float(rate(799)) == 1.0
    assert float(rate(999)) == pytest.approx(0.1)
    left = 0.5 if shape == "linear" else 1 - 0.5**0.5
    assert float(rate(899)) == pytest.approx(0.1 + 0.9 * left)


def test_cosine_and_constant():
    rate = schedule_of(name="cosine", learning_rate=1.0, final_learning_rate=0.2, warmup_steps=0)
    assert float(rate(499)) == pytest.approx(0.6)
    assert float(rate(999)) == pytest.approx(0.2)
    assert float(
        schedule_of(name="constant", learning_rate=0.3, warmup_steps=0)(12345)
    ) == pytest.approx(0.3)


PARAMS = {
    "blocks": {"q": np.ones((2, 3, 2, 2)), "attn_norm": np.ones((2, 3))},
    "embed": np.full((5, 3), 2.0),
}


def optimizer_of(schedule=lambda step: 0.1, **changes):
    knobs = default_config().optimizer.to_dict()
    for key in (
        "ema_decay",
        "gradient_accumulation",
        "gradient_dtype",
        "max_skipped_updates",
    ):  # the step's, not the optimizer's
        knobs.pop(key)
    return make_optimizer(schedule, **{**knobs, **changes})


def gradients(step):
    rng = np.random.default_rng(step)
    return jax.tree.map(lambda p: rng.normal(size=p.shape), PARAMS)


def run(optimizer, num_steps=5):
    params = jax.tree.map(jnp.float32, PARAMS)
    state = optimizer.init(params)
    for step in range(num_steps):
        updates, state = optimizer.update(jax.tree.map(jnp.float32, gradients(step)), state, params)
        params = jax.tree.map(jnp.add, params, updates)
    return params


@pytest.mark.parametrize(("first_moment", "tolerance"), [("float32", 2e-5), ("bfloat16", 1e-2)])
def test_adamw_with_clipping_equals_float64_numpy(first_moment, tolerance):
    b1, b2, eps, decay, rate = 0.9, 0.95, 1e-8, 0.1, 0.1
    params = jax.tree.map(np.array, PARAMS)
    mean, square = (jax.tree.map(np.zeros_like, PARAMS) for _ in range(2))
    for step in range(5):
        grads = gradients(step)
        norm = np.sqrt(sum(np.sum(g**2) for g in jax.tree.leaves(grads)))
        grads = jax.tree.map(lambda g, norm=norm: g / max(norm, 1.0), grads)
        mean = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, mean, grads)
        square = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g**2, square, grads)
        decays = {"blocks": {"q": decay, "attn_norm": 0.0}, "embed": decay}  # matrices only

        def advance(p, m, v, d, step=step):
            direction = (m / (1 - b1 ** (step + 1))) / (np.sqrt(v / (1 - b2 ** (step + 1))) + eps)
            return p - rate * (direction + d * p)

        params = jax.tree.map(advance, params, mean, square, decays)
    found = run(optimizer_of(first_moment_dtype=first_moment))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance), found, params)
    is_rounded = not np.allclose(found["embed"], params["embed"], rtol=2e-5)
    assert is_rounded == (first_moment == "bfloat16")


@pytest.mark.parametrize(
    ("name", "second_moments"), [("adamw", 24 + 6 + 15), ("lion", 0), ("muon", 6 + 15 + 3)]
)
def test_a_first_moment_in_bfloat16_takes_half_and_stays_so(name, second_moments):
    optimizer = optimizer_of(name=name, first_moment_dtype="bfloat16")
    params = jax.tree.map(jnp.float32, PARAMS)
    state = optimizer.init(params)

    def numbers(dtype):
        return sum(leaf.size for leaf in jax.tree.leaves(state) if leaf.dtype == dtype)

    assert (numbers(jnp.bfloat16), numbers(jnp.float32)) == (24 + 6 + 15, second_moments)
    updates, after = optimizer.update(params, state, params)
    dtypes = lambda tree: jax.tree.map(lambda leaf: leaf.dtype, tree)  # noqa: E731
    assert dtypes(after) == dtypes(state)
    assert dtypes(updates) == dtypes(params)


def test_lion_equals_float64_numpy():
    b1, b2, decay, rate = 0.9, 0.95, 0.1, 0.1
    params, mean = jax.tree.map(np.array, PARAMS), jax.tree.map(np.zeros_like, PARAMS)
    for step in range(5):
        grads = gradients(step)
        norm = np.sqrt(sum(np.sum(g**2) for g in jax.tree.leaves(grads)))
        grads = jax.tree.map(lambda g, norm=norm: g / max(norm, 1.0), grads)
        # b1 for the direction, b2 for what is kept (Chen et al., arXiv 2302.06675, algorithm 2)
        signs = jax.tree.map(lambda m, g: np.sign(b1 * m + (1 - b1) * g), mean, grads)
        mean = jax.tree.map(lambda m, g: b2 * m + (1 - b2) * g, mean, grads)
        decays = {"blocks": {"q": decay, "attn_norm": 0.0}, "embed": decay}
        params = jax.tree.map(lambda p, s, d: p - rate * (s + d * p), params, signs, decays)
    found = run(optimizer_of(name="lion"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5), found, params)


def test_muon_moves_block_matrices_by_a_nearly_orthogonal_matrix_and_the_rest_by_nesterov_adam():
    moved = run(optimizer_of(name="muon", weight_decay=0.0, clip_norm=0.0), num_steps=1)
    update = (np.asarray(moved["blocks"]["q"]) - PARAMS["blocks"]["q"]).reshape(2, 3, 4) / -0.1
    for layer, grad in zip(update, gradients(0)["blocks"]["q"].reshape(2, 3, 4)):
        singular = np.linalg.svd(layer, compute_uv=False) / (
            0.2 * 4**0.5
        )  # root mean square 0.2 for the larger dim
        assert (singular > 0.6).all()
        assert (singular < 1.3).all()
        assert np.sum(layer * grad) > 0
    adam = run(optax.nadam(0.1, b1=0.9, b2=0.95), num_steps=1)
    np.testing.assert_allclose(moved["embed"], adam["embed"], rtol=1e-6)
    np.testing.assert_allclose(moved["blocks"]["attn_norm"], adam["blocks"]["attn_norm"], rtol=1e-6)


def test_learning_rate_multipliers_scale_their_group():
    plain = run(optimizer_of(weight_decay=0.0), 1)
    scaled = run(
        optimizer_of(
            weight_decay=0.0,
            learning_rate_multipliers=((".*norm", 0.0), ("embed", 0.5), (".*", 1.0)),
        ),
        1,
    )
    np.testing.assert_array_equal(scaled["blocks"]["attn_norm"], PARAMS["blocks"]["attn_norm"])
    np.testing.assert_allclose(scaled["embed"] - 2, 0.5 * (plain["embed"] - 2), rtol=1e-5)
    np.testing.assert_array_equal(scaled["blocks"]["q"], plain["blocks"]["q"])


def test_an_uncovered_parameter_and_a_broken_pattern_are_errors():
    with pytest.raises(UserError, match=r"covers the parameter 'blocks/q'.*end the list with"):
        by_path(
            PARAMS,
            ((".*norm", 0.0), ("embed", 1.0)),
            what="config.optimizer.weight_decay_multipliers",
        )
    with pytest.raises(UserError, match="not a regular expression"):
        by_path(PARAMS, (("(", 0.0),), what="x")
    assert by_path(PARAMS, ((".*norm", 0.0), (".*", 1.0)), what="x")["blocks"] == {
        "q": 1.0,
        "attn_norm": 0.0,
    }
    # a pattern is of the whole path: a piece of it is not enough
    pieces = (("norm", 0.0), ("q", 0.0), ("blocks", 0.0), ("mbe", 0.0), (".*", 1.0))
    assert set(jax.tree.leaves(by_path(PARAMS, pieces, what="x"))) == {1.0}


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_learns_averages_and_is_sharded(name):
    a = Architecture(
        vocab_size=16, num_layers=2, d_model=16, num_heads=2, num_kv_heads=2, head_dim=8, d_ff=32
    )
    model = make_model(a)
    mesh = make_mesh({"fsdp": 4, "tensor": 2}, devices=jax.devices())
    objective = masked_diffusion(mask_id=15)
    rate = lambda step: 1e-2  # noqa: E731
    optimizer = optimizer_of(rate, name=name)
    metrics = abstract_metrics(objective, model.abstract, num_rows=8, sequence_length=8)
    abstract = abstract_state(model, optimizer, mesh, metrics=metrics, keep_ema=True)
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract.opt_state):
        if leaf.size >= 256:
            assert not leaf.sharding.is_fully_replicated, jax.tree_util.keystr(path)
    tokens = np.tile(np.arange(8, dtype=np.int32), (8, 1))
    batch = {
        "tokens": tokens,
        "segment_ids": tokens * 0 + 1,
        "positions": tokens,
        "is_maskable": tokens >= 0,
    }
    with jax.set_mesh(mesh):
        state = create_state(model, optimizer, abstract, seed=0)
        step = make_train_step(
            objective,
            model.nll_fn,
            optimizer,
            rate,
            seed=0,
            num_rows=8,
            num_microbatches=1,
            ema_decay=0.5,
        )
        step = jax.jit(step, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, abstract))
        average, history = state.params, []
        for number in range(30):
            before = state.metrics["loss"]
            state = step(state, batch)
            history.append(
                float(
                    (state.metrics["loss"][0] - before[0]) / (state.metrics["loss"][1] - before[1])
                )
            )
            decay = min(0.5, (1 + number) / (10 + number))
            average = jax.tree.map(lambda e, p, d=decay: d * e + (1 - d) * p, average, state.params)
    assert np.mean(history[-5:]) < 0.7 * np.mean(history[:5])
    jax.tree.map(lambda e, p: np.testing.assert_allclose(e, p, atol=1e-5), state.ema, average)

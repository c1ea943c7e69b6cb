"""The bound on sources of known entropy: a trained model reaches it, and is never below it."""

import functools
import math

import jax
import numpy as np
import pytest
from support import fast_compilation

from llada_jax.cluster.sharding import one_device_mesh
from llada_jax.evaluation import likelihood
from llada_jax.models.model import make_model
from llada_jax.models.transformer import Architecture, TokenScores
from llada_jax.objectives.autoregressive import autoregressive
from llada_jax.objectives.masked_diffusion import masked_diffusion
from llada_jax.training.optim import make_optimizer, make_schedule
from llada_jax.training.state import abstract_metrics, abstract_state, create_state
from llada_jax.training.step import make_train_step

V, MASK, BOS = 4, 4, 5  # symbols of the source; the two special ids come after them
T, B = 8, 64

OBJECTIVES = {
    "masked_diffusion": masked_diffusion(mask_id=MASK),
    "autoregressive": autoregressive(bos_id=BOS),
}

TRANSITIONS = np.random.default_rng(5).dirichlet(np.full(V, 0.4), size=V)
STATIONARY = np.linalg.matrix_power(TRANSITIONS, 200)[0]


def entropy_per_token() -> float:
    """Entropy of a stretch of T symbols of the stationary chain, per symbol: (H(x_1) + (T - 1)
    H(x_2 | x_1)) / T.
    """
    h = lambda p: -np.sum(np.where(p > 0, p * np.log(np.where(p > 0, p, 1)), 0.0), axis=-1)  # noqa: E731
    return float((h(STATIONARY) + (T - 1) * STATIONARY @ h(TRANSITIONS)) / T)


def rows_of(num_rows, rng):
    rows = np.empty((num_rows, T), np.int32)
    rows[:, 0] = rng.choice(V, p=STATIONARY, size=num_rows)
    cumulative = TRANSITIONS.cumsum(axis=1)
    for i in range(1, T):
        rows[:, i] = (
            (rng.random(num_rows)[:, None] > cumulative[rows[:, i - 1]]).sum(axis=1).clip(0, V - 1)
        )
    positions = np.broadcast_to(np.arange(T, dtype=np.int32), rows.shape)
    ones = np.ones_like(rows)
    return {"tokens": rows, "segment_ids": ones, "positions": positions, "is_maskable": ones > 0}


def trained(objective, *, num_steps):
    a = Architecture(
        vocab_size=6, num_layers=2, d_model=64, num_heads=4, num_kv_heads=4, head_dim=16, d_ff=128
    )
    model = make_model(a, mask=objective.mask)
    mesh = one_device_mesh()
    rate = make_schedule(
        name="cosine",
        learning_rate=5e-3,
        warmup_steps=50,
        final_learning_rate=0.0,
        decay_fraction=0,
        decay_shape="linear",
        stages=(),
        num_steps=num_steps,
        tokens_per_step=B * T,
    )
    optimizer = make_optimizer(
        rate,
        name="adamw",
        b1=0.9,
        b2=0.95,
        eps=1e-8,
        first_moment_dtype="float32",
        weight_decay=0.0,
        weight_decay_multipliers=(),
        learning_rate_multipliers=((".*", 1.0),),
        clip_norm=1.0,
    )
    metrics = abstract_metrics(objective, model.abstract, num_rows=B, sequence_length=T)
    state = create_state(
        model,
        optimizer,
        abstract_state(model, optimizer, mesh, metrics=metrics, keep_ema=False),
        seed=0,
    )
    step = jax.jit(
        make_train_step(
            objective,
            model.nll_fn,
            optimizer,
            rate,
            seed=0,
            num_rows=B,
            num_microbatches=1,
            ema_decay=0,
        ),
        donate_argnums=0,
        compiler_options=fast_compilation.WITH_LLVM_PASSES,
    )
    rng = np.random.default_rng(0)
    for _ in range(num_steps):
        state = step(state, rows_of(B, rng))
    return model, state.params


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "num_steps"), [("masked_diffusion", 600), ("autoregressive", 200)]
)
def test_a_trained_model_reaches_the_entropy_of_a_markov_source_and_is_never_below(name, num_steps):
    objective = OBJECTIVES[name]
    model, params = trained(objective, num_steps=num_steps)
    rng = np.random.default_rng(99)
    batches = [rows_of(1024, rng) for _ in range(40)]
    bound = likelihood.bound(objective, model.nll_fn, params, batches, num_rows=1024)
    entropy = entropy_per_token()
    assert 0.7 < entropy < 0.9  # of log 4 = 1.39: much to learn, and something left
    assert bound.standard_error < 0.01 * entropy
    assert bound.nats_per_token < 1.03 * entropy
    assert bound.nats_per_token > entropy - 3 * bound.standard_error
    assert bound.num_tokens == 40 * 1024 * T


@pytest.mark.slow
def test_the_standard_error_is_that_of_independent_repetitions():
    """A denoiser that is surprised at random: the spread of many bounds is what each of them
    reports.
    """

    def noisy_model(params, noisy_BT, targets_BT, where_BT, segment_ids_BT, positions_BT):
        nll = jax.numpy.where(where_BT, params[targets_BT], 0.0)
        return TokenScores(nll, where_BT)

    objective = OBJECTIVES["masked_diffusion"]
    surprise = jax.numpy.linspace(0.1, 3.0, 8)
    rng = np.random.default_rng(0)
    bounds = []
    for seed in range(60):
        batches = [rows_of(32, rng) for _ in range(12)]
        bounds.append(
            likelihood.bound(objective, noisy_model, surprise, batches, num_rows=32, seed=seed)
        )
    spread = np.std([b.nats_per_token for b in bounds])
    reported = math.sqrt(np.mean([b.standard_error**2 for b in bounds]))
    assert reported / spread == pytest.approx(1, abs=0.25)


# ---- which numbers are added up


def surprise_of_token(params, noisy_BT, targets_BT, where_BT, segment_ids_BT, positions_BT):
    """A denoiser that is surprised by each symbol as `params` says, whatever the noise."""
    return TokenScores(jax.numpy.where(where_BT, params[targets_BT], 0.0), where_BT)


def surprise_of_place(params, noisy_BT, targets_BT, where_BT, segment_ids_BT, positions_BT):
    """One that is surprised by each place of each row in another way: the sum names the masks."""
    places = jax.numpy.arange(where_BT.size, dtype=jax.numpy.float32).reshape(where_BT.shape)
    return TokenScores(jax.numpy.where(where_BT, places, 0.0), where_BT)


def rows_full_of(symbol: int, *, num_real: int, num_rows: int = 8) -> dict:
    """A batch whose last rows are empty, as that of a split is."""
    batch = rows_of(num_rows, np.random.default_rng(0))
    is_real = np.arange(num_rows)[:, None] < num_real
    segment_ids = np.where(is_real, batch["segment_ids"], 0)
    tokens = np.full_like(batch["tokens"], symbol)
    return {
        **batch,
        "tokens": tokens,
        "segment_ids": segment_ids,
        "is_maskable": segment_ids > 0,
    }


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_batch_that_is_not_full_counts_by_its_tokens(name):
    """7 of 8 rows with a surprise of 1 and one row with 3: a mean of batch means would be 2."""
    batches = [rows_full_of(1, num_real=7), rows_full_of(2, num_real=1)]
    surprise = jax.numpy.array([0.0, 1.0, 3.0, 0.0, 0.0, 0.0])
    bound = likelihood.bound(
        OBJECTIVES[name], surprise_of_token, surprise, batches, num_rows=8, num_draws=2
    )
    assert bound.nats_per_token == pytest.approx((7 * 1.0 + 1 * 3.0) / 8, rel=1e-6)
    assert bound.num_tokens == 8 * T


def test_every_batch_and_every_draw_has_masks_of_its_own():
    batches = [rows_full_of(1, num_real=8)] * 3
    scored = []
    bound = likelihood.bound(
        OBJECTIVES["masked_diffusion"],
        surprise_of_place,
        {},
        batches,
        num_rows=8,
        num_draws=5,
        scored=scored,
    )
    assert len({nats for nats, _ in scored}) == 15
    assert bound.standard_error > 0


def test_draws_of_the_same_rows_make_the_error_smaller_by_the_root_of_their_number():
    """Draws that share anything would not: 64 of one batch, against the spread of 200 single."""
    batch = rows_full_of(1, num_real=6)
    bound = functools.partial(
        likelihood.bound, OBJECTIVES["masked_diffusion"], surprise_of_place, {}, [batch], num_rows=8
    )
    single = np.std([bound(seed=seed).nats_per_token for seed in range(1, 201)])
    assert bound(num_draws=64).standard_error == pytest.approx(single / 8, rel=0.3)

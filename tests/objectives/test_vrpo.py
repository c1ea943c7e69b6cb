"""The loss of pairs against numbers computed by hand and in float64, and the variance of its
estimates.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llada_jax.models.model import make_model
from llada_jax.models.transformer import Architecture, TokenScores
from llada_jax.objectives.corruption import corrupt_documents
from llada_jax.objectives.vrpo import draw_times, log_likelihoods, vrpo, vrpo_loss
from llada_jax.rng import key_for

MASK = 9
KEY = key_for("test", 0)
NATS = jnp.arange(10, dtype=jnp.float32)


def row_of(*pairs, sequence_length):
    """Returns a row of pairs, each (prompt, chosen, rejected)."""
    names = ("tokens", "segment_ids", "positions")
    row = {name: np.zeros(sequence_length, np.int32) for name in names}
    row |= {name: np.zeros(sequence_length, bool) for name in ("is_maskable", "is_chosen")}
    start = 0
    documents = [(prompt, answer) for prompt, *answers in pairs for answer in answers]
    for number, (prompt, answer) in enumerate(documents, start=1):
        here = slice(start, start + len(prompt) + len(answer))
        row["tokens"][here] = [*prompt, *answer]
        row["segment_ids"][here] = number
        row["positions"][here] = range(len(prompt) + len(answer))
        row["is_maskable"][start + len(prompt) : here.stop] = True
        row["is_chosen"][here] = number % 2 == 1
        start = here.stop
    return row


def batch_of(*rows):
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def table_model(params, noisy_BT, targets_BT, where_BT, segment_ids_BT, positions_BT):
    """Takes params[token] nats for every token that it is asked for."""
    return TokenScores(jnp.where(where_BT, params[targets_BT], 0.0), where_BT)


@pytest.mark.slow
def test_the_loss_is_the_one_computed_by_hand():
    batch = batch_of(
        row_of(([1, 1], [2, 3], [4]), ([1], [6], [1, 1, 1]), sequence_length=13),
        row_of(sequence_length=13),
    )
    # the bounds on p meet at 1, so that everything is masked with the weight 1
    loss_sum, count, metrics = vrpo_loss(
        table_model,
        NATS,
        batch,
        KEY,
        jnp.arange(2),
        num_rows=2,
        frozen=0.5 * NATS,
        beta=0.5,
        mask_id=MASK,
        num_times=3,
        masks_per_time=2,
        eps=1 - 1e-7,
        t_sampling="iid",
        masking="bernoulli",
    )
    # the reference takes half of the nats, so that half of them with a minus sign is the gain
    margins = 0.5 * (-2.5 - -2.0), 0.5 * (-3.0 - -1.5)
    assert float(count) == 2
    assert float(loss_sum) == pytest.approx(sum(math.log1p(math.exp(-m)) for m in margins))
    found = {name: float(total / number) for name, (total, number) in metrics.items()}
    assert found["reward_margin"] == pytest.approx(sum(margins) / 2)
    assert found["chosen_reward"] == pytest.approx(0.5 * (-2.5 - 3.0) / 2)
    assert found["rejected_reward"] == pytest.approx(0.5 * (-2.0 - 1.5) / 2)
    assert found["reward_accuracy"] == 0
    assert found["nelbo"] == pytest.approx((2 + 3 + 4 + 6 + 3) / 7)


def unigram_model(params, noisy_BT, targets_BT, where_BT, segment_ids_BT, positions_BT):
    """A softmax over params, harder by a tenth for every mask before a token."""
    before_BT = jnp.cumsum(where_BT, axis=1) - where_BT
    nll_BT = (1 + before_BT / 10) * (jax.nn.logsumexp(params) - params[targets_BT])
    return TokenScores(jnp.where(where_BT, nll_BT, 0.0), where_BT)


@pytest.mark.slow
@pytest.mark.parametrize("masking", ["bernoulli", "exact_count"])
@pytest.mark.parametrize("shared_draws", [True, False])
def test_loss_and_gradient_are_those_of_float64(masking, shared_draws):
    rng = np.random.default_rng(0)
    rows = [
        row_of(
            *[[rng.integers(0, 8, n) for n in (2, 3 + r, 4)] for _ in range(2)], sequence_length=32
        )
        for r in range(3)
    ]
    batch, row_B = batch_of(*rows), jnp.arange(3)
    params, frozen = (rng.normal(size=10).astype(np.float32) for _ in range(2))
    draws = dict(num_times=3, masks_per_time=2, t_sampling="stratified")

    def drawn(key):
        """Returns mask and weight of each draw, as the loss takes them."""
        t_key, mask_key = jax.random.split(key)
        t_NBS = draw_times(t_key, batch["segment_ids"], row_B, num_times=3, t_sampling="stratified")
        return [
            corrupt_documents(
                jax.random.fold_in(mask_key, n),
                t_NBS[n // 2],
                batch["is_maskable"],
                batch["segment_ids"],
                row_B,
                masking=masking,
                eps=0.01,
            )
            for n in range(6)
        ]

    def estimates(params, masks):
        """In float64, document by document and token by token."""
        log_z, found = np.log(np.exp(params).sum()), np.zeros((3, 33))
        for is_masked_BT, weight_BT in masks:
            for b, t in zip(*np.nonzero(is_masked_BT)):
                nll = log_z - params[batch["tokens"][b, t]]
                nll *= 1 + is_masked_BT[b, :t].sum() / 10
                found[b, batch["segment_ids"][b, t]] -= np.float64(weight_BT[b, t]) * nll / 6
        return found

    policy_key, other_key = jax.random.split(KEY)
    policy = jax.tree.map(np.asarray, drawn(policy_key))
    reference = policy if shared_draws else jax.tree.map(np.asarray, drawn(other_key))

    def expected(params):
        gain = 0.7 * (estimates(params, policy) - estimates(frozen.astype(np.float64), reference))
        margins = gain[:, [1, 3]] - gain[:, [2, 4]]
        return np.log1p(np.exp(-margins)).sum()

    def loss(params):
        return vrpo_loss(
            unigram_model,
            params,
            batch,
            KEY,
            row_B,
            num_rows=3,
            frozen=frozen,
            beta=0.7,
            shared_draws=shared_draws,
            mask_id=MASK,
            eps=0.01,
            masking=masking,
            **draws,
        )[0]

    ours, gradient = jax.jit(jax.value_and_grad(loss))(params)
    theirs = params.astype(np.float64)
    slopes = [
        (expected(theirs + step) - expected(theirs - step)) / 2e-6 for step in 1e-6 * np.eye(10)
    ]
    assert float(ours) == pytest.approx(expected(theirs), rel=1e-5)
    np.testing.assert_allclose(gradient, slopes, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("t_sampling", ["stratified", "iid"])
@pytest.mark.parametrize("masking", ["bernoulli", "exact_count"])
def test_an_estimate_has_the_expectation_of_the_bound(t_sampling, masking):
    B = 20_000
    row = row_of(([1, 1, 1], [2, 3, 4, 5], [6]), sequence_length=12)
    batch = {name: np.tile(values, (B, 1)) for name, values in row.items()}

    def harder_with_more_masks(params, noisy_BT, targets_BT, where_BT, *rest):
        cost_B1 = (noisy_BT[:, :7] == MASK).sum(axis=1, keepdims=True)
        return TokenScores(jnp.where(where_BT, cost_B1 * params[targets_BT], 0.0), where_BT)

    found = log_likelihoods(
        harder_with_more_masks,
        NATS,
        batch,
        KEY,
        jnp.arange(B),
        mask_id=MASK,
        num_times=2,
        masks_per_time=2,
        eps=0.0,
        t_sampling=t_sampling,
        masking=masking,
    )
    # k is uniform on 1..4, each of the 4 tokens is masked with k/4, weighted 4/k, and costs k nats
    error = 6 * float(found[:, 1].std()) / math.sqrt(B)
    assert float(found[:, 1].mean()) == pytest.approx(-2.5 * (2 + 3 + 4 + 5), abs=error)
    assert not found[:, 0].any()
    assert not found[:, 3:].any()


NUM_SCORES = 6000


@functools.cache
def small_model():
    """Returns nll_fn of a small Transformer, a policy, and the reference that it came from."""
    model = make_model(
        Architecture(
            vocab_size=11, num_layers=1, d_model=8, num_heads=2, num_kv_heads=2, head_dim=4, d_ff=8
        )
    )
    reference = jax.jit(model.init)(KEY)
    rng = np.random.default_rng(0)
    policy = jax.tree.map(
        lambda leaf: leaf + 0.02 * rng.normal(size=leaf.shape).astype(np.float32), reference
    )
    return model.nll_fn, policy, reference


@functools.cache
def variance_of_score(num_times, masks_per_time, shared_draws):
    """Returns the variance over NUM_SCORES draws of the score of one pair, the margin at beta 1."""
    nll_fn, policy, reference = small_model()
    row = row_of(([1, 1], [2, 3, 4, 5, 2, 3], [6, 7, 1, 2, 8, 8]), sequence_length=16)
    batch = {name: np.tile(values, (NUM_SCORES, 1)) for name, values in row.items()}
    estimate = jax.jit(
        lambda params, key: log_likelihoods(
            nll_fn,
            params,
            batch,
            key,
            jnp.arange(NUM_SCORES),
            mask_id=MASK,
            num_times=num_times,
            masks_per_time=masks_per_time,
            eps=0.0,
            t_sampling="iid",
            masking="exact_count",
        )
    )
    keys = jax.random.split(KEY)
    score_BS = estimate(policy, keys[0]) - estimate(reference, keys[0 if shared_draws else 1])
    return float(np.var(score_BS[:, 1] - score_BS[:, 2]))


@pytest.mark.slow
def test_the_variance_of_the_score_falls_as_published():
    """The kurtosis of the scores is below 6, so that the relative standard error of a variance is
    below sqrt(5 / 6000) = 2.9%, and that of a ratio below 4.1%. Each bound is four of these errors
    or more from what was measured: another key would fail with a probability below 10^-4.
    """
    best = variance_of_score(4, 1, True)
    # the same masks for policy and reference cancel most of the noise of their difference
    assert best < variance_of_score(4, 1, False) / 5
    # of the same budget, times are worth more than masks
    assert best < variance_of_score(1, 4, True) / 1.15
    # and four times the budget gives a quarter of the variance
    assert variance_of_score(1, 1, True) / best == pytest.approx(4, rel=0.2)


@pytest.mark.slow
def test_a_row_is_scored_alike_in_any_microbatch():
    rng = np.random.default_rng(0)
    rows = [
        row_of([rng.integers(0, 8, n) for n in (2, 3, 1 + r % 3)], sequence_length=12)
        for r in range(8)
    ]
    batch = batch_of(*rows)
    objective = vrpo(mask_id=MASK, num_times=2)
    loss = functools.partial(objective.loss, table_model, NATS, num_rows=8, frozen=NATS**0.5)
    whole = loss(batch=batch, key=KEY, row_B=jnp.arange(8))
    parts = []
    for numbers in (np.arange(0, 8, 2), np.arange(1, 8, 2)):
        part = {name: array[numbers] for name, array in batch.items()}
        parts.append(loss(batch=part, key=KEY, row_B=jnp.asarray(numbers)))
    added = jax.tree.map(lambda a, b: a + b, *parts)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), added, whole)


@pytest.mark.slow
@pytest.mark.parametrize("t_sampling", ["stratified", "iid"])
@pytest.mark.parametrize("masking", ["exact_count", "bernoulli"])
def test_a_row_is_scored_alike_where_a_bucket_has_cut_its_padding_off(t_sampling, masking):
    batches = [
        batch_of(*[row_of([[1, 2], [3, 4, 5], [6, 7]], sequence_length=length)] * 4)
        for length in (10, 16)
    ]
    objective = vrpo(mask_id=MASK, num_times=3, t_sampling=t_sampling, masking=masking)
    loss = functools.partial(objective.loss, table_model, NATS, key=KEY, row_B=jnp.arange(4))
    cut, whole = (loss(batch=batch, num_rows=4, frozen=NATS**0.5) for batch in batches)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), cut, whole)


@pytest.mark.slow
def test_held_out_pairs_have_margins_where_there_is_a_reference():
    batch = batch_of(row_of(([1, 1], [6], [4]), ([1], [4], [5]), sequence_length=12))
    objective = vrpo(mask_id=MASK, beta=0.5)

    def of_dict(params, *rest):
        return table_model(params["nats"], *rest)

    def metrics(frozen):
        params = {"nats": NATS}
        return objective.bound(
            of_dict, params, batch, KEY, jnp.arange(1), num_rows=1, step=0, frozen=frozen
        )[2]

    alone, found = metrics({}), metrics({"nats": 2 * NATS})
    assert "reward_margin" not in alone
    assert alone["nelbo"] == found["nelbo"]
    # the reference is twice as surprised: each answer has gained what it costs, which is exact
    # because an exact count always masks a single token
    assert float(found["reward_margin"][0]) == pytest.approx(0.5 * (6 - 4 + 4 - 5))
    assert float(found["reward_accuracy"][0]) == 1


@pytest.mark.slow
def test_a_policy_that_is_its_reference_wins_no_pair_and_half_a_pair_is_none():
    # the rejected answer of the second pair is empty, so that only the first one counts
    batch = batch_of(row_of(([1], [2, 3], [4, 5]), ([1], [6], []), sequence_length=12))
    loss = functools.partial(
        vrpo(mask_id=MASK).loss, table_model, NATS, batch, KEY, jnp.arange(1), num_rows=1
    )
    loss_sum, count, metrics = loss(frozen=NATS)
    assert float(count) == 1
    assert float(loss_sum) == pytest.approx(math.log(2))
    assert tuple(map(float, metrics["reward_accuracy"])) == (0, 1)
    assert tuple(map(float, metrics["chosen_reward"])) == (0, 1)
    # of what the policy gains on the second pair, nothing counts
    assert float(loss(frozen=NATS + 5.0 * (jnp.arange(10) == 6))[0]) == pytest.approx(math.log(2))


@pytest.mark.parametrize("t_sampling", ["stratified", "iid"])
def test_every_answer_has_its_own_times(t_sampling):
    segment_ids_BT = np.tile(np.repeat([1, 2], 3), (500, 1))
    t_NBS = np.asarray(
        draw_times(KEY, segment_ids_BT, jnp.arange(500), num_times=4, t_sampling=t_sampling)
    )
    assert t_NBS.shape == (4, 500, 7)
    assert len(np.unique(t_NBS)) > 0.99 * t_NBS.size
    if t_sampling == "stratified":
        strata = np.sort(np.floor(t_NBS * 4).astype(int), axis=0)
        assert (strata == np.arange(4).reshape(4, 1, 1)).mean() > 0.999


@pytest.mark.slow
def test_an_exact_count_is_that_of_each_document():
    rng = np.random.default_rng(0)
    rows = [
        row_of(
            *[[rng.integers(0, 8, n) for n in (2, 1 + r % 4, 5)] for _ in range(2)],
            sequence_length=32,
        )
        for r in range(64)
    ]
    batch = batch_of(*rows)
    t_BS = rng.uniform(size=(64, 33)).astype(np.float32)
    is_masked_BT, weight_BT = corrupt_documents(
        KEY,
        t_BS,
        batch["is_maskable"],
        batch["segment_ids"],
        jnp.arange(64),
        masking="exact_count",
        eps=0.0,
    )
    for b, segment in np.ndindex(64, 4):
        here = (batch["segment_ids"][b] == segment + 1) & batch["is_maskable"][b]
        length, k = here.sum(), max(1, math.ceil(t_BS[b, segment + 1] * here.sum()))
        assert is_masked_BT[b][here].sum() == k
        np.testing.assert_allclose(weight_BT[b][here], length / k, rtol=1e-6)
    assert not np.asarray(is_masked_BT)[~batch["is_maskable"]].any()

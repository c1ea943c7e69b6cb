"""The fine-tuning loss against the published number, hand-computed means, and itself in other
rows.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llada_jax.cluster.sharding import one_device_mesh
from llada_jax.hf.read import read_config, read_params
from llada_jax.models.model import abstract_parameters, make_model
from llada_jax.models.transformer import Architecture, TokenScores
from llada_jax.objectives.sft import sft, sft_loss, sums_of_corruption, times_of_documents
from llada_jax.rng import key_for

MASK = 9
KEY = key_for("test", 0)


def table_model(params, noisy_BT, targets_BT, where_BT, segment_ids_BT, positions_BT):
    """Takes params[token] nats for every token that it is asked for."""
    return TokenScores(jnp.where(where_BT, params[targets_BT], 0.0), where_BT)


def packed(documents, *, sequence_length):
    """Returns one row of (prompt, answer) pairs."""
    row = {
        name: np.zeros(sequence_length, np.int32) for name in ("tokens", "segment_ids", "positions")
    }
    row["is_maskable"] = np.zeros(sequence_length, bool)
    start = 0
    for number, (prompt, answer) in enumerate(documents, start=1):
        here = slice(start, start + len(prompt) + len(answer))
        row["tokens"][here] = [*prompt, *answer]
        row["segment_ids"][here] = number
        row["positions"][here] = range(len(prompt) + len(answer))
        row["is_maskable"][start + len(prompt) : here.stop] = True
        start = here.stop
    return row


def batch_of(*rows):
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def everything_masked(**settings):
    """With both bounds next to 1, all that may be masked is, with a weight of 1."""
    return functools.partial(
        sft_loss, table_model, mask_id=MASK, eps=1 - 1e-7, max_mask_ratio=1.0, **settings
    )


NATS = jnp.arange(10, dtype=jnp.float32)
BATCH = batch_of(
    packed([([1, 1], [2, 3]), ([1], [4, 4, 4, 6])], sequence_length=10),
    packed([([1, 1, 1], [5])], sequence_length=10),
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "loss", "count"),
    [
        # (2 + 3) / 2 + (4 + 4 + 4 + 6) / 4 + 5
        ({"mean_over": "answers"}, 12.0, 3),
        ({"mean_over": "tokens"}, 28.0, 7),
        # prompts too: (1 + 1 + 5) / 4 + (1 + 18) / 5 + (3 + 5) / 4
        ({"mean_over": "answers", "masked": "documents"}, 7 / 4 + 19 / 5 + 8 / 4, 3),
        ({"mean_over": "tokens", "masked": "documents"}, 34.0, 13),
    ],
)
def test_every_mean_is_the_one_computed_by_hand(settings, loss, count):
    loss_sum, counted, metrics = everything_masked(**settings)(
        NATS, BATCH, KEY, jnp.arange(2), num_rows=2
    )
    assert float(loss_sum) == pytest.approx(loss, rel=1e-5)
    assert float(counted) == count
    nats, tokens = metrics["nelbo"]
    assert float(nats / tokens) == pytest.approx(34 / 13 if "masked" in settings else 4.0, rel=1e-5)


def test_the_loss_is_the_published_one_of_the_fixture(published):
    _, _, architecture = read_config(published)
    model = make_model(architecture)
    params = read_params(published, abstract_parameters(model, one_device_mesh()))
    expected = np.load(published / "expected.npz")
    tokens, noisy = expected["sft_tokens"].astype(np.int32), expected["sft_noisy"]
    B, T = tokens.shape
    batch = {
        "tokens": tokens,
        "segment_ids": np.ones((B, T), np.int32),
        "positions": np.broadcast_to(np.arange(T, dtype=np.int32), (B, T)),
        "is_maskable": np.arange(T) >= expected["sft_prompt_lengths"].reshape(B, 1),
    }
    p_mask_BT = np.broadcast_to(expected["sft_p_mask"].reshape(B, -1), (B, T))
    loss_sum, count, _ = sums_of_corruption(
        model.nll_fn,
        params,
        batch,
        jnp.asarray((noisy != tokens) & batch["is_maskable"]),
        jnp.asarray(p_mask_BT),
        mask_id=510,
        t_BT=jnp.asarray(p_mask_BT),
    )
    np.testing.assert_allclose(loss_sum / count, expected["sft_loss"], rtol=1e-5)


def test_times_are_uniform_and_each_document_of_a_row_has_its_own():
    segment_ids_BT = np.tile(np.repeat([1, 2, 3], 4), (64, 1))
    for t_sampling in ("stratified", "iid"):
        draws = []
        for step in range(50):
            t_BT = np.asarray(
                times_of_documents(
                    key_for("t", 0, step),
                    segment_ids_BT,
                    jnp.arange(64),
                    num_rows=64,
                    t_sampling=t_sampling,
                )
            )
            t_BS = t_BT[:, ::4]
            np.testing.assert_array_equal(t_BT, np.repeat(t_BS, 4, axis=1))
            if t_sampling == "stratified":
                for times in t_BS.T:
                    strata = np.floor(times * 64).astype(int).clip(0, 63)
                    assert sorted(strata) == list(range(64))
            draws.append(t_BS)
        draws = np.stack(draws)
        assert draws.mean() == pytest.approx(0.5, abs=0.02)
        assert (draws**2).mean() == pytest.approx(1 / 3, abs=0.02)
        correlation = np.corrcoef(draws[:, 0, 0], draws[:, 0, 1])[0, 1]
        assert abs(correlation) < 0.5  # of 50 pairs, 3.5 standard errors


@pytest.mark.slow
@pytest.mark.parametrize("t_sampling", ["stratified", "iid", "mirrored"])
@pytest.mark.parametrize("mean_over", ["answers", "tokens"])
def test_a_row_is_corrupted_alike_in_any_microbatch(t_sampling, mean_over):
    rng = np.random.default_rng(0)
    rows = [
        packed(
            [(rng.integers(0, 8, 3), rng.integers(0, 8, n)) for n in (1 + r % 3, 4)],
            sequence_length=16,
        )
        for r in range(8)
    ]
    batch = batch_of(*rows)
    loss = functools.partial(
        sft_loss,
        table_model,
        NATS,
        num_rows=8,
        mask_id=MASK,
        t_sampling=t_sampling,
        mean_over=mean_over,
    )
    whole = loss(batch=batch, key=KEY, row_B=jnp.arange(8))
    parts = []
    for numbers in (np.arange(0, 8, 2), np.arange(1, 8, 2)):
        part = {name: array[numbers] for name, array in batch.items()}
        parts.append(loss(batch=part, key=KEY, row_B=jnp.asarray(numbers)))
    added = jax.tree.map(lambda a, b: a + b, *parts)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), added, whole)


@pytest.mark.slow
def test_mask_ratios_stay_within_their_bounds_and_prompts_stay_clean():
    length = 4000
    rows = [packed([([1] * 50, [2] * length)], sequence_length=length + 50) for _ in range(32)]
    seen = {}

    def spy(params, noisy_BT, targets_BT, where_BT, *rest):
        seen.update(noisy=np.asarray(noisy_BT), where=np.asarray(where_BT))
        return table_model(params, noisy_BT, targets_BT, where_BT, *rest)

    sft_loss(
        spy,
        NATS,
        batch_of(*rows),
        KEY,
        jnp.arange(32),
        num_rows=32,
        mask_id=MASK,
        eps=0.3,
        max_mask_ratio=0.8,
    )
    ratios = seen["where"][:, 50:].mean(axis=1)
    error = 4.5 * math.sqrt(0.25 / length)
    assert ratios.min() > 0.3 - error
    assert ratios.max() < 0.8 + error
    assert ratios.max() - ratios.min() > 0.4
    assert (seen["noisy"][:, :50] == 1).all()
    np.testing.assert_array_equal(seen["noisy"] == MASK, seen["where"])


def spied_loss(batch, num_rows, *, rows=None, **settings):
    """Returns what sft_loss returns, and what the network was given.

    rows: the numbers of the batch's rows in the whole batch; None where it is all of it.
    """
    seen = {}

    def spy(params, noisy_BT, targets_BT, where_BT, *rest):
        seen.update(noisy=np.asarray(noisy_BT), where=np.asarray(where_BT))
        return table_model(params, noisy_BT, targets_BT, where_BT, *rest)

    rows = jnp.arange(num_rows) if rows is None else jnp.asarray(rows)
    result = sft_loss(spy, NATS, batch, KEY, rows, num_rows=num_rows, mask_id=MASK, **settings)
    return result, seen


@pytest.mark.slow
@pytest.mark.parametrize("t_sampling", ["stratified", "iid", "mirrored"])
def test_complementary_rows_mask_every_token_of_an_answer_once(t_sampling):
    rng = np.random.default_rng(0)
    rows = [
        packed([(rng.integers(0, 8, 3), rng.integers(0, 8, n)) for n in (9, 6)], sequence_length=24)
        for _ in range(50)
    ]
    batch = batch_of(*(row for row in rows for _ in range(2)))
    settings = dict(t_sampling=t_sampling, complementary=True, eps=0.3, max_mask_ratio=0.8)
    (loss_sum, count, metrics), seen = spied_loss(batch, 100, **settings)
    first, second = seen["where"][::2], seen["where"][1::2]
    assert (first ^ second == batch["is_maskable"][::2]).all()
    assert not (first & second).any()
    assert float(count) == 200
    # each half of the pair is weighted with its own probability, so that the bound stays one: 5
    # standard errors, where weight and mask of a token have a variance of at most 1/0.2 - 1
    nats, tokens = metrics["nelbo"]
    expected = batch["tokens"][batch["is_maskable"]].mean()
    assert float(nats / tokens) == pytest.approx(expected, abs=5 * 2 * 4 / math.sqrt(15 * 50))
    assert "copies=2" in repr(sft(mask_id=MASK, complementary=True))


@pytest.mark.slow
def test_complementary_rows_do_not_depend_on_microbatches():
    rows = [packed([([1, 1], [2, 3, 4])], sequence_length=8) for _ in range(8)]
    batch = batch_of(*rows)
    settings = dict(num_rows=8, mask_id=MASK, complementary=True, weight="none")
    loss = functools.partial(sft_loss, table_model, NATS, **settings)
    whole = loss(batch=batch, key=KEY, row_B=jnp.arange(8))
    parts = []
    for numbers in (np.arange(0, 8, 2), np.arange(1, 8, 2)):  # which parts the pairs
        part = {name: array[numbers] for name, array in batch.items()}
        parts.append(loss(batch=part, key=KEY, row_B=jnp.asarray(numbers)))
    added = jax.tree.map(lambda a, b: a + b, *parts)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), added, whole)


@pytest.mark.slow
def test_a_dropped_prompt_is_hidden_whole_and_never_scored():
    rows = [packed([([1, 1, 1], [2, 3]), ([4, 4], [5])], sequence_length=10) for _ in range(500)]
    batch = batch_of(*rows)
    plain, before = spied_loss(batch, 500)
    dropped, after = spied_loss(batch, 500, prompt_dropout=0.2)
    # what is scored, and what it costs a network that does not read prompts, stays
    np.testing.assert_array_equal(after["where"], before["where"])
    jax.tree.map(np.testing.assert_array_equal, dropped, plain)
    for segment in (1, 2):
        is_prompt = (batch["segment_ids"] == segment) & ~batch["is_maskable"]
        hidden = (after["noisy"] == MASK) & is_prompt
        sizes = hidden.sum(axis=1)
        assert set(sizes) == {0, is_prompt[0].sum()}
        assert (sizes > 0).mean() == pytest.approx(0.2, abs=5 * math.sqrt(0.16 / 500))
    # padding is not a prompt
    assert (after["noisy"][:, 8:] == 0).all()
    # the documents of a row are drawn apart
    both = [((after["noisy"] == MASK)[:, place]) for place in (0, 5)]
    assert 0 < (both[0] & both[1]).sum() < min(b.sum() for b in both)


def test_a_prompt_is_dropped_or_kept_alike_in_any_microbatch():
    rows = [packed([([1, 1, 1], [2, 3]), ([4, 4], [5])], sequence_length=10) for _ in range(40)]
    batch = batch_of(*rows)
    _, whole = spied_loss(batch, 40, prompt_dropout=0.5)
    for numbers in (np.arange(0, 40, 2), np.arange(1, 40, 2)):
        part = {name: array[numbers] for name, array in batch.items()}
        _, seen = spied_loss(part, 40, rows=numbers, prompt_dropout=0.5)
        np.testing.assert_array_equal(seen["noisy"], whole["noisy"][numbers])


@pytest.fixture(scope="module")
def network():
    """Returns a small network, its parameters, and three pairs of a prompt and an answer."""
    rng = np.random.default_rng(0)
    pairs = [(rng.integers(0, 8, a), rng.integers(0, 8, b)) for a, b in ((3, 4), (2, 5), (5, 3))]
    model = make_model(
        Architecture(
            vocab_size=11,
            num_layers=2,
            d_model=16,
            num_heads=2,
            num_kv_heads=2,
            head_dim=8,
            d_ff=16,
        )
    )
    return model, jax.jit(model.init)(KEY), pairs


def test_packed_and_unpacked_rows_of_the_same_pairs_give_the_same_loss(network):
    """The network sees the documents of a row apart, so that an answer costs the same in a row of
    its own under the same mask.
    """
    model, params, pairs = network
    T = 22
    loss = jax.jit(
        functools.partial(sft_loss, model.nll_fn, num_rows=1, mask_id=MASK, eps=1 - 1e-7)
    )
    one_row = loss(params, batch_of(packed(pairs, sequence_length=T)), KEY, jnp.arange(1))
    alone = [
        loss(params, batch_of(packed([pair], sequence_length=T)), KEY, jnp.arange(1))
        for pair in pairs
    ]
    assert float(one_row[1]) == 3
    assert float(one_row[0]) == pytest.approx(sum(float(part[0]) for part in alone), rel=1e-5)


@pytest.mark.parametrize("mean_over", ["answers", "tokens"])
def test_each_answer_under_half_a_mask_costs_the_same_in_a_packed_row_and_alone(network, mean_over):
    model, params, pairs = network
    T = 22

    def loss_of(document, batch, is_masked_BT):
        """Returns the loss that one document of a row adds to the sum."""

        def nll_fn(params, noisy_BT, targets_BT, where_BT, segment_ids_BT, positions_BT):
            scores = model.nll_fn(
                params, noisy_BT, targets_BT, where_BT, segment_ids_BT, positions_BT
            )
            is_asked_BT = segment_ids_BT == document
            return scores._replace(nll_BT=jnp.where(is_asked_BT, scores.nll_BT, 0.0))

        half_BT = jnp.full(is_masked_BT.shape, 0.5)
        return sums_of_corruption(
            nll_fn,
            params,
            batch,
            is_masked_BT,
            half_BT,
            mask_id=MASK,
            mean_over=mean_over,
            t_BT=half_BT,
        )[0]

    loss_of = jax.jit(loss_of)
    # every other token of an answer; its other tokens are seen, as prompts are
    masks = [np.r_[np.zeros(len(a), bool), np.arange(len(b)) % 2 == 0] for a, b in pairs]
    row = batch_of(packed(pairs, sequence_length=T))
    together = np.concatenate([*masks, np.zeros(T - sum(map(len, masks)), bool)])[None]
    for document, (pair, mask) in enumerate(zip(pairs, masks), start=1):
        alone = batch_of(packed([pair], sequence_length=T))
        expected = loss_of(1, alone, np.pad(mask, (0, T - len(mask)))[None])
        assert float(expected) > 0.1
        found = loss_of(document, row, together)
        assert float(found) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("t_sampling", ["stratified", "iid", "mirrored"])
def test_a_single_answer_per_row_has_the_expectation_of_the_bound(t_sampling):
    """Over many rows the training loss comes to the bound that scores held-out dialogues."""
    B = 20_000
    row = packed([([1, 1, 1], [2, 3, 4, 5])], sequence_length=8)
    batch = {name: np.tile(values, (B, 1)) for name, values in row.items()}
    objective = sft(mask_id=MASK, t_sampling=t_sampling, mean_over="answers")
    rows = jnp.arange(B)

    def noise_model(params, noisy_BT, targets_BT, where_BT, *rest):
        # the more is masked, the more each token costs
        cost_B1 = (noisy_BT == MASK).sum(axis=1, keepdims=True)
        return TokenScores(jnp.where(where_BT, cost_B1 * params[targets_BT], 0.0), where_BT)

    loss_sum, count, _ = objective.loss(noise_model, NATS, batch, KEY, rows, num_rows=B, step=0)
    nats, tokens = objective.bound(noise_model, NATS, batch, KEY, rows, num_rows=B, step=0)[2][
        "nelbo"
    ]
    assert float(loss_sum / count) == pytest.approx(float(nats / tokens), rel=0.03)
    # k uniform on 1..4, each of 4 tokens masked with k/4 and weighted 4/k, at a cost of k
    assert float(nats / tokens) == pytest.approx(3.5 * 2.5, rel=0.01)

"""Log-likelihoods of answers against enumeration, against the causal chain rule, and in batches."""

import itertools
import math
import types

import jax
import numpy as np
import pytest
from support.enumerable import (
    IDS,
    LENGTH,
    MODEL,
    SYMBOLS,
    bound_by_enumeration,
    nll,
)
from support.networks import SMALL, perturbed

from llada_jax.cluster.sharding import make_mesh
from llada_jax.data.tokenizer import load_tokenizer
from llada_jax.errors import UserError
from llada_jax.evaluation import answer_rows
from llada_jax.evaluation.answer_rows import Question, bucket, nll_of_answers
from llada_jax.evaluation.conditional import (
    draws_of,
    encode_pair,
    every_subset,
    log_likelihoods,
)
from llada_jax.masks import BIDIRECTIONAL, CAUSAL, Mask
from llada_jax.models.model import make_model

ROW = (2, 0, 1, 1)
WHOLE = Question((), ROW)


def scores(questions, **settings):
    settings = {"mask": BIDIRECTIONAL, "ids": IDS, **settings}
    return log_likelihoods(MODEL, {}, questions, **settings)


def many(question, *, num_samples, estimator, num=200):
    """Scores one question under many independent noises."""
    repeated = [question._replace(noise=number) for number in range(num)]
    return scores(repeated, num_samples=num_samples, estimator=estimator, batch_size=256)


# ---- against enumeration


@pytest.mark.parametrize("question", [WHOLE, Question(ROW[:1], ROW[1:3], ROW[3:])])
def test_an_answer_with_few_sets_of_masks_is_scored_exactly(question):
    (score,) = scores([question], num_samples=15)
    answer = range(len(question.before), len(question.before) + len(question.answer))
    assert score.log_likelihood == pytest.approx(bound_by_enumeration(ROW, answer), rel=1e-6)
    assert score.standard_error == 0
    assert score.num_passes == 2 ** len(question.answer) - 1


def test_an_answer_of_one_token_takes_one_pass_whatever_the_number_of_samples():
    for num_samples in (1, 128):
        (score,) = scores([Question(ROW[:2], ROW[2:3], ROW[3:])], num_samples=num_samples)
        assert score.log_likelihood == pytest.approx(bound_by_enumeration(ROW, range(2, 3)))
        assert (score.standard_error, score.num_passes) == (0, 1)


@pytest.mark.parametrize(
    ("estimator", "num_rows"), [("exact_count", 4), ("confidence_order", 1), ("uniform_time", 32)]
)
def test_a_batch_has_no_more_rows_than_its_answers_need(estimator, num_rows, monkeypatch):
    """Of two tokens there are three sets, and a batch is filled up to a power of two."""
    sizes, batches = [], answer_rows._batches

    def spy(pieces, batch_size):
        sizes.append(batch_size)
        return batches(pieces, batch_size)

    monkeypatch.setattr(answer_rows, "_batches", spy)
    scores([Question(ROW[:2], ROW[2:])], num_samples=128, estimator=estimator)
    assert sizes == [num_rows]


@pytest.mark.parametrize(("estimator", "eps"), [("exact_count", None), ("uniform_time", 1e-3)])
def test_both_estimators_are_unbiased(estimator, eps):
    """The mean of 200 independent scores lies within 4 of its own standard errors, which chance
    violates once in 15,000 runs of new seeds.
    """
    found = many(WHOLE, num_samples=8, estimator=estimator)
    values = np.array([score.log_likelihood for score in found])
    expected = bound_by_enumeration(ROW, range(4), eps=eps)
    assert abs(values.mean() - expected) < 4 * values.std() / math.sqrt(len(values))
    assert values.std() > 0


def test_in_confidence_order_the_likeliest_of_the_true_tokens_is_revealed_first():
    questions = [
        Question(row[:first], row[first:last], row[last:])
        for row in itertools.product(range(SYMBOLS), repeat=LENGTH)
        for first, last in ((0, 4), (1, 3), (2, 4), (3, 4))
    ]
    found = scores(questions, estimator="confidence_order", batch_size=64)
    for question, score in zip(questions, found, strict=True):
        row = (*question.before, *question.answer, *question.after)
        first, expected = len(question.before), 0.0
        hidden = set(range(first, first + len(question.answer)))
        while hidden:
            costs = {place: nll(row, place, frozenset(hidden)) for place in hidden}
            best = min(costs, key=costs.get)
            expected -= costs[best]
            hidden.remove(best)
        assert score.log_likelihood == pytest.approx(expected, rel=1e-5, abs=1e-5)
        assert (score.standard_error, score.num_passes) == (0, len(question.answer))
    # not a bound: over all rows, the probabilities add up to more than 1 here
    whole = [score for question, score in zip(questions, found) if len(question.answer) == LENGTH]
    assert sum(math.exp(score.log_likelihood) for score in whole) > 1.01


def test_exact_counts_have_the_smaller_variance():
    spread = {
        name: np.std([s.log_likelihood for s in many(WHOLE, num_samples=8, estimator=name)])
        for name in ("exact_count", "uniform_time")
    }
    assert spread["exact_count"] < 0.5 * spread["uniform_time"]


def test_the_standard_error_is_the_spread_of_independent_repetitions():
    found = many(WHOLE, num_samples=12, estimator="exact_count")
    spread = np.std([score.log_likelihood for score in found])
    reported = np.mean([score.standard_error**2 for score in found]) ** 0.5
    assert reported / spread == pytest.approx(1, abs=0.25)


def test_the_number_of_masks_is_spread_evenly_over_all_samples():
    """Of a model whose nll is the share of masks, the bound of 40 tokens is 20.5 nats; the mean of
    32 independent counts would miss it by 2.04 nats (40 / sqrt(12 * 32)).
    """
    means = []
    for noise in range(50):
        question = Question((), (0,) * 40, noise=noise)
        draws = draws_of(question, estimator="exact_count", num_samples=32, seed=0)
        k = draws.is_masked_NL.sum(axis=1)
        means.append(np.mean(draws.weight_N * k * k / 40))
    assert np.std(means) < 0.4
    assert np.mean(means) == pytest.approx(20.5, abs=0.2)


def test_the_weights_of_all_sets_are_a_distribution_times_l_over_k():
    for length in range(1, 8):
        is_masked, weights, _ = every_subset(length)
        k = is_masked.sum(axis=1)
        np.testing.assert_allclose((weights * k / length).mean(), 1)
        assert len(set(map(tuple, is_masked))) == 2**length - 1


# ---- what a score depends on


def test_answers_to_one_prompt_share_their_noise_as_far_as_they_go():
    """The times are the same, and so are the masks of the tokens that both have, up to the share
    that the number of masks decides.
    """
    short, long = Question((1, 2), (0,) * 30), Question((1, 2), (1,) * 40)
    draws = {
        estimator: [
            draws_of(question, estimator=estimator, num_samples=64, seed=3).is_masked_NL[:, :30]
            for question in (short, long)
        ]
        for estimator in ("exact_count", "uniform_time")
    }
    np.testing.assert_array_equal(*draws["uniform_time"])
    a, b = draws["exact_count"]
    assert (a == b).mean() > 0.9
    there, around = Question((1, 3), short.answer), Question((1,), short.answer, (2,))
    for question, seed in ((there, 3), (around, 3), (short, 4)):
        other = draws_of(question, estimator="exact_count", num_samples=64, seed=seed)
        assert (a == other.is_masked_NL).mean() < 0.8


def test_two_models_are_compared_under_the_same_noise():
    """Over 200 seeds, the difference of two models varies less than half as much as it would under
    independent noise; here it is a fifth.
    """
    milder = types.SimpleNamespace(
        hidden_fn=MODEL.hidden_fn,
        head_fn=lambda params, hidden: 0.8 * MODEL.head_fn(params, hidden),
    )
    settings = {"mask": BIDIRECTIONAL, "ids": IDS, "num_samples": 8, "batch_size": 256}
    here, there = (
        np.array(
            [
                score.log_likelihood
                for score in log_likelihoods(
                    model, {}, [WHOLE._replace(noise=n) for n in range(400)], **settings
                )
            ]
        )
        for model in (MODEL, milder)
    )
    same_noise, other_noise = here[:200] - there[:200], here[:200] - there[200:]
    assert np.std(same_noise) < 0.5 * np.std(other_noise)


def test_answers_to_one_prompt_are_compared_under_the_same_noise():
    """Of a token, let the nll grow with the share of masks, and differ by token and answer: the
    difference of two answers, one twice as surprising as the other, then varies less than half as
    much under shared noise. Its mean over 200 seeds is the same within 4 errors.
    """
    cost_AL = np.random.default_rng(0).uniform([[0.5], [1.0]], [[1.5], [3.0]], (2, 40))

    def score(answer: int, noise: int) -> float:
        question = Question((1, 2), (answer,) * 40, noise=noise)
        is_masked_NL, weight_N, _ = draws_of(
            question, estimator="exact_count", num_samples=16, seed=0
        )
        nll_N = (is_masked_NL * cost_AL[answer]).sum(axis=1) * is_masked_NL.mean(axis=1)
        return -float(np.mean(weight_N * nll_N))

    easy, hard = (np.array([score(answer, n) for n in range(400)]) for answer in (0, 1))
    same_noise, other_noise = easy[:200] - hard[:200], easy[:200] - hard[200:]
    assert np.std(same_noise) < 0.5 * np.std(other_noise)
    error = math.hypot(np.std(same_noise), np.std(other_noise)) / math.sqrt(200)
    assert abs(same_noise.mean() - other_noise.mean()) < 4 * error


def network(mask=BIDIRECTIONAL):
    model = make_model(SMALL, mask=mask)
    return model, perturbed(model)


def random_questions(num, *, longest=8, after=True, seed=0):
    rng = np.random.default_rng(seed)

    def ids(low, high):
        return tuple(int(i) for i in rng.integers(1, 90, rng.integers(low, high)))

    return [
        Question(ids(0, longest), ids(1, longest), ids(0, 8) if after else ()) for _ in range(num)
    ]


SMALL_IDS = type("Ids", (), {"mask_id": 96, "pad_id": 0, "bos_id": 95})


@pytest.mark.slow
@pytest.mark.parametrize("mask", [BIDIRECTIONAL, CAUSAL])
def test_a_score_is_the_same_alone_and_in_any_batch(mask):
    model, params = network(mask)
    questions = random_questions(9, after=not mask.causal)
    settings = {"mask": mask, "ids": SMALL_IDS, "num_samples": 12}
    together = log_likelihoods(model, params, questions, batch_size=16, **settings)
    for question, expected in zip(questions[:4], together):
        (alone,) = log_likelihoods(model, params, [question], **settings)
        np.testing.assert_allclose(alone[:4], expected[:4], rtol=2e-5, atol=1e-6)
        assert alone.is_most_likely == expected.is_most_likely


@pytest.mark.slow
def test_a_score_is_the_same_on_a_mesh():
    model, params = network()
    questions = random_questions(5)
    settings = {"mask": BIDIRECTIONAL, "ids": SMALL_IDS, "num_samples": 12}
    expected = log_likelihoods(model, params, questions, **settings)
    mesh = make_mesh({"fsdp": 2, "sequence": 2, "tensor": 2}, jax.devices()[:8])
    found = log_likelihoods(model, params, questions, mesh=mesh, batch_size=3, **settings)
    np.testing.assert_allclose([s[:2] for s in found], [s[:2] for s in expected], rtol=2e-5)


@pytest.mark.slow
def test_padding_changes_nothing():
    """The same row through the network, without any padding, by hand."""
    model, params = network()
    before, answer, after = (5, 6, 7), (8, 9), (10, 11, 12, 13)
    tokens = np.array([*before, *answer, *after], np.int32)
    is_masked, weights, _ = every_subset(2)
    total = 0.0
    for chosen, weight in zip(is_masked, weights):
        noisy = tokens.copy()
        noisy[3:5][chosen] = 96
        logits = model.logits_fn(params, noisy[None], None, np.arange(9)[None])[0, 3:5]
        nll = -jax.nn.log_softmax(logits)[np.arange(2), answer]
        total -= weight * float(nll[chosen].sum()) / 3
    (score,) = log_likelihoods(
        model, params, [Question(before, answer, after)], mask=BIDIRECTIONAL, ids=SMALL_IDS
    )
    assert score.log_likelihood == pytest.approx(total, rel=1e-5)


@pytest.mark.slow
def test_guidance_combines_the_logits_with_and_without_what_surrounds_the_answer():
    model, params = network()
    before, target, after, w = (5, 6), 8, (10,), 0.5
    rows = np.array([[5, 6, 96, 10], [96, 96, 96, 96]], np.int32)
    positions = np.broadcast_to(np.arange(4), (2, 4))
    logits, unprompted = np.asarray(model.logits_fn(params, rows, None, positions), np.float64)[
        :, 2
    ]
    guided = unprompted + (w + 1) * (logits - unprompted)
    expected = guided[target] - np.log(np.exp(guided).sum())
    (score,) = log_likelihoods(
        model,
        params,
        [Question(before, (target,), after)],
        mask=BIDIRECTIONAL,
        ids=SMALL_IDS,
        cfg_scale=w,
    )
    assert score.log_likelihood == pytest.approx(expected, rel=1e-5, abs=1e-5)


@pytest.mark.slow
def test_an_autoregressive_score_is_the_chain_rule():
    model, params = network(CAUSAL)
    tokens = np.array([5, 6, 7, 8, 9], np.int32)
    inputs = np.array([[95, 5, 6, 7, 8]], np.int32)
    logits = model.logits_fn(params, inputs, None, np.arange(5)[None])[0]
    log_p = jax.nn.log_softmax(logits)[np.arange(5), tokens]
    settings = {"mask": CAUSAL, "ids": SMALL_IDS}
    (score,) = log_likelihoods(model, params, [Question((5, 6), (7, 8, 9))], **settings)
    assert score.log_likelihood == pytest.approx(float(log_p[2:].sum()), rel=1e-5)
    assert (score.standard_error, score.num_passes) == (0, 1)
    (whole,) = log_likelihoods(model, params, [Question((), tuple(tokens))], **settings)
    assert whole.log_likelihood == pytest.approx(float(log_p.sum()), rel=1e-5)
    likeliest = int(np.argmax(logits[2]))
    (best,) = log_likelihoods(model, params, [Question((5, 6), (likeliest,))], **settings)
    assert best.is_most_likely
    assert not whole.is_most_likely


@pytest.mark.slow
def test_a_long_answer_is_scored_in_pieces_as_it_would_be_whole():
    model, params = network(CAUSAL)
    answer = tuple(int(i) for i in np.random.default_rng(0).integers(1, 90, 130))
    (score,) = log_likelihoods(model, params, [Question((), answer)], mask=CAUSAL, ids=SMALL_IDS)
    inputs = np.array([[95, *answer[:-1]]], np.int32)
    logits = model.logits_fn(params, inputs, None, np.arange(130)[None])[0]
    expected = jax.nn.log_softmax(logits)[np.arange(130), np.array(answer)].sum()
    assert score.log_likelihood == pytest.approx(float(expected), rel=1e-5)


def test_answers_of_other_lengths_share_the_programs_of_their_widths():
    """Prompts of up to 8 tokens with answers of up to 8, and of 9 to 16, are two programs."""
    stand_in = types.SimpleNamespace(
        hidden_fn=lambda params, tokens_BT, *_: jax.nn.one_hot(tokens_BT, 8),
        head_fn=lambda params, hidden_BTD: hidden_BTD,
    )

    def num_compiled(lengths) -> int:
        before = nll_of_answers._cache_size()
        questions = [Question((1,) * prompt, (2,) * answer) for prompt, answer in lengths]
        log_likelihoods(
            stand_in,
            {},
            questions,
            mask=BIDIRECTIONAL,
            ids=types.SimpleNamespace(mask_id=3, pad_id=0),
            num_samples=4,
            batch_size=4,
        )
        return nll_of_answers._cache_size() - before

    assert num_compiled([(3, 5), (8, 8), (1, 9), (4, 16)]) == 2
    assert num_compiled([(7, 4), (2, 6), (5, 7), (6, 10), (8, 13)]) == 0


def test_widths_are_few_and_close_to_the_length():
    widths = {bucket(length) for length in range(4097)}
    assert len(widths) < 30
    assert all(bucket(n) >= n for n in range(4097))
    assert max(bucket(n) / n for n in range(257, 4097)) <= 1.25
    assert all(width <= 64 or width % 64 == 0 for width in widths)


# ---- text, and what is refused


def test_a_pair_is_cut_where_the_prompt_alone_ends_and_gives_its_spaces_to_the_answer():
    tokenizer = load_tokenizer("bytes")
    assert encode_pair(tokenizer, "a b  ", "c") == Question((97, 32, 98), (32, 32, 99))
    with pytest.raises(UserError, match="adds no token"):
        encode_pair(tokenizer, "a", "")


@pytest.mark.parametrize(
    ("question", "settings", "message"),
    [
        (Question((1,), ()), {}, "Answer 0 is empty"),
        (WHOLE, {"num_samples": 0}, "mc_samples=0 must be at least 1"),
        (WHOLE, {"estimator": "exact"}, "'exact' must be one of exact_count, uniform_time"),
        (WHOLE, {"cfg_scale": -1.0}, "cfg_scale=-1.0"),
        (WHOLE, {"seed": -1}, "seed=-1"),
        (WHOLE, {"batch_size": 0}, "batch_size=0"),
        (WHOLE, {"mask": Mask(block_length=4)}, "attention has blocks"),
        (Question((1,), (2,), (0,)), {"mask": CAUSAL}, "has text after it"),
        (WHOLE, {"mask": CAUSAL, "cfg_scale": 0.5}, "is autoregressive"),
    ],
)
def test_what_cannot_be_scored_is_refused(question, settings, message):
    with pytest.raises(UserError, match=message):
        scores([question], **settings)

"""Which tokens are kept: each criterion against plain numpy, and the bounds between them."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.toy_networks import MASK, PAD, toy_logits, toy_params, windowed

from llada_jax.errors import UserError
from llada_jax.samplers.commit import CRITERIA, Commit, count_kept, parse_commit
from llada_jax.samplers.text import generate_tokens

RULES = ["schedule", "threshold=0.6", "factor=1.4", "frechet=0.1", "entropy=1.2"]


def reference_count(name, probabilities, entropies, amount):
    """The criteria as the papers state them, for the hidden positions of one row, in float64."""
    c = sorted((float(p) for p in probabilities), reverse=True)
    H = sorted(float(h) for h in entropies)
    best = 0
    for n in range(1, len(c) + 1):
        lower = max(0.0, sum(c[:n]) - (n - 1))
        holds = {
            "threshold": c[n - 1] > amount,
            "factor": (n + 1) * (1 - c[n - 1]) < amount,
            "frechet": lower - (1 - c[n - 1]) > amount,
            "entropy": sum(H[:n]) - max(H[:n]) <= amount,
        }[name]
        best = n if holds else best
    return best


@settings(max_examples=60, deadline=None, derandomize=True)
@given(name=st.sampled_from(sorted(CRITERIA)), seed=st.integers(0, 10**6))
def test_each_criterion_counts_as_its_paper_says(name, seed):
    rng = np.random.default_rng(seed)
    probability_BT = (rng.random((3, 8)) ** rng.choice([0.05, 0.3, 1.0])).astype(np.float32)
    entropy_BT = (rng.random((3, 8)) * rng.choice([0.1, 1.0])).astype(np.float32)
    is_hidden_BT = rng.random((3, 8)) < 0.7
    amount = np.float32(rng.random())
    count_B = count_kept(
        name,
        jnp.asarray(probability_BT),
        jnp.asarray(entropy_BT),
        jnp.asarray(is_hidden_BT),
        amount,
    )
    expected = [
        reference_count(name, p[where], h[where], amount)
        for p, h, where in zip(probability_BT, entropy_BT, is_hidden_BT, strict=True)
    ]
    assert count_B.tolist() == expected


@pytest.mark.parametrize(
    ("name", "amount", "expected"),
    [("threshold", 0.75, 0), ("factor", 0.5, 0), ("frechet", 0.5, 0), ("entropy", 0.75, 3)],
)
def test_what_equals_the_amount_is_kept_by_entropy_alone(name, amount, expected):
    probability_BT, entropy_BT = jnp.array([[0.75, 0.5, 0.25]]), jnp.array([[0.25, 0.5, 1.0]])
    is_hidden_BT = jnp.ones((1, 3), bool)
    count_B = count_kept(name, probability_BT, entropy_BT, is_hidden_BT, np.float32(amount))
    assert count_B.tolist() == [expected]


@pytest.mark.parametrize("c", [0.5, 0.9, 0.95, 0.97, 0.99])
@pytest.mark.parametrize("delta", [0.0, 0.1, 0.25])
def test_for_equal_confidences_frechet_is_factor_with_the_rest_of_the_margin(c, delta):
    probability_BT = jnp.full((1, 32), c, jnp.float32)
    rest = (probability_BT, jnp.zeros((1, 32)), jnp.ones((1, 32), bool))
    frechet_B = count_kept("frechet", rest[0], rest[1], rest[2], np.float32(delta + 1e-4))
    factor_B = count_kept("factor", rest[0], rest[1], rest[2], np.float32(1 - delta - 1e-4))
    assert frechet_B.tolist() == factor_B.tolist()


def test_doubts_near_certainty_are_not_rounded_away():
    """A plain sum of 1,000 float32 probabilities of 1 - 1e-6 is off by more than their doubts."""
    probability_BT = jnp.full((1, 1000), 1 - 1e-6, jnp.float32)
    is_hidden_BT = jnp.ones((1, 1000), bool)
    no_entropy_BT = jnp.zeros((1, 1000))
    for amount in (0.9989, 0.9995):
        doubt = 1 - np.float64(np.float32(1 - 1e-6))
        expected = min(1000, int(np.floor((1 - amount) / doubt)) - 1)
        count = count_kept(
            "frechet", probability_BT, no_entropy_BT, is_hidden_BT, np.float32(amount)
        )
        assert abs(int(count[0]) - expected) <= 1


def sample(prompts, **changes):
    request = {"mask_id": MASK, "pad_id": PAD, "gen_length": 12, "block_length": 6} | changes
    return generate_tokens(toy_logits, toy_params(3), prompts, **request)


def test_a_threshold_of_one_reveals_one_token_per_step():
    expected_BT, steps_B = sample([[1, 2], [3]])
    tokens_BT, num_steps_B = sample([[1, 2], [3]], commit="threshold=1.0")
    np.testing.assert_array_equal(tokens_BT, expected_BT)
    assert num_steps_B.tolist() == steps_B.tolist() == [12, 12]


def test_a_row_that_is_sure_of_all_tokens_needs_one_pass_per_block():
    @windowed
    def sure_of_odd_prompts(params, tokens_BT, segment_ids_BT, positions_BT):
        is_odd_B = tokens_BT.max(axis=1, where=tokens_BT < 9, initial=0) % 2
        scale_B = jnp.where(is_odd_B, 40.0, 0.1)
        return scale_B[:, None, None] * jnp.eye(16)[positions_BT % 9]

    tokens_BT, num_steps_B = generate_tokens(
        sure_of_odd_prompts,
        {},
        [[7], [8]],
        mask_id=MASK,
        pad_id=PAD,
        gen_length=8,
        block_length=4,
        commit="threshold",
    )
    assert num_steps_B.tolist() == [2, 8], "the sure row does not wait, the other is not hurried"
    assert tokens_BT[0].tolist() == [(1 + i) % 9 for i in range(8)]


@pytest.mark.slow
@settings(max_examples=4, deadline=None, derandomize=True)
@given(
    prompts=st.lists(st.lists(st.integers(0, 13), max_size=5), min_size=2, max_size=4),
    seed=st.integers(0, 99),
)
@pytest.mark.parametrize("commit", RULES)
def test_any_row_alone_is_the_same_row_in_any_batch(commit, prompts, seed):
    request = {"commit": commit, "temperature": 1.0, "seed": seed, "eos_id": 14}
    # Rows of one batch size, so that nothing is compiled again: the others are copies.
    prompts = [*prompts, *prompts][:4]
    together_BT, together_B = sample(prompts, **request)
    for row, prompt in enumerate(prompts):
        others = [[5], [6, 7]]
        mixed = [*others[:row], *[[8]] * max(0, row - 2), prompt, [9], [1, 2, 3]][: row + 1]
        mixed += [[4]] * (4 - len(mixed))
        mixed_BT, mixed_B = sample(mixed, **request)
        np.testing.assert_array_equal(mixed_BT[row], together_BT[row])
        assert mixed_B[row] == together_B[row]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("treshold", "Did you mean 'threshold'?"),
        ("threshold=1.5", "must be a number between 0 and 1; the usual one is threshold=0.9."),
        ("threshold=", "must be a number between 0 and 1"),
        ("frechet=nan", "must be a number between 0 and 1"),
        ("factor=-1", "must be a number between 0 and"),
        ("schedule=3", "the schedule takes no amount"),
    ],
)
def test_wrong_criteria_are_refused_with_the_usual_amount(text, sentence):
    with pytest.raises(UserError) as error:
        parse_commit(text)
    assert sentence in str(error.value)


def test_a_criterion_without_an_amount_takes_the_published_one():
    assert parse_commit("threshold") == Commit("threshold", 0.9)
    assert parse_commit("frechet") == Commit("frechet", 0.25)
    assert parse_commit("schedule") == Commit("schedule", 0.0)


@pytest.mark.parametrize("remasking", ["random", "margin"])
def test_a_criterion_with_another_order_is_refused(remasking):
    with pytest.raises(UserError, match="leave remasking out, or use commit=schedule"):
        sample([[1]], commit="threshold", remasking=remasking)


def test_steps_bound_the_passes_of_every_criterion():
    _, num_steps_B = sample([[1, 2], [3]], commit="threshold=1.0", steps=4)
    assert num_steps_B.tolist() == [4, 4]

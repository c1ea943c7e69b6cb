"""Tokens that go back to the mask: each rule against plain numpy, and what no rule may do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.reference_reviser import reference_revise
from support.toy_networks import (
    EOS,
    MASK,
    PAD,
    VOCAB,
    toy_logits,
    toy_logits_of_row,
    toy_params,
    windowed,
)

from llada_jax.errors import UserError
from llada_jax.samplers.revise import REVISERS, Revise, parse_revise, taken_back_by_chance
from llada_jax.samplers.text import generate_tokens, infill_tokens

# Amounts at which a short generation of a toy network revises something.
RULES = ["remdm-cap=0.4", "remdm-rescale=0.6", "remdm-loop=0.5", "wino=0.5"]
PROMPTS = [[1, 2, 3], [4], [5, 6], []]


def shadow_of(logits_of_row):
    """Returns the shadow function of a network: every token of the window in turn is masked."""

    def shadow_fn(params, tokens_BT, segment_ids_BT, positions_BT, mask_id, *, start, length):
        def at(i):
            column = start + i
            masked_BT = tokens_BT.at[:, column].set(mask_id)
            logits_BTV = logits_of_row(params, masked_BT, segment_ids_BT, positions_BT)
            return jax.lax.dynamic_index_in_dim(logits_BTV, column, axis=1, keepdims=False)

        logits_BTV = logits_of_row(params, tokens_BT, segment_ids_BT, positions_BT)
        shadow_BTV = jnp.stack([at(i) for i in range(length)], axis=1)
        return jax.lax.dynamic_slice_in_dim(logits_BTV, start, length, axis=1), shadow_BTV

    return shadow_fn


toy_shadow = shadow_of(toy_logits_of_row)


def sample(prompts, **changes):
    request = {"mask_id": MASK, "pad_id": PAD, "gen_length": 24, "block_length": 12} | changes
    return generate_tokens(toy_logits, toy_params(3), prompts, shadow_fn=toy_shadow, **request)


@pytest.mark.parametrize(
    ("revise", "commit", "steps"),
    [
        pytest.param("remdm-cap=0.4", "schedule", 24, marks=pytest.mark.slow),
        pytest.param("remdm-cap=0.4", "threshold=0.35", 12, marks=pytest.mark.slow),
        ("remdm-rescale=0.6", "threshold=0.35", 24),
        ("remdm-loop=0.5", "schedule", 24),
        ("wino=0.5", "threshold=0.35", 24),
        pytest.param("wino=0.5", "schedule", 12, marks=pytest.mark.slow),
    ],
)
def test_each_rule_samples_what_its_paper_says(revise, commit, steps):
    rule, amount = parse_revise(revise)
    request = {"temperature": 0.8, "seed": 5, "steps": steps}
    tokens_BT, _ = sample(PROMPTS, revise=revise, commit=commit, **request)
    threshold = {"threshold": float(commit.partition("=")[2])} if commit != "schedule" else {}
    num_revised = 0
    for row, prompt in enumerate(PROMPTS):
        expected_T, revised = reference_revise(
            toy_params(3),
            prompt,
            rule=rule,
            amount=amount,
            gen_length=24,
            block_length=12,
            row=row,
            **request,
            **threshold,
        )
        np.testing.assert_array_equal(tokens_BT[row], expected_T)
        num_revised += revised
    assert num_revised


@pytest.mark.slow
@pytest.mark.parametrize("revise", RULES)
def test_any_row_alone_is_the_same_row_in_any_batch(revise):
    request = {"revise": revise, "steps": 12, "temperature": 1.0, "eos_id": EOS}
    together_BT, together_B = sample(PROMPTS, **request)
    alone_BT, alone_B = sample(PROMPTS, batch_size=1, **request)
    np.testing.assert_array_equal(alone_BT, together_BT)
    np.testing.assert_array_equal(alone_B, together_B)


@pytest.mark.parametrize(
    "revise", [pytest.param("remdm-cap=0", marks=pytest.mark.slow), "remdm-rescale=0", "wino=0"]
)
def test_an_amount_of_zero_revises_nothing(revise):
    request = {"steps": 12, "temperature": 1.0}
    expected_BT, expected_B = sample(PROMPTS, **request)
    tokens_BT, num_steps_B = sample(PROMPTS, revise=revise, **request)
    np.testing.assert_array_equal(tokens_BT, expected_BT)
    np.testing.assert_array_equal(num_steps_B, expected_B)


def num_masks_after_steps(**settings) -> np.ndarray:
    masks = []

    def on_step(rows, state):
        masks.append((np.asarray(state.canvas_BT)[:, -24:] == MASK).sum(axis=1))

    sample(PROMPTS, on_step=on_step, block_length=24, temperature=1.0, **settings)
    return np.array(masks)


@pytest.mark.parametrize(
    "revise", ["remdm-cap=0.9", pytest.param("remdm-rescale=1", marks=pytest.mark.slow)]
)
def test_remdm_leaves_as_many_hidden_as_the_schedule(revise):
    np.testing.assert_array_equal(
        num_masks_after_steps(revise=revise, steps=8), num_masks_after_steps(steps=8)
    )


def test_the_loop_holds_a_tenth_of_the_block_hidden():
    masks_SB = num_masks_after_steps(revise="remdm-loop=0.3", steps=24)
    # 24 steps: 10 of them reveal 22 of 24 tokens, 12 hold, 2 reveal the rest.
    assert (masks_SB[9:22] == 2).all()
    assert (masks_SB[-1] == 0).all()


def test_the_loop_takes_tokens_back_from_its_first_step_to_its_last():
    def taken_back(step):
        return taken_back_by_chance(
            "remdm-loop",
            jnp.float32(1),
            jnp.arange(10)[None] < 6,
            jnp.array([4]),
            jax.random.split(jax.random.key(0), 1),
            step=jnp.int32(step),
            steps=jnp.int32(40),
        )

    # 45% and 95% of 40
    assert [step for step in range(40) if taken_back(step).any()] == list(range(18, 38))


@pytest.mark.parametrize(
    ("name", "amount", "chance"),
    [("remdm-cap", 0.1, 0.1), ("remdm-cap", 0.9, 0.25), ("remdm-rescale", 0.4, 0.1)],
)
def test_remdm_masks_again_with_the_chance_of_its_equation(name, amount, chance):
    """80,000 draws: a share that is off by 5 standard errors is seen once in a million."""
    is_kept_BT = jnp.arange(25_000)[None].repeat(4, axis=0) < 20_000
    back_BT = taken_back_by_chance(
        name,
        jnp.float32(amount),
        is_kept_BT,
        jnp.full(4, 5_000),
        jax.random.split(jax.random.key(0), 4),
        step=jnp.int32(0),
        steps=jnp.int32(8),
    )
    assert not (back_BT & ~is_kept_BT).any()
    # The rows are cut off at 5,000, which a chance of 0.25 reaches in about half of them.
    share, error = float(back_BT.sum()) / 80_000, np.sqrt(chance * (1 - chance) / 80_000)
    assert chance - 5 * error - (0.002 if chance == 0.25 else 0) < share < chance + 5 * error
    assert (back_BT.sum(axis=1) <= 5_000).all()


def test_a_draft_that_contradicts_itself_is_taken_back_and_done_again():
    """Each of two tokens follows the other: drafted together they miss each other."""

    def follows_row(params, tokens_BT, segment_ids_BT, positions_BT):
        # Position 0 proposes 3; position 1 proposes 5 while position 0 is hidden, and 4 after 3.
        is_known_B = (tokens_BT == 3).any(axis=1)
        second_B = jnp.where(is_known_B, 4, 5)
        wanted_BT = jnp.where(positions_BT == 0, 3, second_B[:, None])
        wanted_BT = jnp.where(positions_BT > 1, 6, wanted_BT)
        return 4.0 * jax.nn.one_hot(wanted_BT, VOCAB)

    request = {
        "mask_id": MASK,
        "pad_id": PAD,
        "gen_length": 8,
        "commit": "threshold=0.5",
        "shadow_fn": shadow_of(follows_row),
    }
    hasty_BT, _ = generate_tokens(windowed(follows_row), {}, [[]], **request)
    assert hasty_BT[0, :2].tolist() == [3, 5]
    tokens_BT, num_steps_B = generate_tokens(
        windowed(follows_row), {}, [[]], revise="wino=0.5", **request
    )
    assert tokens_BT[0].tolist() == [3, 4, 6, 6, 6, 6, 6, 6]
    assert 2 <= num_steps_B[0] <= 8


@pytest.mark.parametrize("revise", RULES)
def test_given_tokens_stay_and_every_gap_is_filled(revise):
    texts = [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10], [7, 7, 7, 7, 7, 7]]
    is_given = [[i % 3 == 0 for i in range(10)], [True, False, False, False, False, True]]
    filled, _ = infill_tokens(
        toy_logits,
        toy_params(1),
        texts,
        is_given,
        mask_id=MASK,
        pad_id=PAD,
        steps=3,
        revise=revise,
        shadow_fn=toy_shadow,
        temperature=1.0,
    )
    for tokens, text, given in zip(filled, texts, is_given, strict=True):
        assert MASK not in tokens
        assert all(token == kept for token, kept, stays in zip(tokens, text, given) if stays)


def test_rules_are_named_with_or_without_an_amount():
    assert parse_revise("none") == Revise("none", 0.0)
    assert parse_revise("wino") == Revise("wino", REVISERS["wino"].default)
    assert parse_revise("remdm-cap=0.02") == Revise("remdm-cap", 0.02)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"revise": "wyno"}, "Did you mean 'wino'?"),
        ({"revise": "wino=2"}, "between 0 and 1; the usual one is wino=0.9."),
        ({"revise": "remdm-cap=x"}, "the usual one is remdm-cap=0.008."),
        ({"revise": "none=1"}, "takes no amount"),
        ({"revise": "wino", "cache": "dual"}, "without a cache; leave cache=dual out"),
        ({"revise": "wino", "cache": "prefix"}, "without a cache; leave cache=prefix out"),
        ({"revise": "remdm-loop", "commit": "threshold"}, "has a schedule of its own"),
    ],
)
def test_impossible_rules_are_refused(settings, sentence):
    with pytest.raises(UserError) as error:
        sample([[1]], **settings)
    assert sentence in str(error.value)

"""The sliding window: every token once, the bound of a text by hand, and its units."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.networks import perturbed, variant

from llada_jax.data.tokenizer import load_tokenizer
from llada_jax.errors import UserError
from llada_jax.evaluation.answer_rows import Question
from llada_jax.evaluation.conditional import log_likelihoods
from llada_jax.evaluation.rolling import bounds_of_texts, windows
from llada_jax.masks import BIDIRECTIONAL, CAUSAL
from llada_jax.models.model import make_model

BYTES = load_tokenizer("bytes")
A = variant(vocab_size=BYTES.vocab_size)


@given(st.integers(0, 200), st.integers(1, 30), st.data())
def test_every_token_is_in_one_answer_and_no_window_is_too_long(num, length, data):
    context = data.draw(st.integers(0, length - 1))
    tokens = list(range(num))
    cut = windows(tokens, length=length, context=context)
    assert [token for window in cut for token in window.answer] == tokens
    for window in cut[1:]:
        assert len(window.before) >= context
        assert window.before[-1:] == (window.answer[0] - 1,) * bool(window.before)
    assert all(len(window.before) + len(window.answer) <= length for window in cut)


def test_windows_that_are_alike_have_noise_of_their_own():
    """Under the same noise their errors would be the same, and the sum of them larger than said."""
    cut = windows([1, 2, 3, 4] * 8, length=8, context=4)
    assert len({window.noise for window in cut}) == len(cut) == 7


def test_a_context_as_long_as_the_window_is_refused():
    with pytest.raises(UserError, match="context=8 must be at least 0 and less than the window"):
        windows([1, 2], length=8, context=8)


@pytest.mark.slow
def test_a_text_that_fits_the_window_has_the_bound_of_one_answer():
    model = make_model(A)
    params = perturbed(model)
    settings = {"mask": BIDIRECTIONAL, "num_samples": 16}
    (bound,) = bounds_of_texts(
        model,
        params,
        ["caf\N{LATIN SMALL LETTER E WITH ACUTE}"],
        tokenizer=BYTES,
        length=16,
        **settings,
    )
    tokens = BYTES.encode("caf\N{LATIN SMALL LETTER E WITH ACUTE}")
    (question,) = windows(tokens, length=16, context=8)
    (score,) = log_likelihoods(model, params, [question], ids=BYTES, **settings)
    assert (bound.num_tokens, bound.num_bytes) == (5, 5)
    assert bound.nats_per_token == pytest.approx(-score.log_likelihood / 5)
    assert bound.standard_error == pytest.approx(score.standard_error / 5)
    assert bound.bits_per_byte == pytest.approx(bound.nats_per_token / math.log(2))


class DropsLineEnds:
    """The tokenizer of bytes, but that it loses line ends, as some of SentencePiece do."""

    def __getattr__(self, name):
        return getattr(BYTES, name)

    def encode(self, text):
        return BYTES.encode(text.replace("\n", ""))


@pytest.mark.slow
def test_bytes_that_the_tokenizer_loses_do_not_lower_the_bound_per_byte():
    model = make_model(A)
    params = perturbed(model)
    settings = {"length": 16, "mask": BIDIRECTIONAL, "num_samples": 4}
    (lossy,) = bounds_of_texts(model, params, ["a\n\nb\nc"], tokenizer=DropsLineEnds(), **settings)
    (whole,) = bounds_of_texts(model, params, ["abc"], tokenizer=BYTES, **settings)
    assert lossy == whole
    assert whole.num_bytes == 3


@pytest.mark.slow
def test_the_windows_of_an_autoregressive_model_that_sees_everything_give_the_whole_text():
    """With context for all of the text before it, windows of any cut add up to the chain rule."""
    model = make_model(A, mask=CAUSAL)
    params = perturbed(model)
    text = "it is a truth universally acknowledged"
    tokens = BYTES.encode(text)
    pieces = [Question(tuple(tokens[:i]), tuple(tokens[i : i + 10])) for i in range(0, 38, 10)]
    settings = {"mask": CAUSAL}
    scores = log_likelihoods(model, params, pieces, ids=BYTES, **settings)
    whole, again = bounds_of_texts(
        model, params, [text, text], tokenizer=BYTES, length=64, **settings
    )
    assert whole == again
    expected = -sum(score.log_likelihood for score in scores) / len(tokens)
    assert whole.nats_per_token == pytest.approx(expected, rel=1e-5)
    assert whole.standard_error == 0


@pytest.mark.slow
def test_the_error_of_a_text_is_that_of_its_windows_together():
    model = make_model(A)
    params = perturbed(model)
    text = "".join(chr(97 + i) for i in np.random.default_rng(0).integers(0, 26, 50))
    spread, reported = [], []
    for seed in range(30):
        (bound,) = bounds_of_texts(
            model,
            params,
            [text],
            tokenizer=BYTES,
            length=16,
            mask=BIDIRECTIONAL,
            num_samples=6,
            seed=seed,
            batch_size=64,
        )
        spread.append(bound.nats_per_token)
        reported.append(bound.standard_error**2)
    assert math.sqrt(np.mean(reported)) / np.std(spread) == pytest.approx(1, abs=0.2)


def test_an_empty_text_is_refused():
    with pytest.raises(UserError, match="Text 1 is empty"):
        bounds_of_texts(
            None, {}, ["a", ""], tokenizer=BYTES, length=8, mask=BIDIRECTIONAL, num_samples=2
        )


def test_a_score_that_is_not_a_bound_is_refused():
    with pytest.raises(UserError, match="confidence_order' is not a bound"):
        bounds_of_texts(None, {}, ["a"], tokenizer=BYTES, length=8, estimator="confidence_order")

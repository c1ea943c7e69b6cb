"""`llada_jax.load(...).score` and `.score_text`: text in, log-likelihoods with errors out."""

import math

import jax
import numpy as np
import pytest
from support.exports import LLADA, write_checkpoint
from support.hf_directories import random_params

import llada_jax
from llada_jax import pretrained
from llada_jax.errors import UserError
from llada_jax.evaluation.answer_rows import Question


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    home = tmp_path_factory.mktemp("scores")
    return llada_jax.load(str(write_checkpoint(home / "run", LLADA, random_params(LLADA))))


def test_pairs_of_text_and_of_token_ids_have_the_same_score(model):
    as_text, as_ids, as_question = model.score(
        [
            ("it is a", " truth"),
            (list(b"it is a"), list(b" truth")),
            Question(tuple(b"it is a"), tuple(b" truth")),
        ],
        mc_samples=4,
    )
    assert as_text == as_ids == as_question
    assert as_text.num_tokens == 6
    assert as_text.num_passes == 4
    assert as_text.log_likelihood < 0 < as_text.standard_error


@pytest.mark.slow
def test_the_bound_of_a_text_longer_than_the_rows_of_the_run(model):
    """48 tokens per row; at random weights the bound is near log 320 nats per byte."""
    (bound,) = model.score_text(["it is a truth " * 7], mc_samples=8)
    assert (bound.num_tokens, bound.num_bytes) == (98, 98)
    assert bound.bits_per_byte == pytest.approx(bound.nats_per_token / math.log(2))
    assert abs(bound.nats_per_token - math.log(320)) < 1


def test_what_is_not_a_list_of_pairs_or_too_long_is_refused(model):
    with pytest.raises(UserError, match="pass a list of"):
        model.score(("a prompt", "an answer"))
    with pytest.raises(UserError, match="Pair 1 has 49 tokens and the model was"):
        model.score([("a", "b"), ("a" * 40, "b" * 9)])
    with pytest.raises(UserError, match="is one text; pass a list"):
        model.score_text("a text")
    for window in (0, 49):
        with pytest.raises(UserError, match=f"window={window} must be at least 1 and at most 48"):
            model.score_text(["a text"], window=window)


@pytest.mark.parametrize("packed", [False, True])
def test_rows_of_records_are_scored_with_the_attention_of_training(model, packed):
    tokens = np.random.default_rng(0).integers(0, 256, (2, 256))
    segments = np.repeat([[1, 2, 0], [1, 1, 0]], [100, 100, 56], axis=1)
    positions = np.broadcast_to(np.arange(256), tokens.shape)
    rows = (tokens, tokens, segments > 0, segments, positions)
    network = pretrained.network_for_rows(model, 256, dtype="float32", packed=packed)
    assert network is not model.model
    ours, pieces = (jax.jit(n.nll_fn)(model.params, *rows) for n in (network, model.model))
    np.testing.assert_allclose(ours.nll_BT, pieces.nll_BT, atol=1e-4)
    assert pretrained.network_for_rows(model, 48, dtype="float32", packed=packed) is model.model


@pytest.mark.parametrize(
    ("platform", "length", "packed", "attention"),
    [
        ("gpu", 4096, False, "cudnn"),
        ("gpu", 4096, True, "triton"),
        ("tpu", 4096, True, "splash"),
        ("tpu", 100, True, None),
    ],
)
def test_the_attention_of_rows_follows_platform_and_length(
    model, monkeypatch, platform, length, packed, attention
):
    monkeypatch.setattr(pretrained.sharding, "platform", lambda mesh: platform)
    made = []
    monkeypatch.setattr(pretrained, "make_model", lambda a, **settings: made.append(settings))
    pretrained.network_for_rows(model, length, dtype="bfloat16", packed=packed)
    assert [settings["attention"] for settings in made] == ([attention] if attention else [])

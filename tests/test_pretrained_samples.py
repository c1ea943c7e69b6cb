"""`llada_jax.load(...).generate`, `.complete`, `.best_of` and `.infill`."""

import dataclasses
import warnings

import jax.numpy as jnp
import numpy as np
import pytest
from support.exports import LLADA, write_checkpoint
from support.hf_directories import random_params

import llada_jax
from llada_jax.config import default_config
from llada_jax.errors import UserError
from llada_jax.evaluation.conditional import Score
from llada_jax.samplers.text import Completion


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    home = tmp_path_factory.mktemp("samples")
    return llada_jax.load(str(write_checkpoint(home / "run", LLADA, random_params(LLADA))))


@pytest.mark.slow
def test_a_cache_that_is_refreshed_in_every_step_changes_no_text(model):
    request = {"gen_length": 8, "block_length": 4, "stop_at_eos": False}
    expected = model.generate(["it is", "a"], **request)
    assert model.generate(["it is", "a"], cache="dual", refresh=1, **request) == expected
    tokens_BT = model.generate_tokens(
        [list(b"it")], cache="prefix", refresh=1, gen_length=8, block_length=4
    )
    np.testing.assert_array_equal(
        tokens_BT, model.generate_tokens([list(b"it")], gen_length=8, block_length=4)
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("objective", "settings"),
    [
        ("masked_diffusion", {"cache": "dual", "refresh": 2}),
        ("masked_diffusion", {"commit": "threshold=0.01", "revise": "wino=0.5"}),
        ("autoregressive", {}),
    ],
)
def test_the_loops_of_the_samplers_carry_bfloat16(tmp_path, objective, settings):
    """What a loop or a branch returns must have the dtypes of what goes in."""
    config = default_config()
    config.data.sequence_length = 48
    config.objective.name = objective
    params = random_params(LLADA)
    directory = write_checkpoint(tmp_path / "run", LLADA, params, config=config.to_dict())
    halved = llada_jax.load(str(directory), dtype="bfloat16", keep_float32=False)
    assert halved.params["blocks"]["q"].dtype == jnp.bfloat16
    if objective != "autoregressive":
        settings = {"block_length": 4, **settings}
    (completion,) = halved.complete(["it is"], gen_length=8, stop_at_eos=False, **settings)
    assert len(completion.tokens) == 8
    assert halved.tokenizer.mask_id not in completion.tokens


def test_gaps_are_filled_between_what_is_given(model):
    heard = []
    (text,) = model.infill(
        ["it [MASK:3] a truth"], on_step=lambda rows, state: heard.append((rows, state.step))
    )
    assert heard == [(range(1), 1), (range(1), 2), (range(1), 3)]
    assert text.startswith("it ")
    assert text.endswith(" a truth")


def test_the_best_of_several_texts_is_the_most_likely_per_token(model):
    texts = ["truth", "it is", "", "aaaa", "b", "the"]
    completions = [Completion("it", text, list(text.encode()), 1) for text in texts]
    scores = model.score([("it", text) for text in texts if text], mc_samples=32)
    per_token = [score.log_likelihood / score.num_tokens for score in scores]
    per_token.insert(2, -np.inf)
    expected = [int(np.argmax(per_token[:3])), 3 + int(np.argmax(per_token[3:]))]
    assert model.best_of(completions, 3) == [completions[number] for number in expected]


def test_texts_longer_than_the_rows_of_training_are_compared_too(model, monkeypatch):
    """The model was trained on rows of 48 bytes."""
    asked = []

    def likelihoods(model, params, questions, *, batch_size, **_):
        asked.append(batch_size)
        return [Score(-float(q.answer[0]), 0.0, len(q.answer), 1, None) for q in questions]

    monkeypatch.setattr(llada_jax.loaded_model, "log_likelihoods", likelihoods)
    texts = [Completion("it" * 20, letter * 20, [ord(letter)] * 20, 20) for letter in "bac"]
    assert model.best_of(texts, 3, batch_size=2) == texts[1:2]
    assert asked == [2]


def test_one_text_instead_of_a_list_is_refused(model):
    with pytest.raises(UserError, match=r"pass a list, as in generate"):
        model.generate("it")
    with pytest.raises(UserError, match=r"pass a list, as in infill"):
        model.infill("it [MASK]")
    with pytest.raises(UserError, match="has no gap"):
        model.infill(["it"])


def test_what_may_disappoint_is_warned_of(model, monkeypatch):
    """The model was trained on rows of 48 bytes."""
    requests = {
        "50 tokens together": lambda: model.generate(["it"], gen_length=48),
        "51 tokens together": lambda: model.generate_tokens([[1, 2, 3]], gen_length=48),
        "52 tokens together": lambda: model.infill(["it [MASK:49]"]),
        r"\[MASK:3\] in a prompt is read as letters": lambda: model.complete(["it", "a [MASK:3]"]),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for sentence, ask in requests.items():
            with pytest.raises(UserWarning, match=sentence):
                ask()
        short = dataclasses.replace(model, run=model.run | {"lengths": {"answers": {"most": 9}}})
        with pytest.raises(UserWarning, match="answers in the training data have up to 9 tokens"):
            short.generate(["it"], gen_length=8)
        monkeypatch.setattr(llada_jax.loaded_model, "generate_text", lambda *_, **__: [])
        assert model.generate(["it"], gen_length=46) == []

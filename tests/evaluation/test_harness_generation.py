"""The adapter to lm-evaluation-harness without the harness: where texts end, what chats are encoded
as, and that a score which is not a bound bounds no text.
"""

import json
import sys
import types

import pytest
from support.exports import LLADA, write_checkpoint
from support.hf_directories import SMALL, our_config, random_params, write_tokenizer, write_weights

import llada_jax
from llada_jax.config import default_config
from llada_jax.errors import UserError
from llada_jax.evaluation.harness import HarnessModel

TEMPLATE = "{% for m in messages %}<|start|>{{ m['content'] }}<|eot_id|>{% endfor %}{{ eos_token }}"


class Request:
    def __init__(self, *args):
        self.args = args


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    directory = tmp_path_factory.mktemp("chat") / "hf"
    directory.mkdir()
    params = random_params(SMALL)
    params["lm_head"][:, [256, 258]] *= 8.0
    (directory / "config.json").write_text(json.dumps(our_config("llada", SMALL)))
    write_weights(directory, "llada", SMALL, params)
    write_tokenizer(directory, "<|mdm_mask|>", "<|eot_id|>", "<|start|>", chat_template=TEMPLATE)
    return llada_jax.load(str(directory))


@pytest.fixture
def make(pretrained, monkeypatch):
    """Returns make(**settings) -> HarnessModel, with a stand-in for the harness."""
    api = types.ModuleType("lm_eval.api.model")
    api.LM = types.SimpleNamespace(register=lambda model: None)
    api.CacheHook = lambda lm: types.SimpleNamespace(add_partial=lambda *_: None)
    for name in ("lm_eval", "lm_eval.api"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", api)
    return lambda asked=pretrained, **settings: HarnessModel(asked, seed=5, **settings)


PROMPTS = ["it is", "a", "truth that is longer", "in", "of it"]


@pytest.mark.slow
def test_texts_end_at_a_stop_string_or_at_the_end_of_a_turn(make, pretrained):
    asked = {"max_gen_toks": 16, "do_sample": True, "temperature": 1.0}
    model = make(batch_size=2, block_length=4, steps=8)
    request = {"gen_length": 16, "block_length": 4, "steps": 8, "temperature": 1.0, "seed": 5}
    # as the adapter sorts them, because the number of a prompt decides on its noise
    in_order = sorted(PROMPTS, key=len)
    completions = pretrained.complete(in_order, batch_size=2, **request)
    assert any(len(completion.tokens) < 16 for completion in completions)
    whole = dict(zip(in_order, (completion.text for completion in completions)))
    stop = next(text for text in whole.values() if text)[0]
    found = model.generate_until([Request(p, {**asked, "until": []}) for p in PROMPTS])
    assert found == [whole[prompt] for prompt in PROMPTS]
    found = model.generate_until([Request(p, {**asked, "until": [stop]}) for p in PROMPTS])
    assert found == [whole[prompt].split(stop)[0] for prompt in PROMPTS]


# This model ends its texts at once, where it may.
UNENDED = {"commit": "threshold=0.05", "eos": "never", "suppress": [258]}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "same_as"),
    [
        (UNENDED, UNENDED),
        ({"cache": "dual", "refresh": 1}, {}),
    ],
)
def test_the_sampler_is_asked_as_the_settings_say(make, pretrained, settings, same_as):
    model = make(batch_size=2, gen_length=16, block_length=4, **settings)
    in_order = sorted(PROMPTS, key=len)
    whole = pretrained.generate(in_order, gen_length=16, block_length=4, batch_size=2, **same_as)
    assert len(set(whole)) > 1
    found = model.generate_until([Request(prompt, {"until": []}) for prompt in in_order])
    assert found == whole


@pytest.mark.slow
def test_an_autoregressive_model_writes_up_to_the_stop_string(make, tmp_path):
    config = default_config()
    config.data.sequence_length = 48
    config.objective.name = "autoregressive"
    directory = write_checkpoint(
        tmp_path / "run", LLADA, random_params(LLADA), config=config.to_dict()
    )
    causal = llada_jax.load(str(directory))
    in_order = sorted(PROMPTS, key=len)
    whole = causal.generate(in_order, gen_length=8)
    stop = max(whole, key=len)[3]
    found = make(causal, gen_length=8).generate_until(
        [Request(prompt, {"until": [stop]}) for prompt in in_order]
    )
    assert found != whole
    assert found == [text.split(stop)[0] for text in whole]
    with pytest.raises(UserError, match="block_length=4 is about denoising"):
        make(causal, block_length=4)


def test_special_tokens_of_a_chat_are_single_tokens(make):
    model = make()
    prompt = model.apply_chat_template([{"role": "user", "content": "hi"}])
    assert prompt == "<|start|>hi<|eot_id|><|endoftext|>"
    assert model.encode(prompt) == [259, *model.tokenizer.encode("hi"), 258, 256]


def test_a_score_that_is_not_a_bound_bounds_no_text(make):
    model = make(estimator="confidence_order")
    with pytest.raises(UserError, match="is not a bound, and a text is scored by one"):
        model.loglikelihood_rolling([Request("it is")])

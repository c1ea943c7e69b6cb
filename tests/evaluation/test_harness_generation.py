"""The adapter to lm-evaluation-harness without the harness: where texts end, what chats are encoded
as, what it refuses, and that a score which is not a bound bounds no text.
"""

import dataclasses
import json

import jax
import numpy as np
import pytest
from support.exports import LLADA, write_checkpoint
from support.harness_stand_in import Request, put_harness_in_place
from support.hf_directories import SMALL, our_config, random_params, write_tokenizer, write_weights

import llada_jax
from llada_jax.config import default_config
from llada_jax.errors import UserError
from llada_jax.evaluation import harness
from llada_jax.evaluation.conditional import encode_pair
from llada_jax.evaluation.harness import HarnessModel
from llada_jax.masks import CAUSAL
from llada_jax.samplers import denoise

TEMPLATE = "{% for m in messages %}<|start|>{{ m['content'] }}<|eot_id|>{% endfor %}{{ eos_token }}"


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
    put_harness_in_place(monkeypatch)
    return lambda asked=pretrained, **settings: HarnessModel(asked, seed=5, **settings)


PROMPTS = ["it is", "a", "truth that is longer", "in", "of it"]
SAMPLED = {"max_gen_toks": 16, "do_sample": True, "temperature": 1.0}
BLOCKS = {"batch_size": 2, "block_length": 4, "steps": 8}


@pytest.fixture
def denoised(monkeypatch):
    """A list that grows by the number of each block of a batch that is denoised."""
    run, seen = denoise.denoise_block, []

    def counted(network, state, cache, block, *others, program):
        seen.append(int(block))
        return run(network, state, cache, block, *others, program=program)

    monkeypatch.setattr(denoise, "denoise_block", counted)
    return seen


@pytest.mark.parametrize(
    ("settings", "length", "temperature"),
    [
        ({}, 256, 0.0),
        ({"max_gen_toks": 8, "max_new_tokens": 9}, 8, 0.0),
        ({"max_gen_toks": None, "max_new_tokens": 9}, 9, 0.0),
        ({"max_tokens": 7}, 7, 0.0),
        ({"max_completion_tokens": "6"}, 6, 0.0),
        ({"temperature": 0.5}, 256, 0.5),
        ({"temperature": 0.5, "do_sample": None}, 256, 0.5),
        ({"temperature": 0.5, "do_sample": True}, 256, 0.5),
        ({"temperature": 0.5, "do_sample": False}, 256, 0.0),
        ({"do_sample": True}, 256, 0.0),
    ],
)
def test_settings_of_a_task_are_read_as_the_harness_reads_them(settings, length, temperature):
    assert harness._generation(settings) == ((), length, temperature)


@pytest.mark.slow
def test_texts_end_at_a_stop_string_or_at_the_end_of_a_turn(
    make, pretrained, denoised, monkeypatch
):
    monkeypatch.setattr(
        harness, "_noise_numbers", lambda asked: [PROMPTS.index(one.args[0]) for one in asked]
    )
    completions = pretrained.complete(PROMPTS, gen_length=16, temperature=1.0, seed=5, **BLOCKS)
    assert any(len(completion.tokens) < 16 for completion in completions)
    whole = [completion.text for completion in completions]
    num_blocks = {one.prompt: one.num_steps // 2 for one in completions}
    model = make(**BLOCKS)

    def written(*until):
        denoised.clear()
        return model.generate_until([Request(p, {**SAMPLED, "until": until}) for p in PROMPTS])

    assert written() == whole
    # Batch after batch, each would last as long as its longest text.
    in_order = sorted(PROMPTS, key=len)
    batches = [in_order[:2], in_order[2:4], in_order[4:]]
    assert len(denoised) < sum(max(num_blocks[prompt] for prompt in batch) for batch in batches)
    first = [text[0] for text in whole if text]
    assert written(first[0]) == [text.split(first[0])[0] for text in whole]
    # where every text has an end in its first block, no other block is denoised
    assert written(*first) == [""] * 5
    assert denoised == [0, 0, 0]


@pytest.mark.slow
def test_a_sampled_text_depends_on_its_question_and_how_often_it_was_asked_alone(make):
    model = make(**BLOCKS, eos="never", suppress=[258])  # or some texts would be empty
    settings = {**SAMPLED, "until": []}
    everything = [Request(prompt, settings) for prompt in [*PROMPTS, "a", "a"]]
    texts = model.generate_until(everything)
    assert model.generate_until(everything[:2]) == texts[:2]
    assert model.generate_until(everything[4:0:-1]) == texts[4:0:-1]
    everything[-1].doc_id = 1
    again = model.generate_until(everything)
    assert again[:6] == texts[:6]
    assert len({texts[1], texts[5], texts[6], again[6]}) == 4


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


@pytest.fixture(scope="module")
def causal(tmp_path_factory):
    config = default_config()
    config.data.sequence_length = 48
    config.objective.name = "autoregressive"
    home = tmp_path_factory.mktemp("causal")
    return llada_jax.load(
        write_checkpoint(home / "run", LLADA, random_params(LLADA), config=config.to_dict())
    )


@pytest.mark.slow
def test_an_autoregressive_model_writes_up_to_the_stop_string(make, causal):
    in_order = sorted(PROMPTS, key=len)
    whole = causal.generate(in_order, gen_length=8)
    stop = max(whole, key=len)[3]
    found = make(causal, gen_length=8).generate_until(
        [Request(prompt, {"until": [stop]}) for prompt in in_order]
    )
    assert found != whole
    assert found == [text.split(stop)[0] for text in whole]


def test_special_tokens_of_a_chat_are_single_tokens(make):
    model = make()
    prompt = model.apply_chat_template([{"role": "user", "content": "hi"}])
    assert prompt == "<|start|>hi<|eot_id|><|endoftext|>"
    assert model.encode(prompt) == [259, *model.tokenizer.encode("hi"), 258, 256]


def test_a_row_of_an_autoregressive_model_has_one_bos_where_its_template_writes_one(
    make, pretrained
):
    """Each row is given BOS when it is scored or continued."""
    causal = dataclasses.replace(pretrained, run={**pretrained.run, "mask": CAUSAL._asdict()})
    words, hi = causal.tokenizer, causal.tokenizer.encode("hi")
    template = words.piece(words.bos_id)
    template += "{% for m in messages %}{{ m['content'] }}<|eot_id|>{% endfor %}"
    for asked, bos in ((causal, []), (pretrained, [words.bos_id])):
        model = make(asked, chat_template=template)
        prompt = model.apply_chat_template([{"role": "user", "content": "hi"}])
        assert prompt == f"{words.piece(words.bos_id)}hi<|eot_id|>"
        assert model.encode(prompt) == [*bos, *hi, 258]
        question = encode_pair(model, prompt, "yes")
        assert question[:2] == ((*bos, *hi, 258), tuple(words.encode("yes")))


def test_a_template_of_the_harness_is_read_as_in_training(make):
    source = "{% for m in messages %}{% generation %}{{ m | tojson }}{% endgeneration %}"
    source += "{% if loop.first %}{% continue %}{% endif %}!{% endfor %}{{ pad_token }}"
    model = make(chat_template=source)
    chat = [{"role": "user", "content": "<b>"}] * 2
    written = json.dumps(chat[0])
    assert model.apply_chat_template(chat) == f"{written}{written}!<|endoftext|>"
    for fails, reason in (("raise_exception('no system role')", "no system"), ("1 / 0", "by zero")):
        with pytest.raises(UserError, match=f"The chat template fails .*{reason}"):
            make(chat_template=f"{{{{ {fails} }}}}").apply_chat_template(chat)


@pytest.mark.parametrize(
    ("is_causal", "settings", "message"),
    [
        (True, {"block_length": 4}, "block_length=4 is about denoising"),
        (True, {"gen_length": 49}, "gen_length=49 is longer than the rows of 48 tokens"),
        (False, {"gen_length": 10, "block_length": 4}, "block_length=4 must divide gen_length=10"),
        (False, {"gen_length": 8, "steps": 16}, "steps=16 must not exceed gen_length=8"),
    ],
)
def test_settings_that_no_text_can_have_are_refused_at_once(
    make, pretrained, causal, is_causal, settings, message
):
    with pytest.raises(UserError, match=message):
        make(causal if is_causal else pretrained, **settings)


def test_what_changes_an_answer_changes_the_identity_of_the_model(make, pretrained, causal):
    other = dataclasses.replace(pretrained, params=jax.tree.map(np.negative, pretrained.params))
    others = [
        make(other),
        make(causal),
        *(make(**settings) for settings in ({"cfg_scale": 1.0}, {"estimator": "uniform_time"})),
        *(make(**settings) for settings in ({"mc_samples": 2}, {"gen_length": 8}, {"steps": 8})),
        make(chat_template="{{ bos_token }}"),
        HarnessModel(pretrained, seed=6),
    ]
    identities = {model.identity() for model in (make(), *others)}
    assert len(identities) == 1 + len(others)
    assert make(batch_size=1).identity() == make().identity()


def test_a_score_that_is_not_a_bound_bounds_no_text(make):
    model = make(estimator="confidence_order")
    with pytest.raises(UserError, match="is not a bound, and a text is scored by one"):
        model.loglikelihood_rolling([Request("it is")])

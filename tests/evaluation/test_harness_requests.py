"""How the adapter to lm-evaluation-harness answers requests: what is scored and sampled, how it is
cut, and which answer belongs to which request. The network knows one sentence by heart, and no
harness is needed.
"""

from types import SimpleNamespace

import numpy as np
import pytest
from support.harness_stand_in import Request, put_harness_in_place
from support.recital import BYTES, SENTENCE, letters, recite

from llada_jax.errors import UserError
from llada_jax.evaluation import harness
from llada_jax.evaluation.conditional import Score
from llada_jax.evaluation.harness import HarnessModel
from llada_jax.masks import BIDIRECTIONAL

LONGEST = 24


@pytest.fixture
def make(monkeypatch):
    """Returns make(**settings) -> HarnessModel of rows of 24 bytes."""
    put_harness_in_place(monkeypatch)
    pretrained = SimpleNamespace(
        tokenizer=BYTES,
        record=SimpleNamespace(
            mask=BIDIRECTIONAL, sequence_length=LONGEST, chat_template=None, architecture=None
        ),
        model=SimpleNamespace(
            logits_fn=recite, cached_fn=None, shadow_fn=None, settings={"dtype": "float32"}
        ),
        params=letters(SENTENCE),
        mesh=None,
        checksums={},
    )
    return lambda **settings: HarnessModel(pretrained, **settings)


@pytest.fixture
def scored(monkeypatch):
    """The questions that are scored and the settings; the error of the n-th score is errors[n]."""
    seen = SimpleNamespace(questions=[], settings={}, errors=[])

    def log_likelihoods(model, params, questions, **settings):
        seen.questions += [(bytes(one.before), bytes(one.answer)) for one in questions]
        seen.settings = settings
        return [
            Score(-float(len(one.answer)), seen.errors[number], len(one.answer), 1, number % 2 == 0)
            for number, one in enumerate(questions)
        ]

    monkeypatch.setattr(harness, "log_likelihoods", log_likelihoods)
    return seen


def test_prompts_lose_their_oldest_tokens_and_answers_go_to_their_requests(make, scored):
    model, cached = make(mc_samples=6, cfg_scale=1.5, seed=7, batch_size=3), []
    model.set_cache_hook(SimpleNamespace(add_partial=lambda *words: cached.append(words)))
    # the second one fits as a whole, and nothing fits before the last answer
    pairs = [("old" + "a" * 21, "bcd"), ("x" * 12, "y" * 10), ("z", "w" * 24)]
    scored.errors = [0.5, 0.0, 2.0]
    found = model.loglikelihood([Request(*pair) for pair in pairs])
    assert scored.questions == [
        (b"a" * 21, b"bcd"),
        (b"x" * 12, b"y" * 10),
        (b"", b"w" * 24),
    ]
    assert found == [(-3.0, True), (-10.0, False), (-24.0, True)]
    assert cached == [("loglikelihood", *each) for each in zip(pairs, found, strict=True)]
    assert model.standard_errors == dict(zip(pairs, scored.errors, strict=True))
    known = {"num_samples": 6, "cfg_scale": 1.5, "seed": 7, "batch_size": 3}
    assert {name: scored.settings[name] for name in known} == known
    with pytest.raises(UserError, match="An answer of the task has 25 tokens"):
        model.loglikelihood([Request("", "w" * 25)])


def test_a_text_is_scored_by_windows_of_which_half_is_context(make, scored):
    model, text, cached = make(), "".join(map(chr, range(60, 120))), []
    model.set_cache_hook(SimpleNamespace(add_partial=lambda *words: cached.append(words)))
    scored.errors = [3.0, 4.0, 0.0, 0.0, 2.0]
    found = model.loglikelihood_rolling([Request(text), Request("ab")])
    assert [before.decode() for before, _ in scored.questions] == [
        "",
        *(text[end - 24 : end - 12] for end in (36, 48, 60)),
        "",
    ]
    assert [answer.decode() for _, answer in scored.questions] == [
        text[:24],
        *(text[end - 12 : end] for end in (36, 48, 60)),
        "ab",
    ]
    assert found == [-60.0, -2.0]
    assert cached == [
        ("loglikelihood_rolling", (text,), -60.0),
        ("loglikelihood_rolling", ("ab",), -2.0),
    ]
    # of independent errors
    assert model.standard_errors == {(text,): 5.0, ("ab",): 2.0}


@pytest.fixture
def sampled(monkeypatch):
    """A list of (prompts, settings) of each call of the sampler, which samples as well."""
    real, calls = harness.generate_tokens, []

    def generate_tokens(logits_fn, params, prompts, **settings):
        calls.append(([bytes(prompt).decode() for prompt in prompts], settings))
        return real(logits_fn, params, prompts, **settings)

    monkeypatch.setattr(harness, "generate_tokens", generate_tokens)
    return calls


def test_texts_end_before_their_first_stop_string_and_go_to_their_requests(make, sampled):
    model = make(batch_size=2, seed=5, block_length=4)
    asked = [
        (7, {"until": ["u", "r"]}),
        (2, {"until": " "}),
        (12, {"until": ["", "zz"]}),
        (1, {"until": ["", "zz"]}),
        # at this temperature the network says what it would say at none
        (9, {"until": [], "temperature": 0.1}),
        (5, {"until": [], "temperature": 0.1}),
    ]
    requests = [Request(SENTENCE[:n], {"max_gen_toks": 8, **words}) for n, words in asked]
    found = model.generate_until(requests)
    assert found == [" t", "", *(SENTENCE[n : n + 8] for n in (12, 1, 9, 5))]
    # the shorter ones come first
    numbers = [[0], [1], [3, 2], [5, 4]]
    assert [prompts for prompts, _ in sampled] == [
        [requests[number].args[0] for number in each] for each in numbers
    ]
    noise = harness._noise_numbers(requests)
    for each, (_, settings) in zip(numbers, sampled, strict=True):
        assert settings["temperature"] == (0.1 if 4 in each else 0.0)
        assert settings["noise_numbers"] == [noise[number] for number in each]
        assert (settings["seed"], settings["batch_size"], settings["gen_length"]) == (5, 2, 8)


def test_a_prompt_leaves_room_for_the_text_and_the_length_of_the_model_counts(make, sampled):
    model = make(gen_length=4)
    model.generate_until([Request(SENTENCE, {"max_gen_toks": 8}), Request("it", {})])
    assert [prompts for prompts, _ in sampled] == [[SENTENCE[-20:]], ["it"]]
    assert [settings["gen_length"] for _, settings in sampled] == [4, 4]
    with pytest.raises(UserError, match="gen_length=25 is longer than the rows of 24 tokens"):
        make().generate_until([Request("it", {"max_gen_toks": 25})])


def test_a_text_has_enough_when_a_finished_block_has_an_end(make):
    model = make(block_length=4)
    texts = [b"no X but", b"noX but.", b"still no", b"no\xff, no!"]
    canvas_BT = np.array([[*b"prompt", *text] for text in [*texts, b"X is pad"]])
    canvas_BT[canvas_BT == 0xFF] = BYTES.eos_id
    ids = [list(b"prompt")] * 9
    have_ended = model._have_ended(ids, ["X", "Y"], gen_length=8)
    for block, ended in ((0, [0, 0, 0, 0]), (1, [1, 1, 0, 1]), (2, [1, 1, 0, 1])):
        state = SimpleNamespace(canvas_BT=canvas_BT, block=block)
        assert have_ended([8, 0, 3, 1], state) == list(map(bool, ended)), block


def test_noise_follows_from_the_question_and_from_how_often_it_was_asked():
    requests = [Request(prompt) for prompt in ("a", "b", "a", "a", *map(str, range(100)))]
    numbers = harness._noise_numbers(requests)
    assert len(set(numbers)) == len(numbers)
    assert 0 <= min(numbers) <= max(numbers) < 2**31
    assert harness._noise_numbers(requests[1:4]) == [numbers[1], numbers[0], numbers[2]]


def test_the_longest_special_token_is_found_and_none_in_a_text_of_the_user(make):
    model = make(chat_template="{{ messages[0] }}{% if add_generation_prompt %}!{% endif %}")
    model.tokenizer = SimpleNamespace(
        markers={"<a>": 1001, "<a><b>": 1002},
        special_tokens={"bos": "", "eos": "", "pad": ""},
        bos_id=0,
        eos_id=0,
        encode=lambda text: list(text.encode()),
    )
    assert model.encode("x<a>") == list(b"x<a>")
    assert model.apply_chat_template(["x<a><b>y<a>"]) == "x<a><b>y<a>!"
    assert model.apply_chat_template(["x"], add_generation_prompt=False) == "x"
    assert model.encode("x<a><b>y<a>") == [*b"x", 1002, *b"y", 1001]


def test_the_harness_is_asked_as_the_settings_say(make, monkeypatch):
    model, asked = make(), {}

    def simple_evaluate(model, **given):
        asked.update(given)
        names = ("ranked", "written")
        return {"samples": dict.fromkeys(names, ()), "results": {name: {} for name in names}}

    tasks = {
        "ranked": SimpleNamespace(OUTPUT_TYPE="multiple_choice"),
        "written": SimpleNamespace(OUTPUT_TYPE="generate_until"),
    }
    manager = SimpleNamespace(load=lambda roots: {"tasks": tasks})
    libraries = {
        "lm_eval": SimpleNamespace(simple_evaluate=simple_evaluate),
        "lm_eval.tasks": SimpleNamespace(TaskManager=lambda include_defaults: manager),
    }
    monkeypatch.setattr(harness, "require", lambda name, extra: libraries[name])
    monkeypatch.setattr(harness, "load_tasks", lambda tasks, **_: [[name] for name in tasks])
    monkeypatch.setattr(harness, "monte_carlo_errors", lambda *_: {("acc", "none"): 0.25})
    settings = {
        "num_fewshot": 2,
        "limit": 3.0,
        "apply_chat_template": True,
        "system_instruction": "Be brief.",
        "bootstrap_iters": 7,
        "confirm_run_unsafe_code": True,
    }
    found = harness.run(model, list(tasks), use_cache="kept", **settings)
    assert {name: asked[name] for name in settings} == settings
    assert asked["tasks"] == ["ranked", "written"]
    assert asked["use_cache"] == f"kept_{model.identity()}"
    # only likelihoods have an error of the Monte Carlo
    assert found["results"] == {"ranked": {"acc_mc_stderr,none": 0.25}, "written": {}}
    harness.run(model, ["ranked"])
    assert asked["use_cache"] is None

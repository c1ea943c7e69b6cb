"""Templates are rendered as transformers renders them, in a sandbox, and answers are found."""

import copy

import numpy as np
import pytest
from support.errors import error_of

from llada_jax.data.chat_template import DEFAULT, LLADA, Chat, template_of
from llada_jax.data.dialogues import Malformed
from llada_jax.data.tokenizer import Tokenizer, load_tokenizer

# In the form of Llama 3.
HEADERS = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim }}"
    "{{ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{% endif %}"
)
DIALOGUE = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Say <|eot_id|> and </s>!"},
    {"role": "assistant", "content": "No."},
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "It ends a turn."},
]


@pytest.fixture(scope="module")
def headers(tmp_path_factory):
    """A Hugging Face tokenizer of words with LLaDA's special tokens."""
    tokenizers = pytest.importorskip("tokenizers")
    special = ["<mask>", "<|endoftext|>", "<|startoftext|>", "<|start_header_id|>"]
    special += ["<|end_header_id|>", "<|eot_id|>"]
    model = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=False))
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=special,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    model.train_from_iterator(["It ends a turn."], trainer)
    folder = tmp_path_factory.mktemp("headers")
    model.save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder)


def pieces(tokenizer, ids) -> str:
    """Spells tokens out, special ones included."""
    names = {i: name for name, i in tokenizer.markers.items()}
    return "".join(names.get(i) or tokenizer.decode([i]) for i in np.asarray(ids).tolist())


def test_answers_are_the_assistants_turns_with_their_end_and_special_tokens_come_from_the_template(
    headers,
):
    document = Chat(HEADERS, headers).document(DIALOGUE)
    (places,) = np.nonzero(document.is_answer)
    answers = np.split(document.tokens[places], np.flatnonzero(np.diff(places) > 1) + 1)
    assert [pieces(headers, answer) for answer in answers] == [
        "No.<|eot_id|>",
        "It ends a turn.<|eot_id|><|endoftext|>",
    ]
    text = pieces(headers, document.tokens)
    assert text.startswith("<|startoftext|><|start_header_id|>system<|end_header_id|>\n\nBe brief.")
    # five turns end, and the token that the user spelled out is ordinary characters
    eot = headers.markers["<|eot_id|>"]
    assert (document.tokens == eot).sum() == 5
    assert "Say <|eot_id|> and </s>!" in text


def test_a_prompt_is_tokenized_as_in_training(headers):
    chat = Chat(HEADERS, headers)
    document, prompt = chat.document(DIALOGUE[:3]), chat.prompt_ids(DIALOGUE[:2])
    assert document.tokens[: len(prompt)].tolist() == prompt
    assert not document.is_answer[: len(prompt)].any()
    assert document.is_answer[len(prompt) :].all()


@pytest.mark.parametrize("template", [HEADERS, DEFAULT, LLADA])
def test_the_text_is_that_of_transformers(headers, template):
    transformers = pytest.importorskip("transformers.utils.chat_template_utils")
    plain = [{**m, "content": m["content"].replace("</s>", "")} for m in DIALOGUE]
    plain[1]["content"] = "Say it!"
    names = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>"}
    expected, _ = transformers.render_jinja_template(
        [plain[:4]], chat_template=template, add_generation_prompt=True, **names
    )
    ours = Chat(template, headers).render(plain[:4], add_generation_prompt=True)
    assert ours == expected[0]


def test_tools_their_calls_and_their_results_reach_the_template():
    template = (
        "{{ tools | tojson }}{% for m in messages %}|{{ m.role }}: {{ m.content }}"
        "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}|assistant: {% endif %}"
    )
    messages = [
        {"role": "user", "content": "Time?"},
        {"role": "assistant", "content": "", "tool_calls": [{"name": "clock"}]},
        {"role": "tool", "content": "12:00"},
        {"role": "assistant", "content": "Noon."},
    ]
    tokenizer = load_tokenizer("bytes")
    document = Chat(template, tokenizer).document(messages, tools=[{"name": "<é> & 'clock'"}])
    assert tokenizer.decode(document.tokens) == (
        '[{"name": "<é> & \'clock\'"}]|user: Time?|assistant: [{"name": "clock"}]|tool: 12:00|'
        "assistant: Noon."
    )
    answers = tokenizer.decode(document.tokens[document.is_answer])
    assert answers == '[{"name": "clock"}]Noon.'
    with pytest.raises(Malformed, match="an answer is a call of a tool, which the template does"):
        Chat(DEFAULT, tokenizer).document(messages)


def test_every_answer_of_the_default_template_ends_with_end_of_text():
    tokenizer = load_tokenizer("bytes")
    document = Chat(DEFAULT, tokenizer).document(DIALOGUE)
    assert (document.tokens == tokenizer.eos_id).sum() == 2
    assert document.is_answer[document.tokens == tokenizer.eos_id].all()
    assert "Say <|eot_id|> and </s>!" in tokenizer.decode(document.tokens)


@pytest.mark.parametrize("spelled", ["<<mask>>", "<<<mask>", "<<</s>", "<<mask></s>"])
def test_special_tokens_within_others_are_text_in_a_message(spelled, monkeypatch):
    markers = {"</s>": 257, "<mask>": 256, "<<": 258, "<<mask>": 259, "<<mask></s": 258}
    monkeypatch.setattr(Tokenizer, "markers", markers)
    tokenizer = load_tokenizer("bytes")
    turn = [{"role": "user", "content": spelled}, {"role": "assistant", "content": spelled}]
    document = Chat(DEFAULT, tokenizer).document(turn)
    text = f"### user\n{spelled}\n\n### assistant\n{spelled}"
    assert document.tokens.tolist() == [*text.encode(), tokenizer.eos_id]


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('no system role') }}", "no system role"),
        ("{{ raise_exception('') }}", "TemplateError"),
        ("{{ messages[0].content.__class__.__mro__ }}", "unsafe"),
        ("{{ messages[0].absent.name }}", "no attribute"),
        ("{{ messages | length }}", "beginning"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ '{a}'.format(b=1) }}", "'a'"),
        ("{{ [] | xmlattr }}", "items"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
    ],
)
def test_a_template_that_fails_makes_the_dialogue_malformed(template, reason):
    with pytest.raises(Malformed, match=reason):
        Chat(template, load_tokenizer("bytes")).document(DIALOGUE[1:3])


def test_the_named_template_of_llada_is_its_own_without_an_open_answer_at_the_end(headers):
    as_published = HEADERS.replace("add_generation_prompt", "true")
    named = Chat(template_of(headers, "llada"), headers)
    for end in (1, 2, 4):  # the same prompts as with the template that comes with the tokenizer
        ours, theirs = (
            chat.prompt_ids(DIALOGUE[:end]) for chat in (named, Chat(as_published, headers))
        )
        assert pieces(headers, ours) == pieces(headers, theirs)
    document = named.document(DIALOGUE[1:3])
    prompt, end = len(named.prompt_ids(DIALOGUE[1:2])), headers.markers["<|eot_id|>"]
    assert document.tokens[prompt:].tolist() == [*headers.encode("No."), end, headers.eos_id]
    assert document.is_answer.tolist() == [n >= prompt for n in range(len(document.tokens))]
    message = error_of(Chat(as_published, headers).document, DIALOGUE[1:3])
    assert "opens another answer after each answer" in message
    assert "--chat template=llada" in message
    message = error_of(template_of, load_tokenizer("bytes"), "llada")
    assert "the tokenizer has no <|end_header_id|>" in message


def test_a_template_that_asks_for_the_date_gets_the_same_one_always():
    chat = Chat("{{ strftime_now('%d %b %Y') }}", load_tokenizer("bytes"))
    assert chat.render([]) == "01 Jan 2026"


def test_a_dialogue_begins_with_the_token_for_that_and_never_with_end_of_text(headers):
    messages = [{"role": "user", "content": "Hi"}]
    template = "{{ bos_token }}{{ messages[0].content }}"
    without = copy.copy(headers)
    without.bos_id = without.eos_id
    for tokenizer, begins in ((headers, "<|startoftext|>"), (without, "")):
        assert Chat(template, tokenizer).render(messages) == f"{begins}Hi"


def test_marks_of_generation_are_read(headers):
    marked = HEADERS.replace("{{ '<|eot_id|>' }}", "{% generation %}<|eot_id|>{% endgeneration %}")
    assert Chat(marked, headers).render(DIALOGUE) == Chat(HEADERS, headers).render(DIALOGUE)


def test_the_template_of_a_tokenizer_is_kept_with_it(tmp_path):
    tokenizer = load_tokenizer("bytes")
    assert "no chat template" in error_of(template_of, tokenizer)
    assert "cannot be read" in error_of(template_of, tokenizer, str(tmp_path / "absent"))
    for source in ("{% if %}", "{% break %}"):
        assert "not valid Jinja" in error_of(Chat, source, tokenizer)
    tokenizer.with_chat_template(HEADERS).save(tmp_path / "kept")
    kept = load_tokenizer(tmp_path / "kept")
    assert template_of(kept) == HEADERS
    assert kept.fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize(
    "source",
    [
        "",
        "{% for m in messages %}{{ m.role }}: {{ m['value'] }}{% endfor %}",
        "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}",
    ],
)
def test_a_template_that_writes_no_answers_is_refused(source):
    chat = Chat(source, load_tokenizer("bytes"))
    assert "writes no text of an answer" in error_of(chat.check_writes_answers)


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}",
        # another one than a template alone can tell
        "{{ messages[7].content }}",
    ],
)
def test_a_template_that_may_write_answers_is_taken(source):
    Chat(source, load_tokenizer("bytes")).check_writes_answers()

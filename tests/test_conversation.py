"""A conversation: its prompts, the turns that make room, and where its answers end."""

import types

import pytest
from support.errors import error_of
from support.recital import BYTES, letters, recite
from support.records import small_record

from llada_jax.conversation import Answer, Conversation
from llada_jax.data.chat_template import DEFAULT, Chat
from llada_jax.data.tokenizer import load_tokenizer

HEADINGS = "### user\n{}\n\n### assistant\n"


def recites(text, *, context=200, tokenizer=BYTES):
    """A model whose text at a position is that of the position."""
    record = small_record()
    record.config["data"]["sequence_length"] = context
    return types.SimpleNamespace(
        tokenizer=tokenizer,
        config=record.config,
        record=record,
        params=letters(text),
        model=types.SimpleNamespace(logits_fn=recite),
    )


def begin(text="x", *, system="", gen_length=8, seed=0, **more):
    settings = {name: more.pop(name) for name in list(more) if name not in ("context", "tokenizer")}
    return Conversation(
        recites(text, **more), system=system, gen_length=gen_length, seed=seed, **settings
    )


def prompt_of(conversation, text) -> str:
    return BYTES.decode(conversation.ask(text).tokens)


def test_a_prompt_has_the_system_message_and_all_turns_in_their_order():
    conversation = begin(system="Be brief.")
    first = conversation.ask("Hi")
    assert BYTES.decode(first.tokens) == "### system\nBe brief.\n\n" + HEADINGS.format("Hi")
    conversation.keep(first, Answer("Hello!", has_ended=True))
    assert prompt_of(conversation, "Why?") == (
        "### system\nBe brief.\n\n" + HEADINGS.format("Hi") + "Hello!\n\n" + HEADINGS.format("Why?")
    )
    conversation.reset()
    assert conversation.ask("Hi") == first


def test_earlier_turns_are_the_tokens_that_training_has_seen():
    """The answers end with their end-of-text token, and are tokenized apart from the prompts."""
    conversation = begin()
    conversation.keep(conversation.ask("Hi"), Answer("Hello!", has_ended=True))
    tokens = conversation.ask("Why?").tokens
    messages = [("user", "Hi"), ("assistant", "Hello!"), ("user", "Why?"), ("assistant", "So.")]
    chat = Chat(DEFAULT, BYTES)
    document = chat.document([{"role": role, "content": text} for role, text in messages])
    assert document.tokens[: len(tokens)].tolist() == tokens
    assert tokens.count(BYTES.eos_id) == 1


def test_the_oldest_turns_leave_until_prompt_and_answer_fit():
    conversation = begin(system="S", gen_length=16, context=140)
    for number in range(4):
        question = conversation.ask(f"question {number}")
        conversation.keep(question, Answer(f"answer {number}", has_ended=True))
    question = conversation.ask("last")
    text = BYTES.decode(question.tokens)
    assert len(question.tokens) + 16 <= 140
    assert text.startswith("### system\nS\n\n### user\nquestion 3")
    assert "question 2" not in text
    # some have left before, and none comes back
    assert question.num_dropped >= 1
    assert conversation.ask("last").num_dropped == 0


def test_a_message_that_does_not_fit_alone_is_asked_without_the_turns_before_it():
    conversation = begin(gen_length=16, context=60)
    conversation.keep(conversation.ask("a"), Answer("b", has_ended=True))
    question = conversation.ask("long " * 20)
    assert question.num_dropped == 1
    assert len(question.tokens) > 60 - 16


@pytest.mark.parametrize("settings", [{}, {"block_length": 4, "append": True}])
def test_an_answer_ends_at_end_of_text_or_takes_all_its_tokens(settings):
    prompt = HEADINGS.format("Hi")
    answer = begin(f"{prompt}Yes.", **settings).answer(begin().ask("Hi"))
    assert answer == ("Yes.", True)
    answer = begin(f"{prompt}Yes, of course", **settings).answer(begin().ask("Hi"))
    assert answer == ("Yes, of ", False)


def test_every_answer_has_its_own_noise_and_a_conversation_can_be_repeated():
    def answers():
        conversation = begin("abcdefgh", temperature=9.0, seed=2**32 - 1)
        return [conversation.answer(conversation.ask("Hi")).text for _ in range(2)]

    first, second = answers()
    assert first != second
    assert answers() == [first, second]


def test_steps_are_listened_to():
    heard = []
    conversation = begin(block_length=4)
    conversation.answer(
        conversation.ask("Hi"), on_step=lambda rows, state: heard.append(state.step)
    )
    assert heard == [1, 2, 3, 4, 5, 6, 7, 8]


def test_a_template_that_refuses_a_system_message_is_answered_at_the_beginning():
    template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}"
        "{% endif %}{{ m.content }}{% endfor %}"
    )
    tokenizer = load_tokenizer("bytes").with_chat_template(template)
    sentence = error_of(lambda: begin(system="S", tokenizer=tokenizer))
    assert "refuses the conversation" in sentence
    assert "no system" in sentence
    assert "leave --system out" in sentence
    assert "--system" not in error_of(
        lambda: begin(tokenizer=tokenizer.with_chat_template("{{ raise_exception('all') }}"))
    )


def test_the_template_of_the_tokenizer_is_used():
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    conversation = begin(tokenizer=load_tokenizer("bytes").with_chat_template(template))
    assert conversation.has_template
    assert prompt_of(conversation, "Hi") == "<user>Hi<assistant>"
    assert not begin().has_template

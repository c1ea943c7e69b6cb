"""Dialogues are read from every published form, and what is not one is named."""

import pytest

from llada_jax.data.dialogues import Malformed, parse_dialogue, parse_record

ASKED = {"role": "user", "content": "Hi"}
ANSWERED = {"role": "assistant", "content": "Hello"}


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [ASKED, ANSWERED]},
        {"messages": [ASKED, ANSWERED, {"role": "user", "content": "never answered"}]},
        {
            "messages": [
                ASKED,
                {"role": "assistant", "content": [{"type": "text", "text": "Hello"}]},
            ]
        },
        {"prompt": "Hi", "response": "Hello", "messages": None},
        {"instruction": "Hi", "input": "", "output": "Hello"},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
    ],
)
def test_every_form_gives_the_same_messages(record):
    assert parse_dialogue(record) == [ASKED, ANSWERED]


def test_instruction_and_input_are_one_prompt_and_a_system_field_opens_the_dialogue():
    record = {"instruction": "Add", "input": "1 1", "output": "2", "system": "Be brief."}
    assert parse_dialogue(record) == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Add\n\n1 1"},
        {"role": "assistant", "content": "2"},
    ]


def test_calls_of_tools_and_their_results_are_kept():
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "clock"}]}
    result = {"role": "tool", "content": "noon"}
    messages = parse_dialogue({"messages": [ASKED, call, result, ANSWERED]})
    assert [message["role"] for message in messages] == ["user", "assistant", "tool", "assistant"]
    assert messages[1] == {**call, "content": ""}


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ([1], "not a JSON object"),
        ({"text": "plain"}, "none of the known fields"),
        ({"messages": []}, "not a list of messages"),
        ({"messages": [{"content": "Hi"}, ANSWERED]}, "no role"),
        ({"messages": [{"role": "narrator", "content": "Hi"}, ANSWERED]}, "unknown role"),
        ({"messages": [{"role": "user"}, ANSWERED]}, "no text"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "other than text"),
        ({"messages": [ASKED]}, "no answer"),
        ({"messages": [ANSWERED]}, "no prompt before"),
        ({"prompt": "Hi", "response": " \n"}, "answer is empty"),
        ({"prompt": "Hi", "response": "\ud800"}, "not Unicode"),
        ({"system": "\ud800", "prompt": "Hi", "response": "Hi"}, "not Unicode"),
        ({"messages": [{**ASKED, "name": "\ud800"}, ANSWERED]}, "not Unicode"),
        ({"messages": [ASKED, ANSWERED], "tools": [{"name": "\ud800"}]}, "not Unicode"),
        ({"messages": [{"role": "system", "content": "a"}] * 2 + [ASKED, ANSWERED]}, "two system"),
        ({"messages": [ASKED, {"role": "system", "content": "a"}, ANSWERED]}, "not the first"),
    ],
)
def test_what_is_not_a_dialogue_is_named(record, reason):
    with pytest.raises(Malformed, match=reason):
        parse_record(record, "dialogues")

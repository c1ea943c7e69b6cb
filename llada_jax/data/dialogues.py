"""Dialogues from the forms in which instruction data are published, checked turn by turn."""

import json
from typing import Any

# What the published data sets call the roles of OpenAI's format.
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}

_FORMS = "messages; prompt and response; instruction, input and output; or conversations"

# What a record may hold: one dialogue, or a prompt with a preferred and another answer.
KINDS = ("dialogues", "pairs")
PAIR = ("chosen", "rejected")


class Malformed(Exception):
    """A record that is not a dialogue to train on; its text names the kind of defect."""


def parse_record(record: Any, kind: str) -> list[list[dict]]:
    """Returns the dialogues of one record: one, or of "pairs" the chosen and the rejected one.

    Raises:
        Malformed: see parse_dialogue and parse_pair, or a text within has half of a surrogate pair,
            which no file can hold.
    """
    dialogues = [parse_dialogue(record)] if kind == "dialogues" else list(parse_pair(record))
    # what a template may write
    _check_unicode([dialogues, record.get("tools")])
    return dialogues


def parse_pair(record: Any) -> tuple[list[dict], list[dict]]:
    """Returns the messages of two dialogues that differ in their last answer: the chosen and the
    rejected one.

    Known forms: {"prompt", "chosen", "rejected"}, each a text or a list of messages, and {"chosen",
    "rejected"}, each the messages of a whole dialogue. Where these are there, a "prompt" next to
    them is not read.

    Raises:
        Malformed: a part is missing, a dialogue is malformed, the prompts differ, or the answers do
            not.
    """
    if not isinstance(record, dict):
        raise Malformed("the record is not a JSON object")
    chosen, rejected = (_answered(record, name) for name in PAIR)
    if chosen[:-1] != rejected[:-1]:
        raise Malformed("chosen and rejected answer different prompts")
    if chosen[-1] == rejected[-1]:
        raise Malformed("chosen and rejected are the same")
    return chosen, rejected


def _answered(record: dict, name: str) -> list[dict]:
    """Returns the messages of one side of a pair."""
    prompt, answer = record.get("prompt"), record.get(name)
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(answer, str):
        answer = [{"role": "assistant", "content": answer}]
    if not isinstance(answer, list) or not answer:
        raise Malformed(f"{name!r} is neither a text nor a list of messages")
    is_whole = any(_message(message)["role"] != "assistant" for message in answer)
    if not is_whole and not isinstance(prompt, list):
        raise Malformed("there is no prompt, neither a field of this name nor in the messages")
    messages = answer if is_whole else [*prompt, *answer]  # type: ignore[misc]
    return parse_dialogue({"messages": messages, "system": record.get("system")})


def parse_dialogue(record: Any) -> list[dict]:
    """Returns the messages of one record, each a dict with role and content, without those that
    follow the last answer.

    Known forms: {"messages": [{"role", "content"}, ...]} (OpenAI), {"prompt", "response"},
    {"instruction", "input", "output"} (Alpaca), {"conversations": [{"from", "value"}, ...]}
    (ShareGPT). A field "system" next to any of them opens the dialogue. Other fields of a message,
    such as "tool_calls", are kept for the template.

    Raises:
        Malformed: the record has none of these forms, or its turns do not form a dialogue.
    """
    messages = [_message(message) for message in _raw_messages(record)]
    if isinstance(system := record.get("system"), str) and system.strip():
        messages.insert(0, {"role": "system", "content": system})
    return _checked(messages)


def _raw_messages(record: Any) -> list:
    if not isinstance(record, dict):
        raise Malformed("the record is not a JSON object")
    # parquet gives every column, with None where a record has nothing
    record = {name: value for name, value in record.items() if value is not None}
    for name in ("messages", "conversations"):
        if name in record:
            if not isinstance(record[name], list) or not record[name]:
                raise Malformed(f"{name!r} is not a list of messages")
            return record[name]
    if "prompt" in record and "response" in record:
        return _pair(record["prompt"], record["response"])
    if "instruction" in record and "output" in record:
        prompt, more = record["instruction"], record.get("input", "")
        if isinstance(prompt, str) and isinstance(more, str) and more.strip():
            prompt = f"{prompt}\n\n{more}"
        return _pair(prompt, record["output"])
    if all(name in record for name in PAIR):
        raise Malformed("the record is a pair of answers, which --chat records=pairs reads")
    raise Malformed(f"the record has none of the known fields ({_FORMS})")


def _pair(prompt: Any, answer: Any) -> list[dict]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def _message(message: Any) -> dict:
    if not isinstance(message, dict):
        raise Malformed("a message is not a JSON object")
    message = {name: value for name, value in message.items() if value is not None}
    role = message.pop("from", None) or message.get("role")
    if role is None:
        raise Malformed("a message has no role")
    if not isinstance(role, str) or role.lower() not in ROLES:
        raise Malformed("a message has an unknown role")
    content = message.pop("value", None) if "value" in message else message.get("content")
    # OpenAI's parts, of which only text can be trained on.
    if isinstance(content, list):
        if not all(isinstance(part, dict) and part.get("type") == "text" for part in content):
            raise Malformed("a message holds something other than text")
        content = "".join(str(part.get("text", "")) for part in content)
    if content is None and message.get("tool_calls"):
        content = ""
    if not isinstance(content, str):
        raise Malformed("a message has no text")
    return {**message, "role": ROLES[role.lower()], "content": content}


def _checked(messages: list[dict]) -> list[dict]:
    roles = [message["role"] for message in messages]
    if roles.count("system") > 1:
        raise Malformed("there are two system messages")
    if "system" in roles[1:]:
        raise Malformed("the system message is not the first")
    if "assistant" not in roles:
        raise Malformed("there is no answer")
    if "user" not in roles[: roles.index("assistant")]:
        raise Malformed("there is no prompt before the first answer")
    for message in messages:
        is_answer = message["role"] == "assistant"
        if is_answer and not message["content"].strip() and not message.get("tool_calls"):
            raise Malformed("an answer is empty")
    return messages[: len(roles) - roles[::-1].index("assistant")]


def _check_unicode(value: Any) -> None:
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as error:
        raise Malformed("a text is not Unicode") from error


def identity_of(messages: list[dict]) -> str:
    """Returns the text whose hash decides whether a dialogue is held out."""
    return json.dumps(messages, ensure_ascii=False, sort_keys=True, default=str)


def text_of(messages: list[dict]) -> str:
    """Returns what is said in a dialogue, for the training of a tokenizer."""
    return "\n".join(message["content"] for message in messages)

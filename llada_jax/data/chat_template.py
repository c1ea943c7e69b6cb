"""Chat templates: from the messages of a dialogue to tokens, of which those of answers are known.

A template is Jinja source, as transformers keeps it with a tokenizer. It comes with data from
strangers, and is rendered in jinja2's sandbox, in which it cannot reach Python.
"""

import contextlib
import itertools
import json
import os
import re
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llada_jax.data.dialogues import Malformed
from llada_jax.data.tokenizer import Tokenizer
from llada_jax.errors import UserError, one_line, require
from llada_jax.storage import files

# For tokenizers without a template of their own: plain text that any vocabulary can spell. Every
# answer ends with the end-of-text token, which is what sampling stops at.
DEFAULT = """\
{%- for message in messages %}
{%- if not loop.first %}{{ '\\n\\n' }}{% endif %}
{{- '### ' + message.role + '\\n' + message.content }}
{%- if message.role == 'assistant' %}{{ eos_token }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '\\n\\n### assistant\\n' }}{% endif %}"""

# The form of LLaDA-8B and LLaDA 1.5, that of Llama 3. The template that comes with their tokenizers
# reads no add_generation_prompt: it opens another answer after each answer, which must not be
# learned.
LLADA = """\
{{- bos_token }}
{%- for message in messages %}
{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' }}
{{- message.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}"""
LLADA_TOKENS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")

# What --chat template=NAME names; any other word is a path.
TEMPLATES = {"default": DEFAULT, "llada": LLADA}

# Put into special tokens that a message spells out, so that they stay text: Unicode will never use
# this character.
_BREAK = "\ufdd0"


class Document(NamedTuple):
    """Tokens of one document of a data set: int32 [n], and bool [n], True on those of answers."""

    tokens: np.ndarray
    is_answer: np.ndarray


def template_of(tokenizer: Tokenizer, setting: str = "") -> str:
    """Returns Jinja source.

    Args:
        setting: a name in TEMPLATES, a path of a file, or "": that of the tokenizer, which must
            have one.

    Raises:
        UserError: there is no such template, or the tokenizer lacks its special tokens.
    """
    if setting == "llada" and (absent := set(LLADA_TOKENS).difference(tokenizer.markers)):
        raise UserError(
            f"--chat template=llada needs the special tokens {', '.join(LLADA_TOKENS)}, and the "
            f"tokenizer has no {min(absent)}; give the tokenizer of a LLaDA model, or write --chat "
            "template=default, which any vocabulary can spell."
        )
    if setting in TEMPLATES:
        return TEMPLATES[setting]
    if setting:
        return read_template(setting)
    if own := tokenizer.chat_template:
        return own
    raise UserError(
        "The tokenizer has no chat template; give one with --chat template=FILE, or write --chat "
        "template=default for plain text with a heading above every message, or --chat "
        "template=llada for the special tokens of LLaDA."
    )


def read_template(path: str) -> str:
    """Returns the content of a file with Jinja source."""
    remedy = f"give a file with Jinja source, or one of the words {', '.join(TEMPLATES)}"
    with files.reading(f"--chat template={path}", remedy=remedy):
        return Path(path).read_text()


def environment() -> Any:
    """Returns the jinja2.Environment in which templates are read and rendered, as transformers does
    it.
    """
    sandbox = require("jinja2.sandbox", extra="hf")
    made = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_generation_block(), "jinja2.ext.loopcontrols"],
    )
    made.globals |= {"raise_exception": _raise, "strftime_now": _strftime_now}
    made.filters["tojson"] = _tojson
    return made


def names_of(tokenizer: Tokenizer) -> dict[str, str]:
    """Returns the special tokens that a template may write, by their names in it."""
    names = tokenizer.special_tokens
    return {
        "eos_token": names["eos"],
        "pad_token": names["pad"],
        # a tokenizer without one has end-of-text in its place, which does not begin a dialogue
        "bos_token": names["bos"] if tokenizer.bos_id != tokenizer.eos_id else "",
    }


class Chat:
    """A template with its tokenizer."""

    def __init__(self, source: str, tokenizer: Tokenizer):
        """Raises UserError when the source is not a Jinja template."""
        made = environment()
        try:
            self._template = made.from_string(source)
        except Exception as error:
            # Not only Jinja's errors: Python finds a break outside a loop, for example.
            raise UserError(
                f"The chat template is not valid Jinja ({error}); fix it, or give another one."
            ) from error
        self._tokenizer = tokenizer
        self._markers = tokenizer.markers
        self._special = _any_of(self._markers)
        self._names = names_of(tokenizer)

    def check_writes_answers(self) -> None:
        """Raises UserError when answers that differ make no difference, as where the template reads
        another key of a message than `content`, which Jinja takes for an empty text.
        """
        question = {"role": "user", "content": "a"}
        # A template that needs more than these messages is tried on the dialogues.
        with contextlib.suppress(Malformed):
            one, other = (
                self.render([question, {"role": "assistant", "content": text}]) for text in "ab"
            )
            if one == other:
                raise UserError(
                    "The chat template writes no text of an answer, so that nothing would be "
                    "learned; let it write message['content'] of every message, or give another "
                    "one."
                )

    def render(
        self, messages: list[dict], *, tools: Any = None, add_generation_prompt: bool = False
    ) -> str:
        """Returns the text of messages, with special tokens spelled out.

        Raises:
            Malformed: the template refuses the messages.
        """
        try:
            return self._template.render(
                messages=[self._protected(message) for message in messages],
                tools=tools,
                add_generation_prompt=add_generation_prompt,
                **self._names,
            )
        except Exception as error:
            # Not only Jinja's errors: a template divides, looks up and calls itself as it likes.
            reason = one_line(str(error))[:80] or type(error).__name__
            raise Malformed(f"the template fails ({reason})") from error

    def prompt_ids(self, messages: list[dict], *, tools: Any = None) -> list[int]:
        """Returns the tokens after which the answer to `messages` is written.

        Earlier answers are tokenized apart, as in `document`, where the template writes what comes
        before them as it does alone.

        Raises:
            Malformed: the template refuses the messages.
        """
        whole = self.render(messages, tools=tools, add_generation_prompt=True)
        cuts = [0]
        for number, message in enumerate(messages):
            if message["role"] == "assistant":
                cuts += self._place_of(number, messages, whole, tools=tools) or ()
        parts = [whole[start:stop] for start, stop in itertools.pairwise([*cuts, len(whole)])]
        return np.concatenate([self._ids(part) for part in parts]).tolist()

    def document(
        self, messages: list[dict], *, tools: Any = None, only_last: bool = False
    ) -> Document:
        """Returns the tokens of a dialogue, in which every message of the assistant is an answer,
        or only_last the one at the end.

        Prompt and answers are tokenized apart, as they are when an answer is sampled. A document
        ends with the end-of-text token, which is part of the last answer.

        Raises:
            Malformed: the template fails, leaves out an answer that is a call of a tool, or writes
                the beginning of a dialogue otherwise when more follows.
            UserError: the template opens another answer after each answer.
        """
        whole = self.render(messages, tools=tools)
        if self._leaves_out_calls(messages, whole, tools=tools):
            raise Malformed("an answer is a call of a tool, which the template does not write")
        pieces, position = [], 0
        for number, message in enumerate(messages):
            is_last = number == len(messages) - 1
            if message["role"] != "assistant" or (only_last and not is_last):
                continue
            place = self._place_of(number, messages, whole, tools=tools)
            if place is None:
                raise Malformed(
                    "the template does not write the beginning of a dialogue as it does alone, "
                    "which --chat turns=each allows"
                )
            before, after = whole[: place[0]], whole[: place[1]]
            # Such a template reads no add_generation_prompt. It is not the fault of the dialogue,
            # and leaving dialogues out would leave out all of them.
            common = os.path.commonprefix([before[::-1], after[::-1]])[::-1]
            if "assistant" in common and after == self.render(
                messages[: number + 1], tools=tools, add_generation_prompt=True
            ):
                raise UserError(
                    "The chat template opens another answer after each answer, which the model "
                    "would learn to write; --chat template=llada is the template for LLaDA, whose "
                    "own does so, and for other tokenizers give --chat template=FILE, in which "
                    "add_generation_prompt decides."
                )
            pieces.append((before[position:], False))
            pieces.append((after[len(before) :], True))
            position = len(after)
        arrays = [self._ids(text) for text, _ in pieces]
        if not len(arrays[-1]) or arrays[-1][-1] != self._tokenizer.eos_id:
            arrays[-1] = np.append(arrays[-1], self._tokenizer.eos_id)
        return Document(
            np.concatenate(arrays).astype(np.int32),
            np.concatenate(
                [np.full(len(a), is_answer) for a, (_, is_answer) in zip(arrays, pieces)]
            ),
        )

    def _leaves_out_calls(self, messages: list[dict], whole: str, *, tools: Any) -> bool:
        """Whether answers without text, which consist of calls, would be empty."""
        bare = [
            message
            if message["content"].strip()
            else {name: value for name, value in message.items() if name != "tool_calls"}
            for message in messages
        ]
        try:
            return bare != messages and self.render(bare, tools=tools) == whole
        except Malformed:
            # the template asks for what was taken away
            return False

    def _place_of(
        self, number: int, messages: list[dict], whole: str, *, tools: Any
    ) -> tuple[int, int] | None:
        """Returns where in the text of a dialogue one of its answers begins and ends; None when the
        template writes the beginning of the dialogue otherwise if more follows.
        """
        before = self.render(messages[:number], tools=tools, add_generation_prompt=True)
        after = self.render(messages[: number + 1], tools=tools)
        if whole.startswith(after) and after.startswith(before):
            return len(before), len(after)
        return None

    def _protected(self, value: Any) -> Any:
        """Breaks the special tokens that a message spells out."""
        if isinstance(value, str):
            value = value.replace(_BREAK, "")
            # Again until none is left: one may lie within another, or begin where another ends.
            while self._special.search(value):
                value = self._special.sub(lambda m: m[0][0] + _BREAK + m[0][1:], value)
            return value
        if isinstance(value, dict):
            return {name: self._protected(part) for name, part in value.items()}
        return [self._protected(part) for part in value] if isinstance(value, list) else value

    def _ids(self, text: str) -> np.ndarray:
        # The pattern is a group, so that split gives what it matched too.
        parts = [part for part in self._special.split(text) if part]
        plain = [part.replace(_BREAK, "") for part in parts if part not in self._markers]
        encoded = iter(self._tokenizer.encode_arrays(plain))
        arrays = [
            np.array([self._markers[part]], np.int32) if part in self._markers else next(encoded)
            for part in parts
        ]
        return np.concatenate([np.zeros(0, np.int32), *arrays])


def _any_of(markers: dict[str, int]) -> re.Pattern:
    """Matches any marker of at least two characters; of two that begin alike the longer."""
    longest_first = sorted((m for m in markers if len(m) > 1), key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")


def _generation_block() -> type:
    """Returns the Jinja extension that reads transformers' {% generation %} as its content: which
    tokens are of answers is found from the messages.
    """
    nodes = require("jinja2.nodes", extra="hf")

    class Generation(require("jinja2.ext", extra="hf").Extension):  # type: ignore[misc]
        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    return Generation


def _raise(message: str) -> None:
    raise require("jinja2", extra="hf").TemplateError(message)


def _strftime_now(form: str) -> str:
    # A template that asks for the date gets the same one always, so that prepare is repeatable.
    return datetime(2026, 1, 1).strftime(form)


def _tojson(value: Any, indent: int | None = None) -> str:
    # jinja2's own escapes HTML, which no model is to read.
    return json.dumps(value, ensure_ascii=False, indent=indent)

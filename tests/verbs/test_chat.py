"""The chat verb: through pipes, in a terminal, and what it refuses."""

import dataclasses
import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from support.recital import BYTES, letters, recite
from support.records import small_record
from support.toy_networks import with_likely_padding

import llada_jax.verbs.chat
from llada_jax import __main__
from llada_jax.masks import CAUSAL
from llada_jax.models.model import make_model
from llada_jax.models.transformer import Architecture

PROMPT = "### user\n{}\n\n### assistant\n"
# What a model recites: its answer to a message of two letters, and to a second one.
FIRST = PROMPT.format("Hi") + "Yes."
SECOND = "\n\n" + PROMPT.format("Hi") + "No."


def reciting(*texts, context=240):
    record = small_record()
    record.config["data"]["sequence_length"] = context
    return types.SimpleNamespace(
        tokenizer=BYTES,
        config=record.config,
        record=record,
        params=np.concatenate([letters(text) for text in texts]),
        model=types.SimpleNamespace(logits_fn=recite),
    )


def stdin_of(text: bytes, *, is_terminal: bool):
    stream = io.TextIOWrapper(io.BytesIO(text), encoding="utf-8")
    stream.isatty = lambda: is_terminal
    return stream


@pytest.fixture
def chat(monkeypatch, capsys):
    """Calls the verb on a model that recites; returns (exit status, stdout, stderr)."""

    def call(*argv, text=b"", model=None, is_terminal=False):
        monkeypatch.setattr(
            llada_jax.verbs.chat, "load", lambda path, **_: model or reciting(FIRST)
        )
        monkeypatch.setattr(sys, "stdin", stdin_of(text, is_terminal=is_terminal))
        status = __main__.main(["chat", "--checkpoint", "runs/fake", *argv])
        return status, *capsys.readouterr()

    return call


# ---- through pipes


def test_each_line_of_a_pipe_is_a_message_and_stdout_holds_the_answers(chat):
    model = reciting(FIRST, SECOND)
    status, out, err = chat("--gen-length", "8", text=b"Hi\n\nHi\r\n", model=model)
    assert (status, out) == (0, "Yes.\n---\nNo.\n")
    assert err.splitlines() == [
        "llada-jax: the tokenizer has no chat template; messages are written under plain headings."
    ]


def test_a_reset_forgets_the_turns_before_it(chat):
    _, out, _ = chat("--gen-length", "8", text=b"Hi\n/reset\nHi", model=reciting(FIRST, SECOND))
    assert out == "Yes.\n---\nYes.\n"


def test_turns_that_do_not_fit_are_dropped_with_a_notice(chat):
    _, out, err = chat("--gen-length", "8", text=b"Hi\n" * 3, model=reciting(FIRST, context=40))
    assert out == "Yes.\n---\n" * 2 + "Yes.\n"
    notice = "llada-jax: the oldest turn is forgotten, because the model reads 40 tokens.\n"
    assert err.count(notice) == 2


def test_a_message_longer_than_the_context_is_announced_and_asked(chat):
    status, _, err = chat("--gen-length", "8", text=b"Hi" * 50, model=reciting(FIRST, context=40))
    assert status == 0
    assert "have 133 tokens together, and the model was trained on rows of 40" in err
    assert "read as letters" not in err


def test_a_gap_in_a_message_is_announced_as_letters(chat):
    status, _, err = chat("--gen-length", "8", text=b"The [MASK:3] sat")
    assert status == 0
    assert "[MASK:3] in a prompt is read as letters" in err


def test_an_answer_that_takes_all_its_tokens_is_announced(chat):
    _, out, err = chat("--gen-length", "2", text=b"Hi")
    assert out == "Ye\n"
    assert "the answer takes all tokens of --gen-length 2" in err


def test_an_answer_without_room_for_the_end_of_most_answers_is_announced_once(chat):
    model = reciting(FIRST, SECOND)
    lengths = {"answers": {"median": 6, "most": 9, "longest": 30}}
    model.record = dataclasses.replace(model.record, lengths=lengths)
    _, out, err = chat("--gen-length", "8", text=b"Hi\nHi", model=model)
    assert out == "Yes.\n---\nNo.\n"
    assert err.count("a generation of 8 has no room for some of them; generate 9 tokens") == 1


def test_the_system_message_is_in_front(chat):
    text = "### system\nBe brief.\n\n" + PROMPT.format("Hi") + "Yes!"
    _, out, _ = chat("--gen-length", "4", "--system", "Be brief.", text=b"Hi", model=reciting(text))
    assert out == "Yes!\n"


def test_an_answer_has_no_ids_that_the_tokenizer_does_not_have(chat):
    model = reciting(FIRST)
    model.model.logits_fn = with_likely_padding(recite)
    assert chat("--gen-length", "8", text=b"Hi", model=model)[1] == "Yes.\n"


def test_answers_append_blocks_until_they_end(chat, monkeypatch):
    asked = []
    answer = llada_jax.verbs.chat.Conversation.answer

    def spy(self, question, **kwargs):
        asked.append({**self._settings, "gen_length": self.gen_length})
        return answer(self, question, **kwargs)

    monkeypatch.setattr(llada_jax.verbs.chat.Conversation, "answer", spy)
    chat(text=b"Hi")
    chat("--no-append", "--gen-length", "48", "--block-length", "16", text=b"Hi")
    chat("--lookahead", "4", "--gen-length", "8", text=b"Hi")
    chat("--gen-length", "40", text=b"Hi")
    assert [(a["gen_length"], a["block_length"], a.get("append", False)) for a in asked] == [
        (96, 32, True),  # half of the context of 240, in whole blocks
        (48, 16, False),
        (8, 8, False),
        (40, 20, True),
    ]
    assert asked[2]["lookahead"] == 4


@pytest.mark.parametrize(
    ("context", "length"), [(1, 1), (40, 20), (64, 32), (100, 32), (240, 96), (4096, 256)]
)
def test_an_answer_leaves_half_of_the_context_to_the_messages(context, length):
    assert llada_jax.verbs.chat.default_length(context) == length


@pytest.mark.parametrize(
    ("length", "block"), [(5, 5), (31, 31), (64, 32), (40, 20), (100, 25), (74, 74), (97, 97)]
)
def test_a_default_block_divides_the_answer_and_is_not_tiny(length, block):
    assert llada_jax.verbs.chat.default_block(length) == block


@pytest.mark.slow
def test_a_causal_model_answers_token_by_token(chat):
    shape = dict(vocab_size=260, num_layers=1, d_model=16, num_heads=2, num_kv_heads=2, head_dim=8)
    network = make_model(Architecture(**shape, d_ff=16), mask=CAUSAL)
    model = reciting(FIRST)
    model.record.config["objective"]["name"] = "autoregressive"
    model.model, model.params = network, network.init(jax.random.key(0))
    for length in ("5", "40"):
        status, out, _ = chat("--gen-length", length, text=b"Hi", model=model)
        assert status == 0
        assert out.endswith("\n")
    for words in (["--steps", "4"], ["--append"], ["--block-length", "8"]):
        status, out, err = chat("--gen-length", "8", *words, text=b"Hi", model=model)
        assert (status, out) == (2, "")
        assert "is about denoising" in err


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--gen-length", "40", "--block-length", "32"], "block_length=32 must divide gen_length"),
        (["--gen-length", "0"], "gen_length=0 must be at least 1"),
        (["--temperature", "-1"], "temperature=-1.0 must be a number from 0 to 1e+06"),
        (["--seed", "-1"], "seed=-1 must lie between"),
        (["--append", "--lookahead", "2"], "append is lookahead=0"),
        (["--commit", "treshold"], "Did you mean 'threshold'?"),
        (["--system", "caf\udce9"], "--system 'caf\\udce9' is not UTF-8"),
        (["--prompt", "Hi"], "there is no '--prompt'"),
    ],
)
def test_mistakes_exit_2_with_one_line(chat, argv, sentence):
    status, out, err = chat(*argv, text=b"Hi")
    assert (status, out) == (2, "")
    assert sentence in err
    assert err.count("\n") == 1


def test_input_that_is_not_utf8_is_named_by_its_line(chat):
    status, out, err = chat("--gen-length", "8", text=b"\xef\xbb\xbfHi\ncaf\xe9\n")
    assert (status, out) == (2, "Yes.\n")
    assert "Line 2 of stdin is not UTF-8 at byte 3" in err


def test_a_stdin_that_is_closed_has_no_messages(chat, monkeypatch):
    monkeypatch.setattr(llada_jax.verbs.chat, "load", lambda path, **_: reciting(FIRST))
    monkeypatch.setattr(sys, "stdin", None)
    assert __main__.main(["chat", "--checkpoint", "runs/fake"]) == 0


def test_several_processes_are_refused(chat, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    status, _, err = chat(text=b"Hi")
    assert status == 2
    assert "held by one process, and this run has 2" in err


# ---- in a terminal


def test_the_prompt_is_not_part_of_the_answers(chat):
    status, out, err = chat("--gen-length", "8", text=b"Hi\n \n", is_terminal=True)
    assert (status, out) == (0, "Yes.\n")
    assert err.count("> ") == 3
    assert "/reset begins again" in err


def test_what_cannot_be_answered_leaves_a_terminal_open(chat, monkeypatch):
    template = "{% if messages | length > 1 %}{{ raise_exception('one') }}{% endif %}Q"
    model = reciting("QYes.")
    model.tokenizer = BYTES.with_chat_template(template)
    text = b"Hi\nHi\n/reset\nHi\n"
    status, out, err = chat("--gen-length", "8", text=text, model=model, is_terminal=True)
    assert (status, out) == (0, "Yes.\nYes.\n")
    assert "refuses the conversation, because the template fails (one)" in err
    assert chat("--gen-length", "8", text=text, model=model)[0] == 2


def test_the_first_interrupt_waits_for_the_next_step_and_the_second_does_not():
    before = signal.getsignal(signal.SIGINT)
    with llada_jax.verbs.chat.stoppable() as check:
        check()
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(llada_jax.verbs.chat.Stopped):
            check()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == before


def test_an_answer_that_is_stopped_is_forgotten_with_its_message(chat, monkeypatch):
    conversation = llada_jax.verbs.chat.Conversation
    answer, turns = conversation.answer, []

    def interrupted(self, question, *, on_step):
        turns.append(len(self._turns))

        def stop_first(rows, state):
            if len(turns) == 1 and state.step == 3:
                signal.raise_signal(signal.SIGINT)
            on_step(rows, state)

        return answer(self, question, on_step=stop_first)

    monkeypatch.setattr(conversation, "answer", interrupted)
    status, out, err = chat("--gen-length", "8", text=b"Hi\nHi\nHi\n", is_terminal=True)
    assert status == 0
    assert turns == [0, 0, 1]
    assert "stopped; the message is forgotten" in err
    assert out.startswith("Yes.\n")


class Terminal:
    """A pseudo-terminal with `llada-jax chat` in it."""

    def __init__(self, *words):
        self.master, slave = pty.openpty()
        self.seen = ""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "llada_jax", "chat", *map(str, words)],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env={**os.environ, "TERM": "xterm-256color"},
            start_new_session=True,
        )
        os.close(slave)

    def wait_for(self, text: str, *, seconds: float = 120) -> None:
        """Reads until what was written since the last call holds `text`."""
        deadline = time.monotonic() + seconds
        while text not in self.seen:
            assert time.monotonic() < deadline, self.seen
            if select.select([self.master], [], [], 0.2)[0]:
                try:
                    self.seen += os.read(self.master, 65536).decode(errors="replace")
                except OSError:  # the other end is closed
                    assert text in self.seen, self.seen
        self.seen = self.seen[self.seen.index(text) + len(text) :]

    def wait_until_it_reads(self) -> None:
        """Returns once the main thread has slept for a quarter of a second: it reads its input.

        A prompt is written shortly before the input is read, and Python forgets an interrupt that
        arrives between the two until the next key.
        """
        deadline, before = time.monotonic() + 120, None
        while time.monotonic() < deadline:
            status = Path(f"/proc/{self.process.pid}/status").read_text()
            now = re.findall(r"^(?:State|\w*ctxt_switches):\s*(\w+)", status, flags=re.MULTILINE)
            if now == before and now[0] == "S":
                return
            before = now
            time.sleep(0.25)
        raise AssertionError(f"the process never waits for input: {before}")

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def interrupt(self) -> None:
        self.process.send_signal(signal.SIGINT)

    def end(self) -> int:
        try:
            return self.process.wait(timeout=60)
        finally:
            self.process.kill()
            os.close(self.master)


@pytest.mark.slow
def test_a_conversation_in_a_real_terminal(random_checkpoint):
    """The masks turn into text, Ctrl-C stops an answer, and once more leaves."""
    words = ["--checkpoint", random_checkpoint, "--gen-length", "256", "--eos", "never"]
    terminal = Terminal(*words, "--block-length", "256")
    terminal.wait_for("Ctrl-D leaves.")
    terminal.wait_for("> ")
    terminal.type("Hi\n")
    terminal.wait_for("revealed")
    terminal.wait_for("░")
    terminal.interrupt()
    terminal.wait_for("stopped; the message is forgotten.")
    terminal.wait_for("> ")
    terminal.wait_until_it_reads()
    terminal.interrupt()
    terminal.wait_for("llada-jax: interrupted.")
    assert terminal.end() == 130


@pytest.mark.slow
def test_pipes_are_answered_line_by_line_and_a_reader_may_leave(random_checkpoint):
    words = ["--checkpoint", random_checkpoint, "--gen-length", "4"]
    process = subprocess.Popen(
        [sys.executable, "-m", "llada_jax", "chat", *map(str, words)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,
    )
    process.stdin.write(b"Hi\n")
    assert process.stdout.readline()  # before stdin has ended
    process.stdout.close()
    process.stdin.write(b"Hi\n")
    assert process.wait(timeout=60) == 0
    assert b"Traceback" not in process.stderr.read()

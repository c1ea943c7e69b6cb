"""A conversation with a loaded model: its turns, what of them fits the context, and the answers."""

from collections.abc import Callable
from typing import Any, NamedTuple

from llada_jax.data.chat_template import DEFAULT, Chat
from llada_jax.data.dialogues import Malformed
from llada_jax.errors import UserError
from llada_jax.samplers.autoregressive import continue_tokens
from llada_jax.samplers.batches import ignore_step
from llada_jax.samplers.denoise import DenoiseStep
from llada_jax.samplers.text import (
    cut_at_end,
    decode_after,
    generate_tokens,
    without_denoising,
)
from llada_jax.sampling_flags import functions_of


class Question(NamedTuple):
    """A message of the user as the model reads it, behind the turns before it."""

    text: str
    tokens: list[int]  # of the whole conversation, up to where the answer begins
    num_dropped: int  # turns, a question and its answer each, that left to make room


class Answer(NamedTuple):
    text: str
    has_ended: bool  # False: it takes all the tokens that there were for it


class Conversation:
    """The turns of a dialogue with one model.

    Args:
        pretrained: what llada_jax.load returns.
        system: the system message, which comes before all others; "" has none.
        gen_length: the most tokens of an answer, which the context holds next to its prompt.
        seed: answer n of a conversation has the noise of seed + n.
        settings: every other setting of llada_jax.samplers.text.generate_tokens; for an
            autoregressive model those of llada_jax.samplers.autoregressive.continue_tokens.

    Raises:
        UserError: the chat template is not Jinja, or has no place for a system message.
    """

    def __init__(
        self, pretrained: Any, *, system: str, gen_length: int, seed: int, **settings: Any
    ):
        self._pretrained, self.tokenizer = pretrained, pretrained.tokenizer
        self.has_template = bool(self.tokenizer.chat_template)
        self._chat = Chat(self.tokenizer.chat_template or DEFAULT, self.tokenizer)
        self._opening = [{"role": "system", "content": system}] if system else []
        self._turns: list[tuple[str, str]] = []
        self.gen_length, self._seed, self._settings = gen_length, seed, settings
        self.record = pretrained.record
        self.context = self.record.sequence_length
        self.is_causal = self.record.mask.causal
        self._num_answers = 0
        # A template that takes no such messages is found here, and not by the first question.
        self._prompt("Hello")

    def reset(self) -> None:
        """Forgets all turns, but not the system message."""
        self._turns = []

    def ask(self, text: str) -> Question:
        """Returns a question behind as many of the latest turns as fit the context together with an
        answer; the other turns are forgotten.

        The prompt of a question that does not fit alone is longer than the context has room for.
        """
        num_dropped = 0
        tokens = self._prompt(text)
        while self._turns and len(tokens) + self.gen_length > self.context:
            del self._turns[0]
            num_dropped += 1
            tokens = self._prompt(text)
        return Question(text, tokens, num_dropped)

    def answer(
        self, question: Question, *, on_step: Callable[[range, DenoiseStep], None] = ignore_step
    ) -> Answer:
        """Returns what the model answers; `keep` makes it a part of the conversation.

        Args:
            on_step: called after each step of denoising, see
                llada_jax.samplers.text.generate_tokens; never by an autoregressive model.
        """
        tokenizer = self.tokenizer
        request: dict[str, Any] = dict(
            mask_id=tokenizer.mask_id,
            pad_id=tokenizer.pad_id,
            eos_id=tokenizer.end_ids,
            num_ids=tokenizer.vocab_size,
            gen_length=self.gen_length,
            seed=(self._seed + self._num_answers) % 2**32,
        )
        self._num_answers += 1
        if self.is_causal:
            # BOS is put in front of every prompt, and some templates write it too.
            begins = question.tokens[:1] == [tokenizer.bos_id]
            tokens_BT, _ = continue_tokens(
                self._pretrained.model.cached_fn,
                self._pretrained.params,
                [question.tokens[1:] if begins else question.tokens],
                bos_id=tokenizer.bos_id,
                **request,
                **without_denoising(self._settings),
            )
        else:
            tokens_BT, _ = generate_tokens(
                self._pretrained.model.logits_fn,
                self._pretrained.params,
                [question.tokens],
                on_step=on_step,
                **request,
                **self._settings,
                **functions_of(self._pretrained, **self._settings),
            )
        tokens = cut_at_end(tokens_BT[0], tokenizer.end_ids)
        text = decode_after(tokenizer, question.tokens, tokens)
        return Answer(text, has_ended=len(tokens) < self.gen_length)

    def keep(self, question: Question, answer: Answer) -> None:
        """Adds a turn, which later questions refer to."""
        self._turns.append((question.text, answer.text))

    def _prompt(self, text: str) -> list[int]:
        messages = list(self._opening)
        for asked, answered in self._turns:
            messages.append({"role": "user", "content": asked})
            messages.append({"role": "assistant", "content": answered})
        messages.append({"role": "user", "content": text})
        try:
            return self._chat.prompt_ids(messages)
        except Malformed as error:
            remedy = "leave --system out, or " if self._opening else ""
            raise UserError(
                f"The chat template of this model refuses the conversation, because {error}; "
                f"{remedy}put another one next to its tokenizer."
            ) from error

"""The bound on a whole text of any length, by a window that slides over it."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from llada_jax.data.round_trip import num_encoded_bytes
from llada_jax.errors import UserError
from llada_jax.evaluation.answer_rows import Question, noise_of
from llada_jax.evaluation.conditional import log_likelihoods
from llada_jax.units import bits_per_byte


class TextBound(NamedTuple):
    """A bound on -log p(text), exact for an autoregressive model.

    nats_per_token: mean over its tokens. bits_per_byte: the same in bits per UTF-8 byte, which
    models with different tokenizers share. The standard errors are of the Monte Carlo alone.
    """

    nats_per_token: float
    standard_error: float
    bits_per_byte: float
    bits_per_byte_standard_error: float
    num_tokens: int
    num_bytes: int


def windows(tokens: Sequence[int], *, length: int, context: int) -> list[Question]:
    """Cuts a text into answers, each after up to `context` tokens of the text before it; none of
    them is longer than `length` together with its context.

    The first window begins with the text and is full; the others move on by length - context.
    Every token is in exactly one answer, so the sum of the answers' scores bounds the text's
    log-likelihood by the chain rule. The noise is named by the answer and by how often the text has
    had it before, so that windows are independent.
    """
    if not 0 <= context < length:
        raise UserError(
            f"context={context} must be at least 0 and less than the window of {length} tokens."
        )
    questions: list[Question] = []
    times: Counter = Counter()
    first, last = 0, min(length, len(tokens))
    while first < len(tokens):
        answer = tuple(tokens[first:last])
        noise = noise_of(answer, times[answer])
        times[answer] += 1
        # the last window is not full, and may see more of the text before it
        before = tuple(tokens[max(0, last - length) : first]) if first else ()
        questions.append(Question(before, answer, noise=noise))
        first, last = last, min(last + length - context, len(tokens))
    return questions


def check_can_bound(estimator: str, what: str = "a text is scored by one") -> None:
    """Raises UserError for an estimator that is not a bound; `what` needs one."""
    if estimator == "confidence_order":
        raise UserError(
            f"estimator={estimator!r} is not a bound, and {what}; use exact_count or uniform_time."
        )


def bounds_of_texts(
    model: Any,
    params: dict,
    texts: Sequence[str],
    *,
    tokenizer: Any,
    length: int,
    context: int | None = None,
    **settings: Any,
) -> list[TextBound]:
    """Returns the bound on each text.

    Args:
        tokenizer: encodes the texts, without special tokens.
        length: of the window in tokens, at most the context of the model.
        context: tokens of each window that are seen and not scored; None: half the window. More
            context gives a tighter bound and takes more windows.
        settings: of llada_jax.evaluation.conditional.log_likelihoods, with num_samples per window.

    Raises:
        UserError: a text is empty, or a setting is out of range.
    """
    check_can_bound(settings.get("estimator", "exact_count"))
    context = length // 2 if context is None else context
    encoded = [tokenizer.encode(text) for text in texts]
    for number, tokens in enumerate(encoded):
        if not tokens:
            raise UserError(f"Text {number} is empty; a bound needs at least one token.")
    questions = [windows(tokens, length=length, context=context) for tokens in encoded]
    scores = iter(log_likelihoods(model, params, sum(questions, []), ids=tokenizer, **settings))
    bounds = []
    for text, tokens, asked in zip(texts, encoded, questions, strict=True):
        mine = [next(scores) for _ in asked]
        nats = -sum(score.log_likelihood for score in mine) / len(tokens)
        error = math.sqrt(sum(score.standard_error**2 for score in mine)) / len(tokens)
        # What a tokenizer loses is not scored, and would make the bound per byte too small.
        num_bytes = num_encoded_bytes(text, tokenizer.decode(tokens))
        rate = num_bytes / len(tokens)
        bounds.append(
            TextBound(
                nats,
                error,
                bits_per_byte(nats, bytes_per_token=rate),
                bits_per_byte(error, bytes_per_token=rate),
                len(tokens),
                num_bytes,
            )
        )
    return bounds

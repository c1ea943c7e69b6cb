"""Questions from a file, asked forwards, backwards and as infilling: exact match, ranking and
log-likelihood.
"""

import json
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from llada_jax.data.text import Cut, read_documents
from llada_jax.errors import UserError
from llada_jax.evaluation.answer_rows import Question, bucket, lay_out, noise_of
from llada_jax.evaluation.conditional import Score, encode_pair, log_likelihoods
from llada_jax.masks import Mask
from llada_jax.rng import key_for
from llada_jax.samplers import denoise
from llada_jax.samplers.autoregressive import continue_tokens
from llada_jax.samplers.text import cut_at_end, decode_after, generate_tokens

DIRECTIONS = ("forwards", "backwards", "infill")
KEYS = ("prompt", "answer", "choices", "prompt_choices", "backwards")


class Item(NamedTuple):
    """A question with the answers to choose from, `question.answer` among them; () has none."""

    question: Question
    choices: tuple[Question, ...]


class Result(NamedTuple):
    """How the questions of one direction were answered; shares have binomial standard errors.

    num_questions; exact_match: the share of answers that the model writes token by token, given
    their length. num_ranked: questions with choices. ranking_accuracy: the share of these in which
    the right choice has the highest log-likelihood; nan for none. ranking_chance: that of a guess.
    log_likelihood: mean of the right answers, in nats per answer. standard_error: of that mean over
    the questions, Monte Carlo included. mc_standard_error: what the Monte Carlo alone adds to it.
    """

    num_questions: int
    exact_match: float
    exact_match_standard_error: float
    num_ranked: int
    ranking_accuracy: float
    ranking_standard_error: float
    ranking_chance: float
    log_likelihood: float
    standard_error: float
    mc_standard_error: float


# ---- the file


def read_tasks(path: str) -> list[dict]:
    """Returns the objects of a JSONL file of prompts and answers.

    Raises:
        UserError: a line is not such an object, or the file has none.
    """
    rows = []
    for number, line in enumerate(read_documents(path, Cut(documents="line", form="txt")), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}:{number} is not valid JSON ({error}).") from error
        _check_row(row, f"{path}:{number}")
        rows.append(row)
    if not rows:
        raise UserError(f"{path} has no questions; each line is one JSON object.")
    return rows


def _check_row(row: Any, where: str) -> None:
    if not isinstance(row, dict):
        raise UserError(f'{where} is not an object; write {{"prompt": "...", "answer": "..."}}.')
    unknown = sorted(set(row) - set(KEYS))
    if unknown:
        raise UserError(f"{where} has the key {unknown[0]!r}; known are {', '.join(KEYS)}.")
    for key in ("prompt", "answer"):
        if not isinstance(row.get(key), str):
            raise UserError(f"{where} needs a text {key!r}.")
    for key, right in (("choices", "answer"), ("prompt_choices", "prompt")):
        choices = row.get(key, [row[right]])
        if not isinstance(choices, list) or not all(isinstance(c, str) for c in choices):
            raise UserError(f"{where}: {key!r} must be a list of texts.")
        if row[right] not in choices:
            raise UserError(f"{where}: {key!r} must hold the {right} {row[right]!r}.")
    if "backwards" in row:
        _check_row(row["backwards"], f"{where}, backwards")


def items_of(rows: Sequence[dict], direction: str, tokenizer: Any) -> list[Item]:
    """Returns the questions of one direction.

    forwards: what follows the prompt? backwards: the same of the row's "backwards", where it has
    one. infill: what stands before the answer, where something does? The prompt is masked where it
    stands.

    The questions of a file have independent noise, also where several have the same prompt.
    """
    if direction == "infill":
        items = [_infill_item(row, tokenizer) for row in rows if row["prompt"].strip()]
        return _told_apart(items)
    if direction == "backwards":
        rows = [row["backwards"] for row in rows if "backwards" in row]
    items = []
    for row in rows:
        question = encode_pair(tokenizer, row["prompt"], row["answer"])
        choices = (encode_pair(tokenizer, row["prompt"], c) for c in row.get("choices", ()))
        items.append(Item(question, tuple(choices)))
    return _told_apart(items)


def _infill_item(row: dict, tokenizer: Any) -> Item:
    def turned(prompt: str) -> Question:
        prompt_ids, answer_ids, *_ = encode_pair(tokenizer, prompt, row["answer"])
        if not prompt_ids:
            raise UserError(
                f"The prompt {prompt!r} in front of the answer {row['answer'][:40]!r} has no token "
                "to ask for; give it and each of 'prompt_choices' text of its own."
            )
        return Question((), prompt_ids, answer_ids)

    return Item(turned(row["prompt"]), tuple(map(turned, row.get("prompt_choices", ()))))


def _told_apart(items: Sequence[Item]) -> list[Item]:
    """Returns the items, of which those that ask what an earlier one has asked have noise of their
    own, shared by all choices of an item.

    What surrounds an answer names its noise. Under the same noise the errors of questions would not
    average out, and the error of their mean would be larger than is reported.
    """
    times: Counter = Counter()
    found = []
    for item in items:
        surroundings = (*item.question.before, -1, *item.question.after)
        if times[surroundings]:
            noise = noise_of(surroundings, times[surroundings])
            item = Item(
                item.question._replace(noise=noise),
                tuple(choice._replace(noise=noise) for choice in item.choices),
            )
        times[surroundings] += 1
        found.append(item)
    return found


# ---- answers


def written(
    model: Any,
    params: dict,
    questions: Sequence[Question],
    *,
    tokenizer: Any,
    batch_size: int = 32,
) -> list[tuple[int, ...]]:
    """Returns what a masked diffusion model writes where each answer stands, as token ids.

    As many tokens as the answer has, one per step, the most confident first, at temperature 0; what
    stands before and after is given.
    """
    found: dict[int, tuple[int, ...]] = {}
    by_widths: dict[tuple[int, ...], list[int]] = {}
    for number, question in enumerate(questions):
        by_widths.setdefault(tuple(bucket(len(p)) for p in question[:3]), []).append(number)
    for widths, numbers in sorted(by_widths.items()):
        size = min(batch_size, 1 << (len(numbers) - 1).bit_length())
        for first in range(0, len(numbers), size):
            batch = numbers[first : first + size]
            padded = [*batch, *[batch[-1]] * (size - len(batch))]
            start, width = widths[0], widths[1]
            rows = [
                lay_out(
                    questions[number],
                    questions[number].answer,
                    np.ones((1, len(questions[number].answer)), bool),
                    widths,
                    pad_id=tokenizer.pad_id,
                )
                for number in padded
            ]
            tokens_BT, segment_ids_BT, positions_BT, _, where_BA = (
                np.concatenate(arrays) for arrays in zip(*rows, strict=True)
            )
            is_fixed_BT = np.ones(tokens_BT.shape, bool)
            is_fixed_BT[:, start : start + width] = ~where_BA
            gen_length = tokens_BT.shape[1] - start
            canvas_BT = denoise.generate(
                jax.tree_util.Partial(model.logits_fn, params),
                np.where(is_fixed_BT, tokens_BT, tokenizer.mask_id),
                key_for("sampling", 0),
                mask_id=tokenizer.mask_id,
                is_fixed_BT=is_fixed_BT,
                segment_ids_BT=segment_ids_BT,
                positions_BT=positions_BT,
                gen_length=gen_length,
                block_length=gen_length,
                steps=max(len(questions[number].answer) for number in batch),
                num_ids=tokenizer.vocab_size,
            )
            answers_BA = jax.device_get(canvas_BT)[:, start : start + width]
            for number, row in zip(batch, answers_BA):
                found[number] = tuple(int(i) for i in row[: len(questions[number].answer)])
    return [found[number] for number in range(len(questions))]


def written_to_the_end(
    model: Any,
    params: dict,
    questions: Sequence[Question],
    *,
    tokenizer: Any,
    mask: Mask,
    gen_length: int,
    batch_size: int = 32,
) -> list[str]:
    """Returns the text that a model writes behind each prompt, up to EOS or the end of a turn and
    at most `gen_length` tokens, at temperature 0.

    Nothing follows these questions: what stands behind an answer would give its length away.
    """
    prompts = [list(question.before) for question in questions]
    request: dict[str, Any] = dict(
        mask_id=tokenizer.mask_id,
        pad_id=tokenizer.pad_id,
        eos_id=tokenizer.end_ids,
        num_ids=tokenizer.vocab_size,
        gen_length=gen_length,
        batch_size=batch_size,
    )
    if mask.causal:
        tokens_BT, _ = continue_tokens(
            model.cached_fn, params, prompts, bos_id=tokenizer.bos_id, **request
        )
    else:
        tokens_BT, _ = generate_tokens(model.logits_fn, params, prompts, **request)
    return [
        decode_after(tokenizer, prompt, cut_at_end(tokens, tokenizer.end_ids))
        for prompt, tokens in zip(prompts, tokens_BT, strict=True)
    ]


def _matches(
    model: Any,
    params: dict,
    questions: Sequence[Question],
    scores: Sequence[Score],
    *,
    tokenizer: Any,
    mask: Mask,
    gen_length: int | None,
    batch_size: int,
) -> list[bool]:
    """Returns which answers the model writes exactly; see `answer`."""
    many: dict[str, Any] = dict(tokenizer=tokenizer, batch_size=batch_size)
    if gen_length is not None and not any(question.after for question in questions):
        texts = written_to_the_end(
            model, params, questions, mask=mask, gen_length=gen_length, **many
        )
        return [
            text == decode_after(tokenizer, question.before, question.answer)
            for text, question in zip(texts, questions, strict=True)
        ]
    if mask.causal:
        return [bool(score.is_most_likely) for score in scores]
    tokens = written(model, params, questions, **many)
    return [found == question.answer for found, question in zip(tokens, questions, strict=True)]


def _share(is_right: Sequence[bool]) -> tuple[float, float]:
    if not is_right:
        return math.nan, math.nan
    share = float(np.mean(is_right))
    return share, math.sqrt(share * (1 - share) / len(is_right))


def answer(
    model: Any,
    params: dict,
    items: Sequence[Item],
    *,
    tokenizer: Any,
    mask: Mask,
    gen_length: int | None = None,
    batch_size: int = 32,
    **settings: Any,
) -> Result:
    """Asks a model questions.

    An autoregressive model matches exactly where each token of the answer is its most likely next
    one, which is greedy decoding.
    With `gen_length` no model is given the length of an answer: it writes at most this many tokens,
    and what comes before EOS or the end of a turn must be the answer. An answer in front of a given
    text has its length all the same.

    Args:
        model, params: see llada_jax.models.model.Model.
        items: at least one.
        mask: what the network's attention sees.
        settings: of llada_jax.evaluation.conditional.log_likelihoods.
    """
    questions = [item.question for item in items]
    flat = questions + [choice for item in items for choice in item.choices]
    scores = log_likelihoods(
        model, params, flat, mask=mask, ids=tokenizer, batch_size=batch_size, **settings
    )
    right, others = scores[: len(items)], iter(scores[len(items) :])
    is_match = _matches(
        model,
        params,
        questions,
        right,
        tokenizer=tokenizer,
        mask=mask,
        gen_length=gen_length,
        batch_size=batch_size,
    )
    is_first, chances = [], []
    for item in items:
        ranked: list[Score] = [next(others) for _ in item.choices]
        if ranked:
            best = int(np.argmax([score.log_likelihood for score in ranked]))
            is_first.append(item.choices[best].answer == item.question.answer)
            chances.append(1 / len(ranked))
    nats = np.array([score.log_likelihood for score in right])
    errors = np.array([score.standard_error for score in right])
    return Result(
        len(items),
        *_share(is_match),
        len(is_first),
        *_share(is_first),
        float(np.mean(chances)) if chances else math.nan,
        float(nats.mean()),
        float(nats.std(ddof=1) / math.sqrt(len(nats))) if len(nats) > 1 else math.nan,
        float(np.sqrt(np.sum(errors**2)) / len(nats)),
    )

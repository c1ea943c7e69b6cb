"""What a loaded model may be asked: its own token ids, lists of texts, pairs that fit its rows; and
what of a request works but may disappoint.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from llada_jax.checkpoints.record import RunRecord
from llada_jax.errors import UserError
from llada_jax.evaluation.answer_rows import Question
from llada_jax.evaluation.conditional import encode_pair
from llada_jax.samplers.text import GAP


def check_ids(num_rows: int, *ids: Any) -> None:
    """Raises UserError for token ids that are not whole numbers, or have no row in the embedding,
    where a gather would silently take another one.

    Args:
        ids: arrays, lists or single ids; None stands for none.
    """
    for some in ids:
        array = np.asarray([] if some is None else some)
        is_whole = array.dtype.kind in "iu"
        is_wrong = (array < 0) | (array >= num_rows) if is_whole else np.ones(array.shape, bool)
        if is_wrong.any():
            raise UserError(
                f"{array[is_wrong].flat[0]} is not a token id of this model, whose embedding "
                f"has {num_rows} rows; give whole numbers from 0 to {num_rows - 1}."
            )


def check_token_rows(num_rows: int, name: str, rows: Any) -> None:
    """Raises UserError for what is not token ids [B, T], such as rows of several lengths.

    Args:
        num_rows: of the embedding, see `check_ids`.
        name: of the rows in the message.
    """
    try:
        num_dims = np.ndim(rows)
    except ValueError:
        # numpy has no array of rows of several lengths
        num_dims = 0
    if num_dims != 2:
        shown = repr(rows) if len(repr(rows)) <= 60 else f"{repr(rows)[:57]}..."
        raise UserError(
            f"{name}={shown} must be rows of token ids, all of one length; pass a list of lists, "
            "such as [[5, 6], [7, 8]], and rows of another length in another call."
        )
    check_ids(num_rows, rows)


def list_of_texts(texts: Iterable[str], function: str) -> list[str]:
    """Returns the texts that `function` was given.

    Raises:
        UserError: they are one text, or something else than texts.
    """
    name = "prompts" if function == "generate" else "texts"
    if isinstance(texts, str):
        shown = repr(texts) if len(texts) <= 40 else f"{texts[:40]!r}..."
        raise UserError(f"{name}={shown} is one text; pass a list, as in {function}([text]).")
    if not isinstance(texts, Iterable):
        raise UserError(f"{name}={texts!r} is not a list; pass one, as in {function}([text]).")
    texts = list(texts)
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise UserError(f"{name}[{number}] is a {type(text).__name__}; give a text.")
    return texts


def check_can_infill(record: RunRecord) -> None:
    """Raises UserError for a model that sees no text behind a gap."""
    if record.mask.causal:
        raise UserError(
            f"A model of objective.name={record.objective!r} reads from left to right and cannot "
            "fill in a gap; use a checkpoint of masked_diffusion."
        )


def as_question(pair: Any, tokenizer: Any) -> Question:
    """Returns the question of a (prompt, answer) of texts or of token ids.

    Raises:
        UserError: it is something else.
    """
    if isinstance(pair, Question):
        return pair
    is_pair = isinstance(pair, Iterable) and not isinstance(pair, str)
    parts = tuple(pair) if is_pair else ()
    if len(parts) != 2 or not all(isinstance(part, Iterable) for part in parts):
        raise UserError(f"{pair!r} is not a pair; pass a list of (prompt, answer).")
    prompt, answer = parts
    if isinstance(prompt, str) and isinstance(answer, str):
        return encode_pair(tokenizer, prompt, answer)
    return Question(tuple(prompt), tuple(answer))


def check_questions(questions: Sequence[Question], *, num_rows: int, longest: int) -> None:
    """Raises UserError for a question of ids that the model does not have, or of more tokens than
    the rows that it was trained on.
    """
    for number, question in enumerate(questions):
        check_ids(num_rows, *question[:3])
        length = sum(len(part) for part in question[:3])
        if length > longest:
            raise UserError(
                f"Pair {number} has {length} tokens and the model was trained on rows of "
                f"{longest}; shorten its prompt, or bound a whole text with score_text."
            )


def window_of(record: RunRecord, window: int | None) -> int:
    """Returns the tokens of a window over whole texts: a training row unless `window` is smaller.

    Raises:
        UserError: it holds no token, or more than the rows that the model was trained on.
    """
    longest = record.sequence_length
    if window is not None and not 1 <= window <= longest:
        raise UserError(
            f"window={window} must be at least 1 and at most {longest}, the length of the rows "
            "that the model was trained on; leave it out for that length."
        )
    return longest if window is None else window


def surprises(prompts: Sequence[str], *, length: int, trained: int) -> list[str]:
    """Returns what of a request for text works but may disappoint, in sentences for the user.

    Args:
        prompts: texts in which a gap is read as letters.
        length: tokens of the longest row, with those that are generated.
        trained: tokens of the rows that the model was trained on.
    """
    found = []
    gaps = [gap[0] for gap in map(GAP.search, prompts) if gap]
    if gaps:
        found.append(
            f"{gaps[0]} in a prompt is read as letters; a gap is filled by `sample --infill` or "
            "model.infill."
        )
    # Not refused: rotary positions extend, and a little beyond the trained length usually still
    # reads well.
    if length > trained:
        found.append(
            f"prompt and generation have {length} tokens together, and the model was trained on "
            f"rows of {trained}; expect worse text."
        )
    return found


def length_hint(
    record: RunRecord, *, gen_length: int, shortest_row: int | None = None
) -> list[str]:
    """Returns a sentence for the user where a generation has no room for what the model has learnt
    to write: it then ends nothing, or squeezes every text into a length that none of them has.

    Args:
        shortest_row: tokens of the shortest row, prompt and generation, for a model that has learnt
            to end whole documents; None for one that answers messages.
    """
    lengths = record.lengths or {}
    if "answers" in lengths:
        most, room, what = lengths["answers"]["most"], gen_length, "answers"
        given = f"a generation of {gen_length}"
    elif "documents" in lengths and shortest_row is not None:
        most, room, what = lengths["documents"]["most"], shortest_row, "documents"
        given = f"{shortest_row} with the prompt"
    else:
        return []
    # Longer texts continue in the next row, so that few rows have shown how they end.
    if not room < most <= record.sequence_length:
        return []
    return [
        f"99% of the {what} in the training data have up to {most} tokens, their end included, and "
        f"{given} has no room for some of them; generate {gen_length + most - room} tokens."
    ]

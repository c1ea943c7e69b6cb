"""How long the texts are that a model learns to end, counted while they are prepared: the answers
of dialogues, the documents of other text.

Counts of shards and of data sets add up. They stay small, because lengths above EXACT are rounded
up, by at most a sixteenth.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from llada_jax.data.chat_template import Document

EXACT = 64
# Keys in dataset.json, and in the receipts that add up to it.
LENGTHS, ANSWERS, DOCUMENTS = "lengths", "answers", "documents"


def rounded_up(length: int) -> int:
    """Returns the length under which a text is counted."""
    if length <= EXACT:
        return length
    step = 1 << ((length - 1).bit_length() - 5)
    return -(-length // step) * step


def answer_lengths(document: Document, end_ids: Iterable[int]) -> list[int]:
    """Returns the tokens of each answer of a document, with the one that ends it: a template may
    write none behind earlier answers, which end with EOS where they are the last.
    """
    edges = np.diff(np.concatenate([[0], document.is_answer, [0]]))
    starts, stops = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
    has_end = np.isin(document.tokens[stops - 1], list(end_ids))
    return (stops - starts + ~has_end).tolist()


def added(counts: Iterable[Mapping]) -> dict[str, int]:
    """Returns the sum of {length: number of texts}, in order and with the keys that JSON has."""
    total: Counter = Counter()
    for one in counts:
        total.update({int(length): number for length, number in one.items()})
    return {str(length): total[length] for length in sorted(total)}


def lengths_json(contents: Sequence[Mapping]) -> dict[str, dict]:
    """Returns the part of dataset.json about the lengths of training texts, from those of receipts
    or of other data sets: {"lengths": {"answers" or "documents": {length: number of texts}}}; {}
    where one of them was written by a version that counted none.
    """
    if not all(LENGTHS in content for content in contents):
        return {}
    kinds = {kind for content in contents for kind in content[LENGTHS]}
    parts = {kind: [content[LENGTHS].get(kind, {}) for content in contents] for kind in kinds}
    return {LENGTHS: {kind: added(parts[kind]) for kind in sorted(kinds)}}


def described(counts: Mapping[str, int]) -> dict[str, int]:
    """Returns the lengths that half of the texts, 99% of them and all of them do not exceed, as
    {"median", "most", "longest"}; {} of no texts.
    """
    if not counts:
        return {}
    total, so_far, lengths = sum(counts.values()), 0, {}
    percents = {"median": 50, "most": 99, "longest": 100}
    for length, number in sorted((int(length), number) for length, number in counts.items()):
        so_far += number
        for name, percent in percents.items():
            if name not in lengths and 100 * so_far >= percent * total:
                lengths[name] = length
    return lengths

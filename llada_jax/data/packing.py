"""Documents -> rows of T tokens, and the split of documents into training and held-out text."""

import hashlib
from collections.abc import Iterable, Iterator

import numpy as np


def pack(
    documents: Iterable[np.ndarray], *, sequence_length: int, eos_id: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Joins documents, with an EOS after each, and cuts the stream into rows.

    A document may continue in the next row.

    Args:
        documents: int[any] token ids of one document each, without an EOS.
        sequence_length: T.

    Yields:
        (tokens int32[n], starts bool[n]); starts is True where a document begins. n = T, except in
        the last row, where 1 <= n <= T.
    """
    tokens, starts, length = [], [], 0
    for document in documents:
        is_start = np.zeros(len(document) + 1, dtype=bool)
        is_start[0] = True
        tokens += [document, [eos_id]]
        starts.append(is_start)
        length += len(document) + 1
        if length < sequence_length:
            continue
        flat_tokens = np.concatenate(tokens, dtype=np.int32, casting="same_kind")  # type: ignore[call-overload]
        flat_starts = np.concatenate(starts)
        end = length - length % sequence_length
        for i in range(0, end, sequence_length):
            yield flat_tokens[i : i + sequence_length], flat_starts[i : i + sequence_length]
        tokens, starts, length = [flat_tokens[end:]], [flat_starts[end:]], length - end
    if length:
        yield np.concatenate(tokens, dtype=np.int32, casting="same_kind"), np.concatenate(starts)  # type: ignore[call-overload]


def is_heldout(text: str, *, fraction: float) -> bool:
    """Whether a text is held out: true for about `fraction` of all texts.

    A hash of the text alone decides, so that the split depends neither on the order of the
    documents nor on the files they are in, and two copies of a text are never on both sides.
    """
    number = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
    return number < fraction * 2**64

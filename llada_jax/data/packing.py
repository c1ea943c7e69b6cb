"""Documents -> rows of T tokens, and the split of documents into training and held-out text."""

import hashlib
from collections.abc import Iterable, Iterator

import numpy as np


def pack(
    documents: Iterable[np.ndarray], *, sequence_length: int, eos_id: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Joins documents, an EOS after each, and cuts the stream into rows; a document may go on in
    the next row.

    Args:
        documents: int[any] token ids of one document each, without EOS.
        sequence_length: T.

    Yields:
        (tokens int32[n], starts bool[n]), starts True where a document begins; n = T, in the last
        row 1 <= n <= T.
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
        flat_tokens = np.concatenate(tokens, dtype=np.int32, casting="same_kind")
        flat_starts = np.concatenate(starts)
        end = length - length % sequence_length
        for i in range(0, end, sequence_length):
            yield flat_tokens[i : i + sequence_length], flat_starts[i : i + sequence_length]
        tokens, starts, length = [flat_tokens[end:]], [flat_starts[end:]], length - end
    if length:
        yield np.concatenate(tokens, dtype=np.int32, casting="same_kind"), np.concatenate(starts)


def is_heldout(text: str, *, fraction: float) -> bool:
    """True for about `fraction` of all texts, decided by a hash of the text alone: equal texts
    share a side.

    So the split depends neither on the order of the documents nor on the files that hold them.
    """
    number = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
    return number < fraction * 2**64

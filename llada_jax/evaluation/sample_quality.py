"""How good samples are by measures that do not ask the model that made them.

A single number can be fooled: a model that always writes "the the the" is likely under many
judges. So there are three: what another model pays for the text, how much of a sample repeats
itself, and how far the frequencies of the tokens are from those of real text.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# Words of a repeated phrase; two tokens in a row recur in good text.
PHRASE = 4
BOOTSTRAP_DRAWS = 200


class Samples(NamedTuple):
    """Continuations, row by row.

    nll_B: nats, of the whole continuation after its prompt, by the model that judges. num_bytes_B:
    of its text. tokens_BT: int, of one length.
    """

    nll_B: np.ndarray
    num_bytes_B: np.ndarray
    tokens_BT: np.ndarray


class Quality(NamedTuple):
    """The three measures; lower is better where it is not below that of real text.

    bits_per_byte: by the judge. repetition: share of the phrases of a row that it has had before.
    unigram_distance: total variation between the frequencies of the tokens and those of real text,
        0 to 1. Few samples are far from any text, so compare equal numbers of them.
    """

    bits_per_byte: float
    repetition: float
    unigram_distance: float


def best_of(candidates: Sequence[Samples], score_NB: np.ndarray) -> Samples:
    """Returns the candidate with the greatest score, row by row; the first of equals.

    Args:
        candidates: N continuations of the same prompts.
        score_NB: float, of each of them, such as its log-likelihood by the model that made it.
    """
    choice_B = np.argmax(score_NB, axis=0)
    rows = np.arange(len(choice_B))
    return Samples(*(np.stack(arrays)[choice_B, rows] for arrays in zip(*candidates, strict=True)))


def repetition(tokens_BT: np.ndarray) -> np.ndarray:
    """Returns for each row the share of its phrases that it has had before, float64 [B]; 0 for rows
    shorter than a phrase.
    """
    num_phrases = max(tokens_BT.shape[1] - PHRASE + 1, 1)
    rows = tokens_BT.tolist()
    different = [{tuple(row[i : i + PHRASE]) for i in range(num_phrases)} for row in rows]
    return np.array([1 - len(phrases) / num_phrases for phrases in different])


def unigram_distance(tokens: np.ndarray, frequency_V: np.ndarray) -> float:
    """Returns the total variation distance between the frequencies of tokens and those given."""
    counts_V = np.bincount(tokens.ravel(), minlength=len(frequency_V))
    return float(np.abs(counts_V / counts_V.sum() - frequency_V).sum() / 2)


def quality(samples: Samples, frequency_V: np.ndarray) -> Quality:
    """Returns the measures; frequency_V are those of the tokens of real text."""
    return _quality(samples, repetition(samples.tokens_BT), frequency_V)


def _quality(samples: Samples, repetition_B: np.ndarray, frequency_V: np.ndarray) -> Quality:
    bits = samples.nll_B.sum() / np.log(2) / samples.num_bytes_B.sum()
    distance = unigram_distance(samples.tokens_BT, frequency_V)
    return Quality(float(bits), float(repetition_B.mean()), distance)


def difference(ours: Samples, theirs: Samples, frequency_V: np.ndarray) -> tuple[Quality, Quality]:
    """Returns by how much our measures are above theirs, and the standard errors of that, from a
    bootstrap over the prompts, which both samples continue row by row.
    """
    rng = np.random.default_rng(0)
    num_rows = len(ours.nll_B)
    both = [(samples, repetition(samples.tokens_BT)) for samples in (ours, theirs)]

    def drawn(rows: np.ndarray) -> np.ndarray:
        one, other = (
            np.array(
                _quality(Samples(*(array[rows] for array in samples)), rep_B[rows], frequency_V)
            )
            for samples, rep_B in both
        )
        return one - other

    differences = [drawn(rng.integers(num_rows, size=num_rows)) for _ in range(BOOTSTRAP_DRAWS)]
    errors = np.std(differences, axis=0, ddof=1)
    return Quality(*map(float, drawn(np.arange(num_rows)))), Quality(*map(float, errors))


def is_no_worse(ours: Samples, theirs: Samples, frequency_V: np.ndarray) -> bool:
    """Whether none of our measures is above theirs by more than two standard errors."""
    above, errors = difference(ours, theirs, frequency_V)
    return all(value <= 2 * error for value, error in zip(above, errors, strict=True))

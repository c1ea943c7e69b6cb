"""What a tokenizer cannot give back: found on a sample, described, and kept out of the byte counts.

SentencePiece with that library's defaults drops line feeds and repeated spaces, other tokenizers
change letters to lower case or know no emoji. Bits per byte divide the loss by `num_bytes`, so
bytes that no token stands for would make such a tokenizer look better than it is.
"""

import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable

from llada_jax.data.tokenizer import Tokenizer

# Holds what tokenizers are known to lose: spaces at both ends and in runs, line ends, tabs, capital
# letters, ligatures, combining accents, symbols, emoji.
PROBE = " a  B\n\n\tc\r\n \ufb01 e\u0301 \u2603 \U0001f600 "

# What may have happened to all text, as (words for what comes back, the change itself). The first
# form of Unicode that fits is the one that is named.
_SPACES: tuple[str, Callable[[str], str]] = (
    "with single spaces for all white space",
    lambda text: " ".join(text.split()),
)
_LOWER: tuple[str, Callable[[str], str]] = ("in lower case", str.lower)
_FORMS: tuple[str, ...] = ("NFKC", "NFKD", "NFC", "NFD")

# So many kinds of lost characters are listed.
_NUM_LISTED = 8


def is_lossless(texts: Iterable[str], tokenizer: Tokenizer) -> bool:
    """Whether the probe and all texts come back as they were."""
    return all(text == decoded for text, decoded in _round_trips([PROBE, *texts], tokenizer))


def describe_loss(texts: list[str], tokenizer: Tokenizer) -> str:
    """Returns what is lost of the texts, as one sentence without its end; "" when nothing is."""
    lossy = [pair for pair in _round_trips(texts, tokenizer) if pair[0] != pair[1]]
    if not lossy:
        return ""
    lost = Counter()
    for text, decoded in lossy:
        lost += Counter(text) - Counter(decoded)
    listed = [f"{_shown(c)} ({count:,} times)" for c, count in lost.most_common(_NUM_LISTED)]
    if len(lost) > _NUM_LISTED:
        listed.append(f"{len(lost) - _NUM_LISTED:,} other characters")
    # Without a lost character, some were added or have changed places.
    what = ", ".join(listed) + " are lost or changed" if listed else "characters are added"
    sentence = f"in {len(lossy):,} of {len(texts):,} sampled documents {what}"
    normalisations = _normalisations(lossy)
    if normalisations:
        sentence += f"; the text comes back {' and '.join(normalisations)}"
    return sentence


def num_encoded_bytes(text: str, decoded: str) -> int:
    """Returns the bytes of a text that its tokens stand for.

    That is what comes back of it, without the marks for what is unknown. What a tokenizer adds (the
    spaces between word pieces, for example) is not of the text and does not count.
    """
    if "\ufffd" not in text:
        decoded = decoded.replace("\ufffd", "")
    return min(len(text.encode()), len(decoded.encode()))


def _round_trips(texts: list[str], tokenizer: Tokenizer) -> list[tuple[str, str]]:
    return [
        (text, tokenizer.decode(ids))
        for text, ids in zip(texts, tokenizer.encode_arrays(texts), strict=True)
    ]


def _normalisations(lossy: list[tuple[str, str]]) -> list[str]:
    """Returns in which normal forms all texts come back that did not have them before."""

    def fits(change: Callable[[str], str]) -> bool:
        return any(change(text) != text for text, _ in lossy) and all(
            change(decoded) == decoded for _, decoded in lossy
        )

    found = [words for words, change in (_SPACES, _LOWER) if fits(change)]
    forms = [f for f in _FORMS if fits(lambda text, f=f: unicodedata.normalize(f, text))]  # type: ignore[misc]
    return found + [f"in the Unicode form {form}" for form in forms[:1]]


def _shown(character: str) -> str:
    """Returns how a character is written in a message, its code point where it cannot be seen."""
    if character == " ":
        return "the space"
    return ascii(character) if not character.isprintable() else f"{character!r}"

"""Canvases: prompts with masks behind them, or texts with masked spans, laid out as one batch."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# Rows are padded to a multiple of this many tokens, so that rows of similar length share one
# compiled program.
PROMPT_BUCKET = 32


def width_of(length: int) -> int:
    """Returns the columns that a row of `length` given tokens takes."""
    return -(-length // PROMPT_BUCKET) * PROMPT_BUCKET


class Canvas(NamedTuple):
    """What a sampler starts from: numpy arrays [B, T]."""

    tokens_BT: np.ndarray  # int32: padding, given tokens, and masks where a token is wanted
    is_fixed_BT: np.ndarray  # bool: padding and given tokens, never changed
    segment_ids_BT: np.ndarray  # int32: 0 padding, 1 everything else
    positions_BT: np.ndarray  # int32: 0 at the first token of the row that is not padding


def make_canvas(
    prompts: Sequence[Sequence[int]], *, gen_length: int, mask_id: int, pad_id: int
) -> Canvas:
    """Lays out prompts of any lengths: padded on the LEFT to a common width that is a multiple of
    PROMPT_BUCKET, each followed by `gen_length` masks.

    Left padding keeps every prompt next to its generation and the generation in the same columns of
    all rows. The padding has segment 0, so no real token attends to it, and positions start behind
    it: a row gets the logits that it would get alone.
    """
    prompt_width = width_of(max(len(prompt) for prompt in prompts))
    shape = (len(prompts), prompt_width + gen_length)
    tokens_BT = np.full(shape, mask_id, np.int32)
    tokens_BT[:, :prompt_width] = pad_id
    first_B = np.array([prompt_width - len(prompt) for prompt in prompts])
    for row, prompt in enumerate(prompts):
        tokens_BT[row, first_B[row] : prompt_width] = prompt
    column_T = np.arange(shape[1])
    return Canvas(
        tokens_BT=tokens_BT,
        is_fixed_BT=np.broadcast_to(column_T < prompt_width, shape),
        segment_ids_BT=(column_T >= first_B[:, None]).astype(np.int32),
        positions_BT=np.maximum(column_T - first_B[:, None], 0).astype(np.int32),
    )


def make_infill_canvas(
    texts: Sequence[Sequence[int]],
    is_given: Sequence[Sequence[bool]],
    *,
    mask_id: int,
    pad_id: int,
) -> Canvas:
    """Lays out texts with gaps: padded on the RIGHT to a common width that is a multiple of
    PROMPT_BUCKET; the whole row is generated but for what is given.

    Right padding keeps the column of a token independent of the other rows. The padding has
    segment 0, and counts as given.

    Args:
        texts: token ids; a token that is not given is not read.
        is_given: for each text, which of its tokens are kept.
    """
    width = width_of(max(len(text) for text in texts))
    shape = (len(texts), width)
    tokens_BT, is_fixed_BT = np.full(shape, pad_id, np.int32), np.ones(shape, bool)
    length_B = np.array([len(text) for text in texts])
    for row, (text, given) in enumerate(zip(texts, is_given, strict=True)):
        is_fixed_BT[row, : len(text)] = given
        tokens_BT[row, : len(text)] = np.where(given, text, mask_id)
    column_T = np.arange(width)
    return Canvas(
        tokens_BT=tokens_BT,
        is_fixed_BT=is_fixed_BT,
        segment_ids_BT=(column_T < length_B[:, None]).astype(np.int32),
        positions_BT=np.broadcast_to(column_T, shape).astype(np.int32),
    )

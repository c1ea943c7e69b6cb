"""What attention may see, as a value: segments, causality and block structure.

Objectives name a Mask, networks obey it, and every attention kernel derives its own form from it.
`may_attend` is the one definition that all of them are tested against.

Segments, said once for the whole package. The documents of a row carry the ids 1, 2, ..., and a
query attends only to keys of its own segment. Segment 0 is padding: no document ever attends to it,
and what is computed there is never read (padding attends to padding, or its softmax would be over
nothing and give NaN, which the backward pass would spread). `segment_ids_BT=None` means that the
whole row is one segment.
"""

from typing import Any, NamedTuple

import jax
from jax import Array


class Mask(NamedTuple):
    """Which positions of its own segment a query may attend to.

    causal: the query's own position and those before it, as in autoregressive models.
    block_length: the query's own block of that many positions and the blocks before it, as in block
        diffusion (BD3-LM, arXiv 2503.09573, section 3.1). 0 means that there are no blocks.

    Without either, a query sees its whole segment. With both, `causal` decides alone: it is the
    stricter of the two.
    """

    causal: bool = False
    block_length: int = 0

    @property
    def has_blocks(self) -> bool:
        """Whether this is neither causal nor bidirectional, which few kernels can express."""
        return self.block_length > 0 and not self.causal


BIDIRECTIONAL = Mask()
CAUSAL = Mask(causal=True)


def may_attend(
    mask: Mask,
    *,
    query_segment: Any,
    key_segment: Any,
    query_index: Any,
    key_index: Any,
) -> Any:
    """Returns whether each query may attend to each key, bool in the shape that they broadcast to.

    A position may always attend to itself, so that no softmax is over nothing. Works on numpy
    arrays, on jax arrays and on plain integers alike.

    Args:
        query_segment, key_segment: ids of the documents (see above).
        query_index, key_index: columns of the row, counted from 0 over the whole row. Blocks tile
            the row and not the document, because kernels skip tiles that start at fixed columns.
    """
    allowed = query_segment == key_segment
    if mask.causal:
        allowed = allowed & (key_index <= query_index)
    if mask.block_length:
        is_no_later_block = key_index // mask.block_length <= query_index // mask.block_length
        allowed = allowed & is_no_later_block
    return allowed


def own_columns(array: Array, start: Array | int | None, length: int) -> Array:
    """Returns the columns start ... start + length - 1, the last dim of `array`; all where start is
    None.
    """
    if start is None:
        return array
    return jax.lax.dynamic_slice_in_dim(array, start, length, axis=-1)

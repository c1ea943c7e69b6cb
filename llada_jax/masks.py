"""What attention may see, as a value: segments, causality and block structure.

Objectives name a Mask, networks obey it, and every attention kernel derives its own form from it.
`may_attend` is the one definition that all of them are tested against.
"""

from typing import NamedTuple

from jax import Array


class Mask(NamedTuple):
    """Which positions of its own segment a query may attend to.

    causal: the query's own position and those before it, as in autoregressive models.
    block_length: the query's own block of that many positions and the blocks before it, as in block
        diffusion (BD3-LM, arXiv 2503.09573, section 3.1). 0 means that there are no blocks.

    Without either, a query sees its whole segment.
    """

    causal: bool = False
    block_length: int = 0


BIDIRECTIONAL = Mask()
CAUSAL = Mask(causal=True)


def may_attend(
    mask: Mask,
    *,
    query_segment: Array,
    key_segment: Array,
    query_index: Array,
    key_index: Array,
) -> Array:
    """Returns whether each query may attend to each key; the arguments broadcast together.

    Args:
        query_segment, key_segment: ids of the documents; segment 0 is padding. Padding attends to
            padding, so that no row of the softmax is empty; what it computes is never read.
        query_index, key_index: where in the row they stand, counted over the whole row. A mask with
            blocks counts them from the start of the row.
    """
    allowed = query_segment == key_segment
    if mask.causal:
        allowed &= key_index <= query_index
    if mask.block_length:
        allowed &= key_index // mask.block_length <= query_index // mask.block_length
    return allowed

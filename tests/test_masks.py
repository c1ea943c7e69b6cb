"""What attention may see, spelled out for small rows."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llada_jax.masks import BIDIRECTIONAL, CAUSAL, Mask, may_attend


def seen(mask: Mask, segments) -> list[str]:
    """Returns one line per query, with x for each key that it may attend to."""
    segments, index = np.array(segments), np.arange(len(segments))
    allowed = may_attend(
        mask,
        query_segment=segments[:, None],
        key_segment=segments[None, :],
        query_index=index[:, None],
        key_index=index[None, :],
    )
    return ["".join("x" if may else "." for may in row) for row in np.asarray(allowed)]


@pytest.mark.parametrize(
    ("mask", "segments", "lines"),
    [
        (BIDIRECTIONAL, [1, 1, 1], ["xxx", "xxx", "xxx"]),
        (BIDIRECTIONAL, [1, 1, 2, 0], ["xx..", "xx..", "..x.", "...x"]),
        (CAUSAL, [1, 1, 2, 2], ["x...", "xx..", "..x.", "..xx"]),
        (Mask(block_length=2), [1] * 5, ["xx...", "xx...", "xxxx.", "xxxx.", "xxxxx"]),
        # blocks tile the row and not the document, which starts in the middle of one here
        (Mask(block_length=2), [1, 2, 2, 2], ["x...", ".x..", ".xxx", ".xxx"]),
        (Mask(block_length=9), [1, 1, 1], ["xxx", "xxx", "xxx"]),
        (Mask(causal=True, block_length=2), [1, 1, 1], ["x..", "xx.", "xxx"]),
    ],
    ids=str,
)
def test_masks_spelled_out(mask, segments, lines):
    assert seen(mask, segments) == lines


@settings(max_examples=100, derandomize=True)
@given(
    segments=st.lists(st.integers(0, 3), min_size=1, max_size=12),
    mask=st.builds(Mask, causal=st.booleans(), block_length=st.integers(0, 5)),
)
def test_every_position_sees_itself_and_never_another_segment(segments, mask):
    for query, line in enumerate(seen(mask, segments)):
        assert line[query] == "x", "or the softmax of this position would be over nothing"
        assert all(segments[key] == segments[query] for key, may in enumerate(line) if may == "x")


def test_only_blocks_that_are_not_causal_count_as_blocks():
    assert Mask(block_length=4).has_blocks
    for mask in (BIDIRECTIONAL, CAUSAL, Mask(causal=True, block_length=4)):
        assert not mask.has_blocks

"""The comparison of an export with its checkpoint, with a stand-in for PyTorch."""

import jax
import numpy as np
import pytest
from support.exports import LLADA
from support.hf_directories import random_params

from llada_jax.errors import NumericsError
from llada_jax.hf import verify
from llada_jax.masks import BIDIRECTIONAL, CAUSAL, Mask
from llada_jax.models.model import make_model


def test_the_checkpoint_is_compared_with_the_mask_that_it_was_trained_with(monkeypatch):
    """The code of an export always attends in both directions."""
    params = jax.tree.map(jax.numpy.asarray, random_params(LLADA))
    tokens_BT = np.random.default_rng(0).integers(256, size=(2, 24), dtype=np.int32)
    positions_BT = np.broadcast_to(np.arange(24), tokens_BT.shape)
    with jax.default_matmul_precision("highest"):
        theirs_BTV = make_model(LLADA).logits_fn(
            params, tokens_BT, np.ones_like(tokens_BT), positions_BT
        )
    monkeypatch.setattr(verify, "torch_logits", lambda *_: np.asarray(theirs_BTV))

    def compared(mask: Mask) -> dict:
        return verify.compare_with_torch(
            "export", LLADA, params, tokens_BT, mask=mask, dtype="float32"
        )

    assert compared(BIDIRECTIONAL)["relative_difference"] < 1e-5
    for mask in (CAUSAL, Mask(block_length=8)):
        with pytest.raises(NumericsError, match="PyTorch's logits differ from ours"):
            compared(mask)

"""The comparison of an export with its checkpoint, with a stand-in for PyTorch."""

import types

import jax
import numpy as np
import pytest
from support.datasets import write_dataset
from support.exports import LLADA
from support.hf_directories import random_params

from llada_jax.data.tokenizer import load_tokenizer
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


def test_rounding_is_told_apart_from_another_network_and_its_cost_is_of_the_checkpoint():
    p, q = np.array([0.5, 0.5]), np.array([0.9, 0.1])
    found = verify.compare(np.log(p)[None, None], np.log(q)[None, None], np.log(q)[None, None])
    assert found["max_difference"] == found["relative_difference"] == 0
    assert found["kl_nats"] == pytest.approx((p * np.log(p / q)).sum())


@pytest.mark.parametrize("name", ["relative_difference", "kl_nats"])
def test_numbers_that_are_none_pass_no_check(name):
    found = {"max_difference": 0.0, "relative_difference": 0.0, "kl_nats": 0.0}
    verify.check(found, dtype="bfloat16")
    with pytest.raises(NumericsError, match="nothing was kept"):
        verify.check({**found, name: np.nan}, dtype="bfloat16")


def test_held_out_text_is_compared_where_there_is_enough_of_the_same_tokenizer(tmp_path):
    tokenizer = load_tokenizer("bytes")
    for num_tokens, expected in ((255, "random"), (256, "held-out")):
        directory = tmp_path / str(num_tokens)
        directory.mkdir()
        write_dataset(directory, {"heldout": np.full(num_tokens, 97, np.int32)})
        tokens_BT, origin = verify.tokens_to_compare(str(directory), tokenizer)
        assert origin == expected
        assert tokens_BT.shape == verify.COMPARED
    assert set(np.unique(tokens_BT)) == {97, tokenizer.mask_id}
    other = types.SimpleNamespace(**dict.fromkeys(("mask_id", "vocab_size"), 300), fingerprint="f")
    assert verify.tokens_to_compare(str(directory), other)[1] == "random"

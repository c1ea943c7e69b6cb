"""Agreement with the published PyTorch code on the fixture that it produced: logits, losses,
gradients.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llada_jax.cluster.sharding import one_device_mesh
from llada_jax.hf.convert import tensors
from llada_jax.hf.read import read_config, read_params
from llada_jax.models.model import abstract_parameters, make_model


@pytest.fixture(scope="module")
def oracle(published):
    _, _, architecture = read_config(published)
    model = make_model(architecture, nll_chunk=16)
    params = read_params(published, abstract_parameters(model, one_device_mesh()))
    expected = np.load(published / "expected.npz")
    facts = json.loads((published / "expected.json").read_text())
    return model, params, expected, facts


def positions_of(tokens):
    return jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)


def test_logits_equal_the_published_ones(oracle):
    model, params, expected, _ = oracle
    tokens = jnp.asarray(expected["input_ids"])
    logits = jax.jit(model.logits_fn)(params, tokens, None, positions_of(tokens))
    np.testing.assert_allclose(logits, expected["logits"], atol=2e-5, rtol=0)


def test_logits_of_padded_rows_equal_the_published_ones_at_real_positions(oracle):
    model, params, expected, _ = oracle
    tokens, is_real = jnp.asarray(expected["input_ids"]), expected["attention_mask"].astype(bool)
    logits = jax.jit(model.logits_fn)(
        params, tokens, jnp.asarray(is_real, jnp.int32), positions_of(tokens)
    )
    assert not is_real.all()
    np.testing.assert_allclose(
        logits[is_real], expected["logits_masked"][is_real], atol=2e-5, rtol=0
    )


def pretraining_loss(model, params, expected, mask_id):
    tokens, noisy = (
        jnp.asarray(expected["pretrain_tokens"]),
        jnp.asarray(expected["pretrain_noisy"]),
    )
    scores = model.nll_fn(params, noisy, tokens, noisy == mask_id, None, positions_of(tokens))
    return jnp.sum(scores.nll_BT / expected["pretrain_p_mask"][:, None]) / tokens.size


def test_pretraining_loss_equals_the_published_one(oracle):
    model, params, expected, facts = oracle
    loss = jax.jit(lambda p: pretraining_loss(model, p, expected, facts["mask_token_id"]))(params)
    np.testing.assert_allclose(loss, expected["pretrain_loss"], rtol=1e-5)


def test_sft_loss_equals_the_published_one(oracle):
    model, params, expected, facts = oracle
    tokens, noisy = jnp.asarray(expected["sft_tokens"]), jnp.asarray(expected["sft_noisy"])
    answer_length_B = tokens.shape[1] - expected["sft_prompt_lengths"]
    is_masked = noisy == facts["mask_token_id"]
    scores = jax.jit(model.nll_fn)(params, noisy, tokens, is_masked, None, positions_of(tokens))
    p_mask_BT = np.broadcast_to(expected["sft_p_mask"].reshape(len(tokens), -1), tokens.shape)
    loss = jnp.sum(scores.nll_BT / p_mask_BT / answer_length_B[:, None]) / tokens.shape[0]
    np.testing.assert_allclose(loss, expected["sft_loss"], rtol=1e-5)


def test_gradient_norm_of_every_published_tensor_equals_the_published_one(oracle, published):
    model, params, expected, facts = oracle
    grads = jax.jit(
        jax.grad(lambda p: pretraining_loss(model, p, expected, facts["mask_token_id"]))
    )(params)
    norms = {
        tensor.name: float(jnp.linalg.norm(tensor.of(grads).ravel()))
        for tensor in tensors("llada", read_config(published)[2])
    }
    assert norms.keys() == facts["pretrain_grad_norms"].keys()
    for name, norm in facts["pretrain_grad_norms"].items():
        np.testing.assert_allclose(norms[name], norm, rtol=1e-4, err_msg=name)

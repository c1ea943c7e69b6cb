"""Token ids that a loaded model is given: those without a row in the embedding are refused."""

import pytest
from support.exports import LLADA, write_checkpoint
from support.hf_directories import random_params

import llada_jax
from llada_jax.errors import UserError


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    run = tmp_path_factory.mktemp("ids") / "run"
    return llada_jax.load(write_checkpoint(run, LLADA, random_params(LLADA)))


@pytest.mark.parametrize("wrong", [-1, LLADA.vocab_size, 2**31])
def test_ids_without_a_row_in_the_embedding_are_refused(wrong, model):
    says = f"{wrong} is not a token id of this model, whose embedding has 320 rows"
    with pytest.raises(UserError, match=says):
        model.logits([[1, 2, wrong]])
    with pytest.raises(UserError, match=says):
        model.generate_tokens([[1, wrong]], gen_length=2)
    with pytest.raises(UserError, match=says):
        model.generate_tokens([[1, 2]], gen_length=2, eos_id=wrong)
    with pytest.raises(UserError, match=says):
        model.score([([1, 2], [3, wrong])])
    with pytest.raises(UserError, match=says):
        model.score([([wrong], [3])])


def test_the_first_and_the_last_row_are_ids(model):
    assert model.logits([[0, LLADA.vocab_size - 1]]).shape == (1, 2, LLADA.vocab_size)

"""Token ids that a loaded model is given: those without a row in the embedding are refused."""

import numpy as np
import pytest
from support.exports import LLADA, write_checkpoint
from support.hf_directories import random_params

import llada_jax
from llada_jax.config import default_config
from llada_jax.errors import UserError
from llada_jax.evaluation import tasks
from llada_jax.evaluation.answer_rows import Question


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


@pytest.mark.parametrize("rows", [[[1, 2], [3]], [1, 2], [], 3])
def test_what_is_not_rows_of_one_length_is_refused_by_name(rows, model):
    with pytest.raises(UserError, match="prompt_BT=.* must be rows of token ids, all of one"):
        model.generate_tokens(rows, gen_length=2)
    with pytest.raises(UserError, match="tokens_BT=.* must be rows of token ids, all of one"):
        model.logits(rows)


@pytest.mark.parametrize("rows", [[[]], [[], []], np.zeros((0, 3), int)])
def test_no_token_has_no_logits(rows, model):
    with pytest.raises(UserError, match="tokens_BT has no token; give at least one row"):
        model.logits(rows)


def test_ids_that_are_not_whole_numbers_are_refused(model):
    for ask in (
        lambda: model.generate_tokens([[1.7, 2]], gen_length=2),
        lambda: model.logits([[1.7, 2]]),
        lambda: model.score([([1], [1.7])]),
    ):
        with pytest.raises(UserError, match="1.7 is not a token id .* give whole numbers from 0"):
            ask()


def test_a_prompt_may_be_empty(model):
    assert model.generate_tokens([[], []], gen_length=2).shape == (2, 2)


def test_the_first_and_the_last_row_are_ids(model):
    assert model.logits([[0, LLADA.vocab_size - 1]]).shape == (1, 2, LLADA.vocab_size)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["masked_diffusion", "autoregressive"])
def test_rows_without_an_id_are_never_written_although_they_are_the_likeliest(
    objective, tmp_path, monkeypatch
):
    """The embedding has 320 rows and the tokenizer 260 ids."""
    params = random_params(LLADA)
    for row, sign in ((300, 1), (301, -1)):  # one of them is far above every id, whatever the state
        params["lm_head"][:, row] = sign * 100 * params["lm_head"][:, 7]
    config = default_config()
    config.objective.name = objective
    run = write_checkpoint(tmp_path / "run", LLADA, params, config=config.to_dict())
    model = llada_jax.load(run)
    num_ids = model.tokenizer.vocab_size
    assert np.all(np.argmax(model.logits([[1, 2, 3]]), axis=-1) >= num_ids)
    (completion,) = model.complete(["a"], gen_length=4)
    assert len(completion.tokens) == 4 or completion.tokens[-1:] == [model.tokenizer.eos_id]
    assert max(completion.tokens) < num_ids
    if objective == "masked_diffusion":
        assert np.max(model.generate_tokens([[1, 2]], gen_length=4)) < num_ids
        question = Question((97,), (98, 99))
        (tokens,) = tasks.written(model.model, model.params, [question], tokenizer=model.tokenizer)
        assert max(tokens) < num_ids
    said = []
    monkeypatch.setattr(tasks, "decode_after", lambda _, before, tokens: said.extend(tokens))
    settings = {"tokenizer": model.tokenizer, "mask": model.record.mask, "gen_length": 3}
    tasks.written_to_the_end(model.model, model.params, [Question((97,), (98,))], **settings)
    assert said
    assert max(said) < num_ids

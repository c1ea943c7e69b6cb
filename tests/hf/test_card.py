"""What the model card says about training and results."""

import pytest
from support.hf_directories import SMALL

from llada_jax.hf.card import Training, model_card

TRAINING = Training(
    step=7,
    tokens=1_234_567,
    batch_size=16,
    sequence_length=20,
    learning_rate=3e-4,
    schedule="wsd",
    optimizer="muon",
    scores_average=False,
    imported_from=None,
    init_from="runs/base",
    data=(("a" * 32, 0.25), ("b" * 32, 0.75)),
    versions={"jax": "0.10"},
    commit="c" * 40,
)
RESULT = {
    "name": "nelbo",
    "step": 7,
    "nats_per_token": 3.25,
    "nats_error": 0.125,
    "bits_per_byte": 4.5,
    "num_splits": 1,
}


def card(result: dict | None = None, **changes) -> str:
    known = {field: getattr(TRAINING, field) for field in TRAINING.__dataclass_fields__}
    return model_card(
        name="model",
        a=SMALL,
        layout="llada",
        dtype="bfloat16",
        weights="parameters",
        training=Training(**{**known, **changes}),
        result=result,
        hf_config={"mask_token_id": 256},
        special_tokens={"mask": "<mask>"},
    )


def test_the_training_is_described_from_data_to_versions():
    text = card()
    for line in (
        "1,234,567 tokens seen in 7 steps of 16 rows",
        "continued from `runs/base`",
        "data with fingerprint `aaaaaaaaaaaaaaaa`, 25.0% of the rows",
        "data with fingerprint `bbbbbbbbbbbbbbbb`, 75.0% of the rows",
        "muon, learning rate 0.0003, schedule wsd",
        "jax 0.10, commit cccccccccccc",
    ):
        assert f"- {line}\n" in text
    assert "imported" not in text
    assert "- weights imported from `theirs`\n" in card(imported_from="theirs")
    untrained = card(step=0, imported_from="theirs")
    assert "not trained here" in untrained
    assert "learning rate" not in untrained


def test_a_result_says_of_which_step_and_which_weights_it_is():
    numbers = "3.2500 +- 0.1250 nats per token, 4.5000 bits per byte"
    assert f"likelihood): {numbers}.\n" in card(RESULT)
    assert f"likelihood) at step 5: {numbers}.\n" in card({**RESULT, "step": 5})
    average = "measured with the moving average of the parameters"
    assert f"{numbers}, {average}.\n" in card(RESULT, scores_average=True)
    assert "NLL: 3.2500 nats per token.\n" in card(
        {**RESULT, "name": "nll", "nats_error": float("nan"), "bits_per_byte": float("nan")}
    )


@pytest.mark.parametrize(("row", "generated"), [(1, 1), (20, 10), (128, 64), (4096, 64)])
def test_the_snippets_generate_no_more_than_half_a_row(row, generated):
    text = card(sequence_length=row)
    assert f"gen_length={generated}, block_length={generated}, steps={generated})" in text
    assert f'model.generate(["Once upon a time"], gen_length={generated})' in text


def test_the_snippet_of_transformers_gives_the_model_no_special_tokens():
    """Llama's tokenizer begins a text with BOS, and that of BERT ends it with EOS."""
    text = card()
    assert 'tokenizer("Once upon a time", add_special_tokens=False, return_tensors="pt")\n' in text
    assert "generate_diffusion(prompt.input_ids, gen_length=" in text

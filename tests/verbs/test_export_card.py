"""The model card of an export: the training, the result, the licences."""

import pytest
import yaml
from support.exports import export

from llada_jax.__main__ import main
from llada_jax.hf.card import heldout_result


@pytest.mark.slow
def test_the_card_reports_what_the_run_was(random_checkpoint, tmp_path):
    (random_checkpoint / "metrics.jsonl").write_text(
        '{"step": 5, "heldout": {"nelbo": 3.5, "standard_error": 0.01, "bits_per_byte": 5.0}}\n'
        '{"step": 7, "final": {"nelbo": 3.25, "standard_error": 0.125, "bits_per_byte": 4.5}}\n'
        '{"step": 9, "heldout": {"nelbo": 1.0, "bits_per_byte": 1.0}}\n{"step": 1'
    )
    card = (export(random_checkpoint, tmp_path / "model") / "README.md").read_text()
    (random_checkpoint / "metrics.jsonl").unlink()
    assert "1,234,567 tokens seen in 7 steps" in card
    assert (
        "NELBO (an upper bound on the negative log-likelihood): 3.2500 +- 0.1250 nats per token, "
        "4.5000 bits" in card
    )
    assert 'AutoModelForCausalLM.from_pretrained("model", trust_remote_code=True)' in card
    assert 'llada_jax.load("model")' in card
    assert "| d_model | 32 |" in card
    assert "| mask | 256 | `<mask>` |" in card
    assert "layout `llada`, bfloat16" in card
    assert (
        "Not measured." in (export(random_checkpoint, tmp_path / "other") / "README.md").read_text()
    )


def front_matter(card: str) -> dict:
    """Returns the YAML head of a model card, which the Hub reads."""
    _, head, _ = card.split("---\n", 2)
    return yaml.safe_load(head)


@pytest.mark.slow
def test_the_card_names_the_licence_of_the_code_and_leaves_that_of_the_weights_to_the_user(
    random_checkpoint, tmp_path
):
    card = (export(random_checkpoint, tmp_path / "open") / "README.md").read_text()
    assert "license" not in front_matter(card)
    assert "No licence has been chosen for the weights" in card
    assert "[Apache-2.0](https://www.apache.org/licenses/LICENSE-2.0)" in card
    card = (
        export(random_checkpoint, tmp_path / "chosen", "--license", "cc-by-4.0") / "README.md"
    ).read_text()
    assert front_matter(card)["license"] == "cc-by-4.0"
    assert "The weights are licensed under `cc-by-4.0`" in card
    assert "[Apache-2.0](https://www.apache.org/licenses/LICENSE-2.0)" in card


@pytest.mark.parametrize("license_id", ["Apache 2", "MIT", "", "mit\ntags: x", "a: b"])
def test_a_licence_that_the_hub_cannot_know_is_refused(
    random_checkpoint, tmp_path, license_id, capsys
):
    words = [
        "--checkpoint",
        str(random_checkpoint),
        "--output",
        str(tmp_path / "out"),
        "--license",
        license_id,
    ]
    assert main(["export", *words]) == 2
    assert "must be an identifier of the Hub" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_result_on_the_card_is_the_last_one_up_to_the_step():
    lines = [
        {"step": 1, "train": {}},
        {"step": 2, "heldout": {"nelbo": 2.0}},
        {"step": 4, "final": {"nll": 1.0}},
    ]
    assert heldout_result(lines, 1) is None
    assert heldout_result(lines, 3)["nats"] == 2.0
    assert heldout_result(lines, 4)["name"] == "nll"

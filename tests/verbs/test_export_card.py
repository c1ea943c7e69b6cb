"""The model card of an export: the training, the result, the licences."""

import pytest
import yaml
from support.exports import export

from llada_jax.__main__ import main
from llada_jax.checkpoints.export import training_of
from llada_jax.checkpoints.workdir import find_checkpoint


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


@pytest.mark.slow
def test_the_card_has_the_mean_over_the_splits_of_a_mixture(random_checkpoint, tmp_path):
    (random_checkpoint / "metrics.jsonl").write_text(
        '{"step": 7, "final_0_data_a": {"nelbo": 3.0, "standard_error": 0.03, "bits_per_byte": 4.5}'
        ', "final_1_data_b": {"nelbo": 2.0, "standard_error": 0.04, "bits_per_byte": 3.5}}\n'
    )
    card = (export(random_checkpoint, tmp_path / "model") / "README.md").read_text()
    (random_checkpoint / "metrics.jsonl").unlink()
    assert "2.5000 +- 0.0250 nats per token, 4.0000 bits per byte, the mean of 2 held-out" in card


@pytest.mark.parametrize(
    ("weights", "decay", "is_average"),
    [("auto", 0.5, True), ("raw", 0.5, False), ("auto", 0, False)],
)
def test_the_card_says_which_weights_were_scored(weights, decay, is_average, random_checkpoint):
    found, step = find_checkpoint(str(random_checkpoint))
    record = found.record(step)
    record.config["evaluation"]["weights"] = weights
    record.config["optimizer"]["ema_decay"] = decay
    assert training_of(record, step).scores_average == is_average
    # a knob that the first versions did not have
    del record.config["evaluation"]["weights"]
    assert training_of(record, step).scores_average == (decay > 0)


@pytest.mark.parametrize(("schedule", "peak"), [("llada", 3e-3), ("wsd", 5e-4)])
def test_the_card_has_the_peak_of_the_schedule(schedule, peak, random_checkpoint):
    found, step = find_checkpoint(str(random_checkpoint))
    record = found.record(step)
    stages = [[1e9, 2e-3, 3e-3], [2e9, 1e-3, 1e-5]]
    record.config["schedule"] |= {"name": schedule, "learning_rate": 5e-4, "stages": stages}
    assert training_of(record, step).learning_rate == peak

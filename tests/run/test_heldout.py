"""The held-out bounds of a mixture: each source by its own text."""

import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
from support.datasets import SEQUENCE_LENGTH, write_dataset

from llada_jax.cluster.sharding import batch_sharding, one_device_mesh
from llada_jax.data.loader import SourceSummary
from llada_jax.data.records import read_dataset
from llada_jax.models.transformer import TokenScores
from llada_jax.objectives.masked_diffusion import masked_diffusion
from llada_jax.run.heldout import (
    AskedToStop,
    HeldoutEvaluations,
    Unfinished,
    evaluate_heldout,
)
from llada_jax.run.start import RunData

# of each source: the one token that it holds, its bytes per token in training and held out
SOURCES = {"letters": (97, 1.5, 2.0), "digits": (49, 4.0, 5.0)}


def summaries_of(directory, shares) -> list[SourceSummary]:
    summaries = []
    for (name, (token, train, heldout)), share in zip(SOURCES.items(), shares):
        (directory / name).mkdir()
        write_dataset(directory / name, {"heldout": np.full(20 * SEQUENCE_LENGTH, token, np.int32)})
        known = {
            "info": read_dataset(directory / name),
            "share": share,
            "bytes_per_token": {"train": train, "heldout": heldout},
        }
        others = dict.fromkeys({f.name for f in dataclasses.fields(SourceSummary)} - set(known))
        summaries.append(SourceSummary(**known, **others))
    return summaries


def surprise_is_the_token(params, noisy_BT, targets_BT, where_BT, segment_ids_BT, positions_BT):
    return TokenScores(np.float32(0.01) * targets_BT * where_BT, where_BT)


def test_each_source_of_a_mixture_has_a_bound_in_bits_per_byte_of_its_own_text(tmp_path):
    found = evaluate_heldout(
        SimpleNamespace(nll_fn=surprise_is_the_token),
        {},
        summaries_of(tmp_path, (0.5, 0.5)),
        objective=masked_diffusion(mask_id=256),
        num_batches=0,
        batch_size=8,
        sequence_length=SEQUENCE_LENGTH,
        batch_sharding=batch_sharding(one_device_mesh()),
        attend_across_documents=True,
    )
    assert list(found) == ["heldout_0_letters", "heldout_1_digits"]
    for bound, (token, _, bytes_per_token) in zip(found.values(), SOURCES.values()):
        assert bound["nelbo"] == pytest.approx(0.01 * token, rel=1e-5)
        expected = 0.01 * token / math.log(2) / bytes_per_token
        assert bound["bits_per_byte"] == pytest.approx(expected, rel=1e-5)


def test_training_text_has_the_bytes_per_token_of_what_the_loss_counts():
    """Per row, the first source has 6 tokens of answers with 12 bytes in 20 tokens with 80 bytes;
    the second has 30 with 150 in 40 with 160.
    """

    def summary(share, *counts):
        names = ("num_scored_tokens", "num_scored_bytes", "num_tokens", "num_bytes")
        split = SimpleNamespace(**{name: 5 * count for name, count in zip(names, counts)})
        info = SimpleNamespace(splits={"train": split})
        return SimpleNamespace(share=share, num_records=5, info=info)

    mixture = (summary(0.25, 6, 12, 20, 80), summary(0.75, 30, 150, 40, 160))
    data = RunData(sources=(), summaries=mixture, tokenizer=None)
    answers = (0.25 * 12 + 0.75 * 150) / (0.25 * 6 + 0.75 * 30)
    assert data.bytes_per_token("answers", 0) == pytest.approx(answers)
    assert data.bytes_per_token("documents", 0) == pytest.approx(4.0)
    assert data.bytes_per_token("answers", 2) is None


def test_sums_are_continued_only_for_the_weights_and_settings_that_they_are_of(tmp_path):
    scored, settings = {"heldout": [[0.1 + 0.2, 3.0]]}, {"weights": "ema", "batch_size": 8}
    Unfinished(tmp_path, settings).write(40, 5, scored)
    assert Unfinished(tmp_path, dict(settings)).read(40, 5) == scored
    assert Unfinished(tmp_path, settings).read(41, 5) is None
    assert Unfinished(tmp_path, settings).read(40, 6) is None
    assert Unfinished(tmp_path, {**settings, "weights": "raw"}).read(40, 5) is None
    assert Unfinished(tmp_path, {**settings, "batch_size": 16}).read(40, 5) is None
    Unfinished(tmp_path, settings).clear()
    assert Unfinished(tmp_path, settings).read(40, 5) is None


def surprise_is_the_parameter(params, noisy_BT, targets_BT, where_BT, segment_ids_BT, positions_BT):
    return TokenScores(params["nats"] * where_BT, where_BT)


def test_a_stopped_evaluation_is_continued_for_the_same_data_and_weights_alone(tmp_path):
    summaries = summaries_of(tmp_path, (0.5, 0.5))
    recipe = SimpleNamespace(
        model=SimpleNamespace(nll_fn=surprise_is_the_parameter),
        objective=masked_diffusion(mask_id=256),
        batch_sharding=batch_sharding(one_device_mesh()),
    )

    def bound(nats: float, *, sources=summaries[:1], weights: str = "ema", stop_at: int = 0):
        beats = []
        evaluations = HeldoutEvaluations(
            tmp_path,
            recipe,
            RunData(sources=(), summaries=sources, tokenizer=None),
            start_step=40,
            batch_size=4,
            sequence_length=SEQUENCE_LENGTH,
            attend_across_documents=True,
            weights=weights,
            beat=beats.append,
            is_asked_to_stop=lambda: len(beats) == stop_at,
            timeout_s=0,
        )
        return evaluations.evaluate(40, {"nats": np.float32(nats)}, {}, 0)["heldout"]["nelbo"]

    # asked before the fourth of five batches
    with pytest.raises(AskedToStop):
        bound(1.0, stop_at=4)
    assert bound(0.0) == pytest.approx(3 / 5)
    assert bound(0.0, weights="raw") == 0
    assert bound(0.0, sources=summaries[1:]) == 0


def test_a_run_that_starts_from_another_step_forgets_the_sums(tmp_path):
    unfinished = Unfinished(tmp_path, {})
    unfinished.write(40, 5, {"heldout": [[0.5, 3.0]]})
    unfinished.clear_others(40)
    assert unfinished.is_of(40)
    assert not unfinished.is_of(30)
    unfinished.clear_others(30)
    assert not unfinished.is_of(40)

"""Which runs may continue a checkpoint: what must be the same, and what may change."""

import dataclasses

import pytest
from support.errors import error_of
from support.records import SMALL, small_record

from llada_jax.checkpoints.continuation import (
    changed_knobs,
    check_continues,
    check_fits,
    check_same,
)
from llada_jax.checkpoints.record import DataSource, RunRecord


def test_a_checkpoint_fits_only_its_own_architecture():
    scaled = dataclasses.replace(SMALL, rope_scaling=(8.0, 1.0, 4.0, 40.0))
    ours = small_record(architecture=scaled)
    check_fits(ours, ours, "new")
    message = error_of(check_fits, small_record(), ours, "old")
    assert "rope_scaling is (8.0, 1.0, 4.0, 40.0) here and () there" in message
    biased = small_record(architecture=dataclasses.replace(SMALL, attention_bias="qkv"))
    message = error_of(check_fits, small_record(), biased, "old")
    assert "attention_bias is 'qkv' here and 'none' there" in message


def test_a_checkpoint_older_than_a_key_of_the_architecture_fits_its_default():
    content = small_record().to_json()
    for name in ("attention_bias", "output_shift", "rope_scaling"):
        del content["architecture"][name]
    check_fits(RunRecord.from_json(content, file="old"), small_record(), "old")


def test_a_checkpoint_fits_only_its_own_tokenizer():
    ours = small_record()
    other = dataclasses.replace(ours.tokenizer, fingerprint="f" * 64)
    message = error_of(check_fits, small_record(tokenizer=other), ours, "runs/a")
    assert "The checkpoint in runs/a was trained with another tokenizer: fingerprint is" in message
    assert "and ffffffffffff there" in message
    assert "f" * 13 not in message


def changed(knob: str, value) -> RunRecord:
    record = small_record()
    *groups, name = knob.split(".")
    group = record.config
    for key in groups:
        group = group[key]
    group[name] = value
    return record


@pytest.mark.parametrize(
    ("knob", "value", "says"),
    [
        ("seed", 7, "config.seed is 7 here and 0 there"),
        ("data.batch_size", 3, "config.data.batch_size is 3 here"),
        ("objective.name", "autoregressive", "config.objective.name is 'autoregressive' here"),
        (
            "optimizer.first_moment_dtype",
            "bfloat16",
            "config.optimizer.first_moment_dtype is 'bfloat16' here and 'float32' there",
        ),
        ("optimizer.name", "muon", "config.optimizer.name is 'muon' here and 'adamw' there"),
        ("data.random_length_probability", 0.5, "config.data.random_length_probability is 0.5"),
        ("data.attend_across_documents", False, "config.data.attend_across_documents is False"),
        ("lora.rank", 4, "config.lora is Lora("),
        ("objective.complementary", True, "config.objective.complementary is True here and False"),
        ("optimizer.ema_decay", 0.5, "keeps an EMA is True here and False there"),
    ],
)
def test_a_run_is_not_continued_with_another_order_noise_or_state(knob, value, says):
    message = error_of(check_continues, small_record(), changed(knob, value), "runs/a")
    assert "The run in runs/a cannot be continued with another config" in message
    assert says in message
    assert "config.checkpoint.init_from" in message


@pytest.mark.parametrize(
    ("knob", "value"),
    [("schedule.learning_rate", 1.0), ("num_steps", 7), ("lora.alpha", 7.0)],
)
def test_a_run_is_continued_with_other_knobs_that_change_no_state(knob, value):
    check_continues(small_record(), changed(knob, value), "runs/a")


def test_what_only_one_of_two_has_differs():
    for pair in (({}, {"key": 1}), ({"key": 1}, {})):
        assert "key is" in error_of(check_same, "They", *pair, remedy="change it")


def test_a_knob_that_one_version_does_not_know_has_not_changed():
    both = {"group": {"kept": 2, "changed": [1]}}
    known = {"group": {"kept": 2, "changed": (3,), "of another version": 4}, "too": 5}
    expected = "config.group.changed changed from {} to {}"
    assert changed_knobs(both, known) == [expected.format((3,), [1])]
    assert changed_knobs(known, both) == [expected.format([1], (3,))]


def test_a_run_older_than_the_dtype_of_the_first_moment_is_continued_in_float32():
    content = small_record().to_json()
    del content["config"]["optimizer"]["first_moment_dtype"]
    content["config"]["objective"].pop("complementary", None)
    old = RunRecord.from_json(content, file="old")
    check_continues(old, small_record(), "runs/a")
    narrow = changed("optimizer.first_moment_dtype", "bfloat16")
    assert "'float32' there" in error_of(check_continues, old, narrow, "runs/a")


def test_data_may_be_moved_but_not_changed():
    there = small_record(data=(DataSource("old/place", "a" * 32, 1.0),))
    check_continues(there, small_record(data=(DataSource("new/place", "a" * 32, 1.0),)), "runs/a")
    other = small_record(data=(DataSource("old/place", "b" * 32, 1.0),))
    message = error_of(check_continues, there, other, "runs/a")
    assert "trained on other data: old/place (fingerprint aaaaaaaaaaaa) there" in message
    assert "and old/place (fingerprint bbbbbbbbbbbb) here" in message
    mixed = small_record(
        data=(DataSource("a", "a" * 64, 0.25), DataSource("b", "b" * 64, 0.75)),
    )
    others = [DataSource("a", "a" * 64, 0.75), DataSource("b", "b" * 64, 0.25)]
    for data in (mixed.data[::-1], tuple(others)):
        message = error_of(check_continues, mixed, small_record(data=data), "runs/a")
        assert "trained on other data" in message
    message = error_of(check_continues, there, mixed, "runs/a")
    assert "a (0.25 of the rows, fingerprint aaaaaaaaaaaa), b (0.75 of the rows, " in message

"""run.json as a typed record: what older and newer versions write is read, and what is wrong with a
file is named.
"""

import dataclasses
import json
import math
import os

import pytest
from support.paths import ROOT
from support.records import small_record

from llada_jax.checkpoints.record import SEAL, RunRecord, read_run, run_record, sealed, write_run
from llada_jax.config import default_config
from llada_jax.data.tokenizer import load_tokenizer
from llada_jax.errors import UserError
from llada_jax.masks import BIDIRECTIONAL, CAUSAL, Mask
from llada_jax.models.transformer import Architecture

# Written by version 0.1.0, before the record was typed: run.json of a trained and of an imported
# workdir, and the metadata of a checkpoint.
OLD = ROOT / "tests" / "fixtures" / "records_0.1.0"
OLD_FILES = sorted(file.name for file in OLD.glob("*.json"))


def parsed(content) -> RunRecord:
    return RunRecord.from_json(content, file="run.json")


def old(name: str) -> dict:
    return json.loads((OLD / name).read_text())


@pytest.mark.parametrize("name", OLD_FILES)
def test_a_file_of_version_0_1_0_is_read_and_written_again_byte_for_byte(name):
    text = (OLD / name).read_text()
    assert json.dumps(parsed(json.loads(text)).to_json(), indent=1) + "\n" == text


def test_the_fields_of_a_trained_run_of_version_0_1_0():
    record = parsed(old("checkpoint.json"))
    assert record.architecture.d_model == 64
    assert record.tokenizer.kind == "bytes"
    assert [source.share for source in record.data] == [1.0]
    assert (record.step, record.tokens) == (4, 4 * 8 * 32)
    assert (record.num_rollbacks, record.keeps_ema, record.mask) == (0, True, BIDIRECTIONAL)
    assert record.checksums.keys() == {"params", "ema", "train"}
    assert record.knob("optimizer.ema_decay") == 0.5
    assert parsed(old("trained_run.json")).step is None


def test_the_fields_of_an_imported_workdir_of_version_0_1_0():
    record = parsed(old("imported_run.json"))
    assert record.special_ids["mask"] == 256
    assert record.source["layout"] == "llada"
    assert record.data == ()
    assert record.chat_template is None
    # older versions look the template up, so that null stays null
    assert "chat_template" in record.to_json()


def test_a_run_that_starts_now_writes_the_keys_that_older_versions_read():
    a = Architecture(**old("trained_run.json")["architecture"])
    source = {"directory": "data", "fingerprint": "f" * 32, "share": 1.0}
    record = run_record(default_config(), a, load_tokenizer("bytes"), data=[source])
    record = dataclasses.replace(record, rollbacks={"count": 0, "skipped": []})
    content = record.to_json()
    assert list(content) == list(old("trained_run.json"))
    for key in ("architecture", "tokenizer", "versions"):
        assert content[key].keys() == old("trained_run.json")[key].keys()
    assert content["config"]["model"]["rope_scaling"] == []  # as JSON has it, not a tuple
    at_step = record.at(4, 1024)
    assert list(at_step.to_json()) + ["checksums"] == list(old("checkpoint.json"))


def test_a_sealed_record_is_read_in_any_order_of_its_keys_and_not_with_another_value():
    record = small_record(step=4, chat_template="{{ é }}", unknown={"adapters": {"rank": 8}})
    content = sealed(record)
    found = parsed(json.loads(json.dumps(dict(reversed(content.items())))))
    assert found == record
    # a record of another step has a checksum of its own, and does not carry the old checksum on
    assert SEAL not in found.at(5, 1280).to_json()
    content["architecture"]["rope_theta"] = 100000.0
    with pytest.raises(UserError, match="^run.json does not match its saved checksum; "):
        parsed(content)


def test_checksums_of_a_scheme_that_this_version_does_not_know_are_refused():
    with pytest.raises(UserError, match="has checksum_scheme=9, which .* a newer version"):
        parsed({**old("checkpoint.json"), "checksum_scheme": 9})


def test_what_a_newer_version_has_added_is_kept():
    content = {**old("checkpoint.json"), "adapters": {"rank": 8}}
    record = parsed(content)
    assert record.unknown == {"adapters": {"rank": 8}}
    assert record.at(5, 1280).to_json()["adapters"] == {"rank": 8}


def test_what_an_older_version_did_not_write_has_its_default():
    content = old("checkpoint.json")
    newer = ("attention_bias", "output_shift", "rope_scaling")
    content["architecture"] = {
        name: value for name, value in content["architecture"].items() if name not in newer
    }
    for key in ("rollbacks", "commit", "started", "versions"):
        del content[key]
    record = parsed(content)
    assert record.architecture == parsed(old("checkpoint.json")).architecture
    assert (record.num_rollbacks, record.commit, record.versions) == (0, "", {})


@pytest.mark.parametrize(
    ("recorded", "objective", "mask"),
    [
        (None, "masked_diffusion", BIDIRECTIONAL),
        (None, "autoregressive", CAUSAL),
        ({"causal": False, "block_length": 4}, "own.parts:objective", Mask(block_length=4)),
        ({"causal": True}, "own.parts:objective", CAUSAL),
    ],
)
def test_the_mask_is_the_recorded_one_and_before_masks_were_recorded_that_of_the_objective(
    recorded, objective, mask
):
    content = old("checkpoint.json")
    content["config"]["objective"]["name"] = objective
    if recorded is not None:
        content["mask"] = recorded
    assert parsed(content).mask == mask


def without(path: str):
    def change(content):
        *parents, last = path.split(".")
        for key in parents:
            content = content[key]
        del content[last]

    return change


def with_value(path: str, value):
    def change(content):
        *parents, last = path.split(".")
        for key in parents:
            content = content[key]
        content[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (without("config"), "run.json has no field 'config'"),
        (without("config.objective"), "run.json has no field 'config.objective.name'"),
        (without("config.optimizer.ema_decay"), "no field 'config.optimizer.ema_decay'"),
        (without("architecture"), "has no field 'architecture'"),
        (without("architecture.d_ff"), "has an architecture that has no field 'd_ff'"),
        (without("tokenizer.fingerprint"), "has no field 'tokenizer.fingerprint'"),
        (without("data"), "has no field 'data'"),
        (
            with_value("data", [{"directory": "d"}]),
            r"\(data\[0\]\) that has no field 'fingerprint'",
        ),
        (with_value("config", []), r"has config=\[\], which must be an object"),
        (with_value("step", "four"), 'has step="four", which must be a whole number'),
        (with_value("step", True), "has step=true, which must be a whole number"),
        (with_value("architecture.d_model", "wide"), "d_model='wide', which must be a whole"),
        (with_value("architecture.rope_theta", "x"), "rope_theta='x', which must be a number"),
        (with_value("architecture.rope_theta", 0), "rope_theta=0, which must be greater than 0"),
        (with_value("architecture.rope_theta", math.inf), "rope_theta=inf, which must be a finite"),
        (with_value("architecture.norm_eps", None), "norm_eps=None, which must be a number"),
        (with_value("architecture.norm_eps", 1.5), "norm_eps=1.5, which must be less than or"),
        (with_value("architecture.num_heads", -1), "num_heads=-1, which must be greater than or"),
        (with_value("architecture.num_layers", True), "num_layers=True, which must be a whole"),
        (with_value("architecture.d_ff", 2**30), "d_ff=1073741824, which must be less than or"),
        (with_value("architecture.qk_norm", "some"), "qk_norm='some', which must be 'none', 'full"),
        (with_value("architecture.tie_embeddings", 1), "tie_embeddings=1, which must be true or"),
        (with_value("mask", {"causal": "no"}), "mask that has causal='no', which must be true or"),
        (with_value("mask", {"block_length": -4}), "mask that has block_length=-4, which must be"),
        (with_value("config.lora", {"rank": "8"}), "config.lora that has rank='8', which must be"),
        (
            with_value("architecture.num_experts", 8),
            "has architecture.num_experts, which llada_jax",
        ),
        (with_value("architecture.rope_scaling", [1]), "an architecture that is not possible"),
        (with_value("mask", {"window": 8}), "has mask.window, which llada_jax .* does not know"),
        (with_value("rollbacks", {"count": 1}), "has no field 'rollbacks.skipped'"),
    ],
)
def test_a_missing_or_wrong_field_is_named_with_its_file_and_a_remedy(change, says):
    content = old("checkpoint.json")
    change(content)
    with pytest.raises(UserError, match=f"^run.json .*{says.removeprefix('run.json ')}") as caught:
        parsed(content)
    assert "use another checkpoint" in str(caught.value)


def test_something_else_than_an_object_is_refused():
    with pytest.raises(UserError, match="run.json holds a list where an object is expected"):
        parsed([])


def test_a_knob_that_the_writing_version_did_not_have_is_named():
    with pytest.raises(UserError, match=r"llada_jax 0\.1\.0 wrote has no field 'data\.shuffle'"):
        parsed(old("trained_run.json")).knob("data.shuffle")


def test_a_workdir_is_written_with_tokenizer_config_and_record_and_read_back(tmp_path):
    record, tokenizer = small_record(), load_tokenizer("bytes")
    write_run(str(tmp_path), tokenizer, record, config_text="# why\n")
    assert sorted(os.listdir(tmp_path)) == ["config.py", "run.json", "tokenizer"]
    assert read_run(tmp_path) == record
    assert load_tokenizer(tmp_path / "tokenizer").fingerprint == tokenizer.fingerprint
    assert (tmp_path / "config.py").read_text() == "# why\n"
    # a later start rewrites the record and leaves the tokenizer alone
    changed = dataclasses.replace(record, commit="c" * 40)
    (tmp_path / "tokenizer" / "note").write_text("keep me")
    write_run(str(tmp_path), tokenizer, changed)
    assert read_run(tmp_path) == changed
    assert (tmp_path / "tokenizer" / "note").read_text() == "keep me"


def test_a_workdir_without_a_record_or_with_a_torn_one_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"has no run\.json; give the workdir of a run"):
        read_run(tmp_path)
    for torn in ('{"config": ', "[" * 100_000 + "]" * 100_000):
        (tmp_path / "run.json").write_text(torn)
        with pytest.raises(UserError, match=r"run\.json is not valid JSON"):
            read_run(tmp_path)


def test_a_run_json_that_cannot_be_read_is_not_called_damaged(tmp_path):
    (tmp_path / "run.json").mkdir()
    with pytest.raises(UserError, match=r"run.json cannot be read \(Is a directory\)") as caught:
        read_run(tmp_path)
    assert "remove it" not in str(caught.value)

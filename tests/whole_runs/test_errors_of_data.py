"""Datasets that are missing, damaged or foreign, and text that cannot be prepared: all refused."""

import json
import shutil
from pathlib import Path

import pytest
from support.mishaps import copy, flip, prepare_argv, train_argv, truncate


def no_directory(data: Path):
    shutil.rmtree(data)


def other_json(data: Path):
    shutil.rmtree(data)
    data.mkdir()
    (data / "config.json").write_text('{"model_type": "llama"}')


def foreign_dataset(data: Path):
    (data / "dataset.json").write_text('{"name": "wikitext", "splits": ["train"]}')


def foreign_list(data: Path):
    (data / "dataset.json").write_text('[{"text": "Once upon a time"}]')


def foreign_format(data: Path):
    content = json.loads((data / "dataset.json").read_text())
    (data / "dataset.json").write_text(json.dumps({**content, "format": 7}))


def half_a_manifest(data: Path):
    truncate(data / "dataset.json")


def no_shard(data: Path):
    (data / "train-00000.records").unlink()


def truncated_shard(data: Path):
    truncate(data / "train-00000.records")


def no_tokenizer(data: Path):
    shutil.rmtree(data / "tokenizer")


def damaged_tokenizer(data: Path):
    truncate(data / "tokenizer" / "special_ids.json")


def other_special_ids(data: Path):
    """The tokenizer of another data set, of the same size, instead of this one's."""
    path = data / "tokenizer" / "special_ids.json"
    path.write_text(
        path.read_text().replace('"mask": 256', '"mask": 259').replace('"pad": 259', '"pad": 256')
    )


DATASETS = {
    no_directory: ["data", "holds no dataset.json", "prepare"],
    other_json: ["holds no dataset.json", "prepare"],
    foreign_dataset: ["dataset.json", "not written by llada-jax prepare"],
    foreign_list: ["dataset.json", "not written by llada-jax prepare"],
    foreign_format: ["format 7", "reads the formats 1 to 4", "prepare the text again"],
    half_a_manifest: ["dataset.json", "not valid JSON", "prepare again"],
    no_shard: ["train-00000.records", "is missing", "run prepare again"],
    truncated_shard: [
        "train-00000.records",
        "bytes instead of",
        "delete the shard and run prepare again",
    ],
    no_tokenizer: ["no tokenizer at", "tokenizer"],
    damaged_tokenizer: ["tokenizer", "is damaged", "prepare the data again"],
    other_special_ids: ["data/tokenizer", "not the tokenizer of the records", "put that one back"],
}


@pytest.mark.parametrize("damage", DATASETS, ids=lambda damage: damage.__name__)
def test_a_missing_foreign_or_damaged_dataset_is_refused(damage, home, tmp_path, refused):
    data = copy(home / "data", tmp_path / "data")
    damage(data)
    argv = train_argv(home, tmp_path / "run", f"data.path={data}")
    refused(argv, says=DATASETS[damage], keeps=[tmp_path], creates=tmp_path / "run")


def test_datasets_that_do_not_fit_the_config_are_refused(home, tmp_path, refused):
    cases = {
        "data.path=": ["config.data.path=", "names no directory", "--config.data.path=DIR"],
        f"data.path={home / 'data'}=much": ["'much' is not a weight", "dir_a=0.7,dir_b=0.3"],
        f"data.path={home / 'data'}=-1": ["weight -1.0", "from 1e-100"],
        f"data.path={home / 'data'}=0.5,{home / 'spm'}=0.5": [
            "different tokenizers",
            "prepare both",
        ],
        "data.sequence_length=32": [
            "sequence_length 16",
            "32 is asked for",
            "--sequence-length 32",
        ],
    }
    for override, says in cases.items():
        argv = train_argv(home, tmp_path / "run", override)
        refused(argv, says=says, creates=tmp_path / "run", keeps=[home / "data", home / "spm"])


@pytest.mark.slow
def test_a_corrupted_record_stops_training_and_keeps_the_run(home, tmp_path, refused):
    data, run = copy(home / "data", tmp_path / "data"), copy(home / "run", tmp_path / "run")
    flip(data / "train-00000.records", every=64)
    argv = train_argv(home, run, f"data.path={data}", "num_steps=8")
    says = ["Record ", "train-00000.records", "is damaged", "run prepare again"]
    refused(argv, says=says, keeps=[data, run / "checkpoints"], is_late=True)


def test_a_corrupted_held_out_record_stops_the_evaluation_and_keeps_the_run(
    home, tmp_path, refused
):
    data, run = copy(home / "data", tmp_path / "data"), copy(home / "run", tmp_path / "run")
    flip(data / "heldout-00000.records", every=64)
    # without its last evaluation, which is then due again
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(line for line in lines if '"final' not in line))
    argv = train_argv(home, run, f"data.path={data}")
    says = ["Record ", "heldout-00000.records", "is damaged"]
    refused(argv, says=says, keeps=[data, run / "checkpoints"], is_late=True)


@pytest.mark.slow
def test_evaluating_on_records_that_do_not_fit_is_refused(home, tmp_path, refused):
    cases = {
        str(home / "spm"): ["spm", "another tokenizer", "--tokenizer"],
        str(home / "absent"): ["holds no dataset.json", "prepare"],
    }
    for data, says in cases.items():
        argv = ["evaluate", "--checkpoint", home / "run", "--data", data]
        refused(argv, says=says, keeps=[home / "run", home / "spm"])
    argv = [
        "evaluate",
        "--checkpoint",
        home / "run",
        "--data",
        home / "data",
        "--split",
        "held-out",
    ]
    refused(argv, says=["'held-out'", "Did you mean 'heldout'?"])


# ---- prepare


CORPORA = {
    "nothing at all": (None, ["matches no file", "--input"]),
    "an empty file": (b"", ["hold no text", "give files with text"]),
    "white space": (b" \n\t\n  \n", ["hold no text", "give files with text"]),
    "not UTF-8": (b"caf\xe9 noir\n" * 3, ["not valid UTF-8", "byte 3", "line 1", "iconv"]),
    "UTF-8 cut short": (
        "one line\ntwo caf\u00e9".encode()[:-1],
        ["not valid UTF-8", "line 2", "iconv"],
    ),
    "UTF-16": ("Once upon a time".encode("utf-16"), ["not valid UTF-8", "byte 0", "iconv"]),
}


@pytest.mark.parametrize("case", CORPORA)
def test_a_corpus_without_text_or_of_another_encoding_is_refused(case, tmp_path, refused):
    content, says = CORPORA[case]
    corpus = tmp_path / "corpus.txt"
    if content is not None:
        corpus.write_bytes(content)
    refused(prepare_argv(corpus, tmp_path / "data"), says=says, is_late=True)
    assert not (tmp_path / "data" / "dataset.json").exists()


def test_an_unusable_jsonl_or_gzip_is_refused(tmp_path, refused):
    cases = {
        "bad.jsonl": (
            b'{"text": "fine"}\n{"text": \n',
            ["bad.jsonl:2", "not valid JSON", "fix or remove"],
        ),
        "field.jsonl": (
            b'{"body": "fine"}\n',
            ["field.jsonl:1", "no field 'text'", "body", "--text-field"],
        ),
        "cut.txt.gz": (b"\x1f\x8b\x08\x00", ["cut.txt.gz", "truncated", "again"]),
        "text.csv": (b"a,b\n", ["text.csv", "unknown format", ".jsonl"]),
    }
    for name, (content, says) in cases.items():
        (tmp_path / name).write_bytes(content)
        refused(prepare_argv(tmp_path / name, tmp_path / "data" / name), says=says, is_late=True)


def test_preparing_into_a_directory_of_something_else_keeps_it(home, tmp_path, refused):
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "train-00000.records").write_text("not ours")
    refused(
        prepare_argv(home / "text.txt", photos),
        says=["not empty", "give a new directory"],
        keeps=[photos],
    )


def test_preparing_over_a_finished_dataset_with_other_settings_keeps_it(home, refused):
    argv = [
        word if word != "16" else "32" for word in prepare_argv(home / "text.txt", home / "data")
    ]
    argv += ["--documents", "line", "--heldout", "0.1"]
    says = ["--sequence-length 16", "has --sequence-length 32", "new --output"]
    refused(argv, says=says, keeps=[home / "data"])

"""Parts that were prepared apart are one data set once they are joined, and before that, or where
they do not fit, the sentence says which.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from support.corpora import T, documents_of, stream, tree, write_corpus
from support.errors import error_of

from llada_jax.__main__ import main
from llada_jax.data.dialogue_units import ChatSettings
from llada_jax.data.loader import heldout_batches, train_batches
from llada_jax.data.parts import join_parts, parse_part
from llada_jax.data.preparation import prepare
from llada_jax.data.records import Records, read_dataset
from llada_jax.storage import files

ARGS = {"sequence_length": T, "tokenizer": "bytes", "heldout": 0.2}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """Three parts, of two files each, and under "alone" their inputs prepared one by one."""
    folder = tmp_path_factory.mktemp("parts")
    write_corpus(folder / "corpus", num_files=6, num_documents=30)
    for number in range(3):
        inputs = [str(folder / f"corpus/part-{i:03d}.jsonl") for i in (2 * number, 2 * number + 1)]
        prepare(inputs, folder / "set", part=(number, 3), **ARGS)
        prepare(inputs, folder / f"alone{number}", **ARGS)
    return folder


@pytest.fixture
def parts(prepared, tmp_path) -> Path:
    shutil.copytree(prepared / "set", tmp_path / "set")
    return tmp_path / "set"


def test_the_whole_has_the_records_of_the_parts_one_after_the_other(prepared, parts):
    content = join_parts(parts)
    alone = [read_dataset(prepared / f"alone{number}") for number in range(3)]
    info = read_dataset(parts)
    for split in ("train", "heldout"):
        rows = Records(info, split=split)
        expected = [row for one in alone for row in Records(one, split=split)]
        assert len(rows) == len(expected)
        for ours, theirs in zip(rows, expected):
            np.testing.assert_array_equal(ours["tokens"], theirs["tokens"])
            np.testing.assert_array_equal(ours["segment_ids"], theirs["segment_ids"])
        for count in ("num_records", "num_tokens", "num_bytes", "num_documents", "num_padding"):
            assert content["splits"][split][count] == sum(
                getattr(one.splits[split], count) for one in alone
            )
    assert content["source"]["num_files"] == 6
    assert info.fingerprint not in [one.fingerprint for one in alone]
    batches = train_batches([(str(parts), 1.0)], batch_size=8, sequence_length=T, seed=0)
    assert next(batches)["tokens"].shape == (8, T)
    assert next(heldout_batches(str(parts), batch_size=8, sequence_length=T))["tokens"].any()


@pytest.mark.parametrize("moment", [0, 2])
def test_two_joins_at_the_same_time_both_end_well(parts, monkeypatch, moment):
    sync, synced = files.sync, []

    def meanwhile(path):
        synced.append(path)
        if len(synced) == moment + 1:
            join_parts(parts)
        sync(path)

    monkeypatch.setattr(files, "sync", meanwhile)
    content = join_parts(parts)
    assert len(synced) > moment + 1
    assert json.loads((parts / "dataset.json").read_text()) == content
    assert not list(parts.rglob("*.partial"))


def test_every_document_of_the_corpus_is_in_the_whole_once(prepared, parts):
    join_parts(parts)
    found = [
        bytes(document).decode()
        for split in ("train", "heldout")
        for document in documents_of(stream(parts, split))
    ]
    lines = [
        line
        for file in sorted((prepared / "corpus").iterdir())
        for line in file.read_text().splitlines()
    ]
    assert sorted(found) == sorted(filter(None, (json.loads(line)["text"] for line in lines)))


def test_joining_again_changes_nothing_and_other_parts_are_refused(prepared, parts):
    content = join_parts(parts)
    before = tree(parts)
    assert join_parts(parts) == content
    assert tree(parts) == before
    shutil.rmtree(parts / "part-00001-of-00003")
    prepare([str(prepared / "corpus/part-003.jsonl")], parts, part=(1, 3), **ARGS)
    assert "was joined before, from parts with other records" in error_of(join_parts, parts)
    assert (parts / "dataset.json").read_bytes()
    (parts / "dataset.json").unlink()
    assert join_parts(parts)["fingerprint"] != content["fingerprint"]


def test_missing_and_unfinished_parts_are_named(parts):
    assert "prepare --join" in error_of(read_dataset, parts)
    shutil.rmtree(parts / "part-00001-of-00003")
    (parts / "part-00002-of-00003/dataset.json").unlink()
    message = error_of(join_parts, parts)
    assert f"Of the 3 parts of {parts}, 2 are missing or not finished: 1, 2;" in message
    assert "--part 1/3" in message
    assert not (parts / "dataset.json").exists()


def test_a_part_that_was_copied_in_half_is_named(parts):
    shard = parts / "part-00001-of-00003/train-00000.records"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-10])
    assert f"Shard {shard} has {len(whole) - 10} bytes" in error_of(join_parts, parts)
    shard.unlink()
    assert f"Shard {shard} is missing" in error_of(join_parts, parts)
    assert not (parts / "dataset.json").exists()


def test_a_folder_without_parts_or_with_those_of_two_data_sets_is_refused(parts, tmp_path):
    assert "holds no parts" in error_of(join_parts, tmp_path)
    assert "holds no parts" in error_of(join_parts, tmp_path / "absent")
    (parts / "part-00000-of-00002").mkdir()
    assert "with 2 and 3 parts" in error_of(join_parts, parts)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sequence_length": T + 1}, "different --sequence-length"),
        ({"tokenizer": "spm"}, "different tokenizers"),
        ({"chat": ChatSettings(template="{{ messages[0].content }}")}, "different --chat settings"),
    ],
)
def test_parts_that_do_not_fit_together_are_refused(prepared, parts, tmp_path, changes, message):
    shutil.rmtree(parts / "part-00001-of-00003")
    text = str(prepared / "corpus/part-003.jsonl")
    if "chat" in changes:
        turns = [{"role": role, "content": role} for role in ("user", "assistant")]
        (tmp_path / "chat.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 40)
        (tmp_path / "template").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
        text = str(tmp_path / "chat.jsonl")
        changes = {"chat": ChatSettings(template=str(tmp_path / "template"))}
    if "tokenizer" in changes:
        prepare([text], tmp_path / "spm", **{**ARGS, "tokenizer": "spm:320"})
        changes = {"tokenizer": str(tmp_path / "spm/tokenizer")}
    prepare([text], parts, part=(1, 3), **{**ARGS, **changes})
    assert message in error_of(join_parts, parts)


@pytest.mark.parametrize("changes", [{"template": "llada.jinja"}, {"too_long": "left"}])
def test_parts_with_other_chat_settings_are_refused(tmp_path, changes):
    (tmp_path / "llada.jinja").write_text("{% for m in messages %}{{ m.content }}.{% endfor %}")
    for number, settings in enumerate([{"template": "default"}, {"template": "default"} | changes]):
        turns = [{"role": role, "content": f"{role} {number}"} for role in ("user", "assistant")]
        text = tmp_path / f"{number}.jsonl"
        text.write_text((json.dumps({"messages": turns}) + "\n") * 20)
        if settings["template"] != "default":
            settings["template"] = str(tmp_path / settings["template"])
        prepare(
            [str(text)],
            tmp_path / "set",
            part=(number, 2),
            **{**ARGS, "heldout": 0, "sequence_length": 64},
            chat=ChatSettings(**settings),
        )
    assert "different --chat settings" in error_of(join_parts, tmp_path / "set")


def test_parts_that_treat_malformed_records_differently_are_joined(tmp_path):
    turns = [{"role": role, "content": role} for role in ("user", "assistant")]
    for number, malformed in enumerate(("error", "skip")):
        text = tmp_path / f"{number}.jsonl"
        text.write_text(json.dumps({"messages": turns}) + "\n" + '{"broken": 1}\n' * number)
        prepare(
            [str(text)],
            tmp_path / "set",
            part=(number, 2),
            **{**ARGS, "heldout": 0, "sequence_length": 64},
            chat=ChatSettings(template="default", malformed=malformed),
        )
    assert join_parts(tmp_path / "set")["splits"]["train"]["num_documents"] == 2


def test_a_part_whose_inputs_have_moved_is_joined_as_before(tmp_path):
    folder = tmp_path / "corpus"
    write_corpus(folder, num_files=2, num_documents=30)
    for number in range(2):
        prepare(
            [str(folder / f"part-00{number}.jsonl")], tmp_path / "set", part=(number, 2), **ARGS
        )
    content = join_parts(tmp_path / "set")
    shutil.move(folder, tmp_path / "elsewhere")
    shutil.rmtree(tmp_path / "set" / "part-00001-of-00002")
    prepare([str(tmp_path / "elsewhere/part-001.jsonl")], tmp_path / "set", part=(1, 2), **ARGS)
    joined = join_parts(tmp_path / "set")
    assert joined["fingerprint"] == content["fingerprint"]
    assert "elsewhere" in json.dumps(joined["source"])


def test_inputs_that_two_parts_have_read_are_noticed(prepared, parts):
    shutil.rmtree(parts / "part-00002-of-00003")
    files = [str(prepared / f"corpus/part-00{number}.jsonl") for number in (1, 5)]
    prepare(files, parts, part=(2, 3), **ARGS)
    assert "Parts 0 and 2 have read some of the same input files" in error_of(join_parts, parts)


def test_a_part_needs_a_tokenizer_that_is_the_same_for_all(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    message = error_of(
        prepare,
        [str(tmp_path / "a.txt")],
        tmp_path / "out",
        part=(0, 2),
        **{**ARGS, "tokenizer": "spm:320"},
    )
    assert "each part would train another one" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["3", "3/3", "-1/3", "1/0", "a/b", "1/3/5", "0.5/2"])
def test_a_part_that_cannot_be_is_refused(text):
    assert f"--part {text} must be I/N" in error_of(parse_part, text)


def test_the_command_line_joins_parts_and_says_what_comes_next(prepared, tmp_path, capsys):
    out = tmp_path / "set"
    flags = ["--output", str(out), "--sequence-length", str(T), "--tokenizer", "bytes"]
    for number in range(2):
        file = str(prepared / f"corpus/part-00{number}.jsonl")
        words = ["prepare", "--input", file, *flags, "--part", f"{number}/2"]
        assert main([*words, "--workers", "1"]) == 0
        said = capsys.readouterr().err
        assert f"part {number} of 2 is finished; when all of them are, run llada-jax" in said
        assert f"prepare --join {out}" in said
    assert main(["prepare", "--join", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((out / "dataset.json").read_text())
    assert main(["prepare", "--join", str(out)]) == 0
    assert "documents" in capsys.readouterr().out
    assert main(["prepare", "--join", str(out), "--tokenizer", "bytes"]) == 2
    assert "leave --tokenizer out" in capsys.readouterr().err
    assert main(["prepare", "--join", str(out), "--drop-duplicates"]) == 2
    assert "leave --drop-duplicates out" in capsys.readouterr().err
    assert main(["prepare", "--input", "x", "--output", str(out)]) == 2
    assert "--sequence-length, --tokenizer" in capsys.readouterr().err

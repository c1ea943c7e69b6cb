"""Pairs of a chosen and a rejected answer: they are read, kept together, and never parted."""

import json

import numpy as np
import pytest
from support.errors import error_of

from llada_jax.data.dialogue_units import ChatSettings
from llada_jax.data.dialogues import Malformed, parse_dialogue, parse_pair
from llada_jax.data.loader import describe, fields_of, heldout_batches, train_batches
from llada_jax.data.preparation import prepare
from llada_jax.data.records import Records, read_dataset
from llada_jax.data.tokenizer import load_tokenizer
from llada_jax.verbs.prepare import chat_settings, summary

T = 64
TOKENIZER = load_tokenizer("bytes")
ASKED = {"role": "user", "content": "Hi"}
GOOD, BAD = ({"role": "assistant", "content": text} for text in ("Hello", "What?"))
PAIRS = [{"prompt": f"{n}?", "chosen": f"{n}!", "rejected": "no " * (n % 3 + 1)} for n in range(40)]


def prepared(folder, records, *, sequence_length=T, heldout=0.0, **settings):
    """Returns dataset.json of pairs; the data set lies in folder / "out"."""
    folder.mkdir(exist_ok=True)
    (folder / "template").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    (folder / "in.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return prepare(
        [str(folder / "in.jsonl")],
        folder / "out",
        sequence_length=sequence_length,
        heldout=heldout,
        tokenizer="bytes",
        chat=ChatSettings(records="pairs", template=str(folder / "template"), **settings),
    )


def pairs_of(rows) -> list[tuple[str, str, str]]:
    """Returns (prompt, chosen, rejected) of each pair of the rows."""
    found = []
    for row in rows:
        last = int(row["segment_ids"].max())
        assert last % 2 == 0
        for odd in range(1, last, 2):
            texts = []
            for segment in (odd, odd + 1):
                here = row["segment_ids"] == segment
                assert (row["is_chosen"][here] == (segment == odd)).all()
                for part in (here & ~row["is_maskable"], here & row["is_maskable"]):
                    texts.append(TOKENIZER.decode(row["tokens"][part]))
            assert texts[0] == texts[2]
            found.append((texts[0], texts[1], texts[3]))
    return found


def as_texts(records) -> list[tuple[str, str, str]]:
    return [(r["prompt"], r["chosen"], r["rejected"]) for r in records]


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "Hi", "chosen": "Hello", "rejected": "What?"},
        {"prompt": [ASKED], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": [ASKED], "chosen": "Hello", "rejected": [BAD]},
        {"prompt": "Hi", "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]},
        {"chosen": [ASKED, GOOD], "rejected": [ASKED, BAD], "prompt": None},
    ],
)
def test_every_form_gives_the_same_pair(record):
    assert parse_pair(record) == ([ASKED, GOOD], [ASKED, BAD])


def test_a_system_field_opens_both_dialogues():
    record = {"system": "Be kind.", "prompt": "Hi", "chosen": "Hello", "rejected": "What?"}
    chosen, rejected = parse_pair(record)
    assert chosen[0] == rejected[0] == {"role": "system", "content": "Be kind."}


@pytest.mark.parametrize(
    ("record", "defect"),
    [
        ([], "not a JSON object"),
        ({"prompt": "Hi", "chosen": "Hello"}, "'rejected' is neither a text nor a list"),
        ({"prompt": "Hi", "chosen": "Hello", "rejected": []}, "'rejected' is neither"),
        ({"chosen": "Hello", "rejected": "What?"}, "there is no prompt"),
        ({"prompt": "Hi", "chosen": "Hello", "rejected": "Hello"}, "are the same"),
        ({"prompt": "Hi", "chosen": "Hello", "rejected": " "}, "an answer is empty"),
        ({"chosen": [ASKED, GOOD], "rejected": [GOOD, BAD]}, "there is no prompt"),
        (
            {"chosen": [ASKED, GOOD], "rejected": [{**ASKED, "content": "Ho"}, BAD]},
            "answer different prompts",
        ),
    ],
)
def test_what_is_not_a_pair_is_malformed(record, defect):
    with pytest.raises(Malformed, match=defect):
        parse_pair(record)


def test_pairs_are_not_read_as_dialogues():
    with pytest.raises(Malformed, match="--chat records=pairs"):
        parse_dialogue(PAIRS[0])


def test_malformed_pairs_are_counted_and_the_first_is_named(tmp_path):
    bad = {"prompt": "Hi", "chosen": "a", "rejected": "a"}
    records = [*PAIRS[:3], bad, {"prompt": "Hi"}, bad]
    assert "in.jsonl:4: chosen and rejected are the same" in error_of(
        prepared, tmp_path / "error", records
    )
    told = prepared(tmp_path / "skip", records, malformed="skip")["dialogues"]
    assert told["num_malformed"] == 3
    assert told["malformed"]["chosen and rejected are the same"] == 2
    assert told["first_malformed"].endswith("in.jsonl:4: chosen and rejected are the same")


@pytest.mark.parametrize("rows", ["packed", "padded"])
def test_every_pair_is_whole_in_one_row_and_its_answers_are_marked(tmp_path, rows):
    content = prepared(tmp_path, PAIRS, rows=rows, heldout=0.3)
    info = read_dataset(tmp_path / "out")
    found = {split: list(Records(info, split=split)) for split in ("train", "heldout")}
    assert len(found["heldout"]) > 0
    assert sorted(pairs_of([*found["train"], *found["heldout"]])) == sorted(as_texts(PAIRS))
    if rows == "padded":
        assert sum(map(len, found.values())) == len(PAIRS)
    else:
        assert len(found["train"]) < len(pairs_of(found["train"])) / 2
    split = content["splits"]["train"]
    assert split["num_scored_tokens"] == sum(int(r["is_maskable"].sum()) for r in found["train"])
    assert split["num_documents"] == 2 * len(pairs_of(found["train"]))


def test_pairs_with_one_prompt_stay_in_one_split(tmp_path):
    records = [{"prompt": f"{n % 10}?", "chosen": f"{n}!", "rejected": "no"} for n in range(60)]
    prepared(tmp_path, records, heldout=0.5)
    info = read_dataset(tmp_path / "out")
    prompts = [
        {prompt for prompt, *_ in pairs_of(Records(info, split=split))}
        for split in ("train", "heldout")
    ]
    assert all(prompts)
    assert not set.intersection(*prompts)


def test_pairs_that_are_too_long_are_refused_left_out_or_cut_alike(tmp_path):
    long = {"prompt": "0123456789" * 4, "chosen": "yes", "rejected": "no"}
    hopeless = {"prompt": "p", "chosen": "y" * 70, "rejected": "no"}
    message = error_of(prepared, tmp_path / "error", [long])
    assert "in.jsonl:1: the two dialogues of the pair have 87 tokens" in message
    content = prepared(tmp_path / "drop", [PAIRS[0], long], too_long="drop")
    assert (content["dialogues"]["num_too_long"], content["dialogues"]["num_cut"]) == (1, 0)
    assert "  1 pairs were too long, of which 0 lost" in summary("out", content)
    told = prepared(tmp_path / "left", [long, hopeless], too_long="left", malformed="skip")
    told = told["dialogues"]
    assert (told["num_too_long"], told["num_cut"], told["num_malformed"]) == (2, 1, 1)
    rows = Records(read_dataset(tmp_path / "left" / "out"), split="train")
    # 23 tokens too many, and so 12 less in each
    assert pairs_of(rows) == [(long["prompt"][12:], "yes", "no")]


def test_batches_hold_whole_pairs_in_every_epoch_and_on_every_host(tmp_path):
    prepared(tmp_path, PAIRS, heldout=0.3)
    directory = str(tmp_path / "out")
    settings = dict(
        batch_size=4,
        sequence_length=T,
        seed=0,
        random_length_probability=0.0,
        attend_across_documents=False,
        num_threads=0,
    )
    whole = train_batches([(directory, 1.0)], **settings)
    half = train_batches([(directory, 1.0)], rows=[1, 3], **settings)
    for _ in range(6):
        batch, part = next(whole), next(half)
        assert set(batch) == set(fields_of(read_dataset(directory)))
        rows = [{name: array[r] for name, array in batch.items()} for r in range(4)]
        assert set(pairs_of(rows)) <= set(as_texts(PAIRS))
        for name, array in part.items():
            np.testing.assert_array_equal(array, batch[name][[1, 3]])
    (*_, last) = heldout_batches(
        directory, batch_size=8, sequence_length=T, attend_across_documents=False
    )
    assert last["is_chosen"].dtype == bool
    assert not last["is_chosen"][last["segment_ids"] == 0].any()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"attend_across_documents": True}, "answers must not see each other"),
        ({"random_length_probability": 0.1}, "would cut off"),
        ({"eos_padding": 2}, "has others"),
        ({"split_probability": 0.3}, "would part from their prompts"),
    ],
)
def test_settings_that_would_spoil_pairs_are_refused(tmp_path, change, says):
    prepared(tmp_path, PAIRS, rows="padded")
    settings = {"attend_across_documents": False, "random_length_probability": 0.0, **change}
    message = error_of(
        train_batches,
        [(str(tmp_path / "out"), 1.0)],
        batch_size=4,
        sequence_length=T,
        seed=0,
        **settings,
    )
    assert says in message


def test_a_mixture_of_pairs_and_text_is_refused(tmp_path, small_dataset):
    prepared(tmp_path, PAIRS, sequence_length=32)
    sources = [(str(tmp_path / "out"), 1.0), (str(small_dataset), 1.0)]
    assert "holds pairs of answers and the other" in error_of(describe, sources, sequence_length=32)


def test_turns_are_not_for_pairs():
    assert "turns=all is for dialogues" in error_of(chat_settings, ["records=pairs", "turns=all"])
    assert chat_settings(["records=pairs"]).turns == "each"
    # what earlier versions have begun can be finished: nothing new is compared
    assert "records" not in chat_settings(["turns=all"]).to_json()

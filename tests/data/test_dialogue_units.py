"""What `prepare --chat` writes: whole dialogues with their answers marked, and what it leaves
out.
"""

import itertools
import json

import numpy as np
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.errors import error_of

from llada_jax.data.chat_template import DEFAULT, Chat, Document
from llada_jax.data.dialogue_units import ChatSettings, cut_left, dialogue_texts, pack_whole
from llada_jax.data.dialogues import parse_dialogue
from llada_jax.data.inputs import Input
from llada_jax.data.preparation import prepare
from llada_jax.data.records import Records, read_dataset
from llada_jax.data.tokenizer import load_tokenizer
from llada_jax.verbs.prepare import chat_settings, summary

T = 128
TOKENIZER = load_tokenizer("bytes")
PAIRS = [{"prompt": f"What is {n}?", "response": f"It is {n * n}."} for n in range(30)]
TWO_TURNS = {
    "messages": [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d"},
    ]
}


def prepared(folder, records, *, form="jsonl", **changes):
    """Returns dataset.json and the rows of the training split."""
    folder.mkdir(exist_ok=True)
    path = folder / f"in.{form}"
    if form == "jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    else:  # every record has every column, with None where it holds nothing
        names = dict.fromkeys(name for record in records for name in record)
        columns = {name: [record.get(name) for record in records] for name in names}
        pyarrow.parquet.write_table(pyarrow.table(columns), path)
    arguments = {"sequence_length": T, "heldout": 0.0}
    arguments |= {name: changes.pop(name) for name in list(changes) if name in arguments}
    content = prepare(
        [str(path)],
        folder / "out",
        tokenizer="bytes",
        chat=ChatSettings(**{"template": "default", **changes}),
        **arguments,
    )
    return content, list(Records(read_dataset(folder / "out"), split="train"))


def documents_of(rows) -> list[tuple[str, str]]:
    """Returns (text, text of its answers) of each document of the rows."""
    found = []
    for row in rows:
        for segment in range(1, row["segment_ids"].max() + 1):
            here = row["segment_ids"] == segment
            texts = (row["tokens"][here], row["tokens"][here & row["is_maskable"]])
            found.append(tuple(TOKENIZER.decode(ids) for ids in texts))
    return found


@pytest.mark.parametrize("rows_are", ["packed", "padded"])
def test_every_dialogue_is_whole_in_one_row_and_its_answer_is_marked(tmp_path, rows_are):
    content, rows = prepared(tmp_path, PAIRS, rows=rows_are, heldout=0.3)
    heldout = Records(read_dataset(tmp_path / "out"), split="heldout")
    assert len(heldout) > 0
    chat = Chat(DEFAULT, TOKENIZER)
    expected = {
        (chat.render(parse_dialogue(pair)).removesuffix("</s>"), pair["response"]) for pair in PAIRS
    }
    found = documents_of([*rows, *heldout])
    assert len(found) == len(PAIRS)
    assert set(found) == expected
    if rows_are == "padded":
        assert len(rows) + len(heldout) == len(PAIRS)
    else:
        assert len(rows) < len(PAIRS) / 2
    split = content["splits"]["train"]
    assert split["num_scored_tokens"] == sum(int(row["is_maskable"].sum()) for row in rows)
    assert split["num_tokens"] == sum(int((row["segment_ids"] > 0).sum()) for row in rows)
    assert split["num_scored_bytes"] == sum(len(answer) for _, answer in documents_of(rows))
    assert split["num_scored_tokens"] == split["num_scored_bytes"] + split["num_documents"]


def test_each_answer_can_be_a_document_of_its_own(tmp_path):
    _, rows = prepared(tmp_path, [TWO_TURNS], turns="each", rows="padded")
    first = "### user\na\n\n### assistant\nb"
    assert documents_of(rows) == [
        (first, "b"),
        (f"{first}\n\n### user\nc\n\n### assistant\nd", "d"),
    ]
    _, rows = prepared(tmp_path / "all", [TWO_TURNS], turns="all")
    assert documents_of(rows)[0][1] == "bd"


def test_only_answers_make_documents_of_their_own(tmp_path):
    system = {"role": "system", "content": "s"}
    tool = {"role": "tool", "content": "t"}
    messages = [system, *TWO_TURNS["messages"][:2], tool, *TWO_TURNS["messages"][2:]]
    _, rows = prepared(tmp_path, [{"messages": messages}], turns="each", rows="padded")
    assert [answer for _, answer in documents_of(rows)] == ["b", "d"]


@pytest.mark.parametrize("too_long", ["error", "drop", "left"])
def test_a_dialogue_may_be_as_long_as_a_row(tmp_path, too_long):
    plain = {"prompt": "p", "response": "r"}
    _, rows = prepared(tmp_path, [plain])
    missing = T - int((rows[0]["segment_ids"] > 0).sum())
    fitting = {**plain, "prompt": "p" * (1 + missing)}
    content, rows = prepared(tmp_path / "whole", [fitting], too_long=too_long)
    assert (rows[0]["segment_ids"] == 1).all()
    assert content["dialogues"]["num_too_long"] == 0


def test_a_tokenizer_is_trained_on_what_is_not_held_out_and_on_every_prompt_once(tmp_path):
    prepared(tmp_path, PAIRS, heldout=0.4)
    heldout = documents_of(Records(read_dataset(tmp_path / "out"), split="heldout"))
    answers = {answer for _, answer in heldout}
    path = tmp_path / "in.jsonl"

    def texts(kind):
        file = Input(str(path), path.stat().st_size, "")
        return list(dialogue_texts([file], "jsonl", kind, heldout=0.4, chars=10_000))

    left = [pair for pair in PAIRS if pair["response"] not in answers]
    assert 0 < len(left) < len(PAIRS)
    assert texts("dialogues") == [f"{pair['prompt']}\n{pair['response']}" for pair in left]
    record = {"prompt": "asked", "chosen": "good", "rejected": "bad"}
    path.write_text(
        "".join(json.dumps({**record, "prompt": f"asked {n}"}) + "\n" for n in range(20))
    )
    found = [text.splitlines() for text in texts("pairs")]
    assert 0 < len(found) < 20
    assert all(text[0].startswith("asked") and text[1:] == ["good", "bad"] for text in found)


def test_dialogues_are_read_from_parquet_as_from_lines(tmp_path):
    alpaca = {"instruction": "Add", "input": "1 1", "output": "2", "system": "Be brief."}
    records = [TWO_TURNS, *PAIRS[:3], alpaca, {"prompt": "x", "response": ""}]
    settings = {"malformed": "skip", "turns": "all", "heldout": 0.0}
    lines, rows = prepared(tmp_path / "lines", records, **settings)
    table, rows_of_table = prepared(tmp_path / "table", records, form="parquet", **settings)
    assert len(documents_of(rows)) == 5
    assert documents_of(rows_of_table) == documents_of(rows)
    assert (
        table["splits"]["train"]["num_scored_bytes"]
        == (lines["splits"]["train"]["num_scored_bytes"])
    )
    first = table["dialogues"]["first_malformed"]
    assert first == f"{tmp_path}/table/in.parquet, row 5: an answer is empty"


SYSTEM, ASKED = {"role": "system", "content": "s"}, {"role": "user", "content": "Hi"}
MALFORMED = {
    "a message has no role": {"messages": [{"content": "Hi"}]},
    "an answer is empty": {"prompt": "x", "response": " "},
    "there are two system messages": {"messages": [SYSTEM, SYSTEM, ASKED]},
    "an answer is longer than the sequence": {"prompt": "x", "response": "r" * 200},
    "the template fails (no verse)": {"prompt": "verse", "response": "x"},
}


@pytest.mark.parametrize("reason", MALFORMED)
def test_malformed_dialogues_are_counted_and_the_first_is_named_or_refused(tmp_path, reason):
    refusal = "{% if messages[0].content == 'verse' %}{{ raise_exception('no verse') }}{% endif %}"
    (tmp_path / "template").write_text(refusal + DEFAULT)
    settings = {"template": str(tmp_path / "template"), "too_long": "left"}
    records = [PAIRS[0], MALFORMED[reason], PAIRS[1], MALFORMED[reason]]
    content, rows = prepared(tmp_path / "skip", records, malformed="skip", **settings)
    assert sorted(answer for _, answer in documents_of(rows)) == ["It is 0.", "It is 1."]
    told = content["dialogues"]
    assert told["malformed"] == {reason: 2}
    assert told["first_malformed"] == f"{tmp_path}/skip/in.jsonl:2: {reason}"
    lines = summary("out", content).splitlines()
    assert f"  2 malformed records were skipped (2: {reason})" in lines
    assert f"  the first of them is {told['first_malformed']}" in lines
    refused = error_of(prepared, tmp_path / "error", records, **settings)
    assert refused.startswith(f"{tmp_path}/error/in.jsonl:2: {reason}; fix or remove the record")


def test_kinds_of_malformed_records_are_counted_apart_and_one_dialogue_must_be_left(tmp_path):
    records = [PAIRS[0], {"prompt": "x", "response": ""}, {"text": "x"}, {"text": "y"}]
    content, _ = prepared(tmp_path, records, malformed="skip")
    assert content["dialogues"]["num_malformed"] == 3
    assert list(content["dialogues"]["malformed"].values()) == [2, 1]
    message = error_of(prepared, tmp_path / "all", records[1:], malformed="skip")
    assert message.startswith("No dialogue is left of the input files: 3 records are malformed")


def test_dialogues_that_are_too_long_are_refused_left_out_or_cut(tmp_path):
    long = {"prompt": "p" * 200, "response": "r" * 20}
    hopeless = {"prompt": "p", "response": "r" * 200}
    message = error_of(prepared, tmp_path / "error", [long])
    assert "in.jsonl:1: the dialogue has 246 tokens" in message
    content, rows = prepared(tmp_path / "drop", [PAIRS[1], long], too_long="drop")
    assert content["dialogues"]["num_too_long"] == 1
    first = f"{tmp_path}/drop/in.jsonl:2: 246 tokens"
    assert content["dialogues"]["first_too_long"] == first
    assert f"  the first of them is {first}" in summary("out", content).splitlines()
    del content["dialogues"]["records"], content["dialogues"]["first_too_long"]  # as in 0.1
    assert "and the others were left out\n" in summary("out", content)
    assert len(documents_of(rows)) == 1
    content, rows = prepared(tmp_path / "left", [long, hopeless], too_long="left", malformed="skip")
    ((text, answer),) = documents_of(rows)
    assert answer == "r" * 20
    assert text.endswith("p\n\n### assistant\n" + answer)
    assert len(text) == T - 1
    told = content["dialogues"]
    assert (told["num_too_long"], told["num_cut"], told["num_malformed"]) == (2, 1, 1)


def test_an_answer_that_has_lost_its_beginning_is_part_of_the_prompt():
    is_answer = np.array([0, 1, 1, 1, 0, 1, 1], bool)
    document = Document(np.arange(7, dtype=np.int32), is_answer)
    assert cut_left(document, 1).is_answer.tolist() == [1, 1, 1, 0, 1, 1]
    assert cut_left(document, 2).is_answer.tolist() == [0, 0, 0, 1, 1]
    assert cut_left(document, 5).is_answer.tolist() == [1, 1]
    assert cut_left(document, 6) is None
    assert cut_left(document, 9) is None


@given(st.lists(st.integers(1, 10), max_size=40), st.integers(0, 5))
def test_packing_keeps_every_document_whole_and_fills_rows(lengths, open_rows):
    documents = [
        Document(np.full(n, i, np.int32), np.arange(n) == n - 1) for i, n in enumerate(lengths)
    ]
    groups = ((document,) for document in documents)
    rows = list(pack_whole(groups, 10, open_rows=open_rows))
    assert all(1 <= len(tokens) <= 10 for tokens, _, _ in rows)
    found = []
    for tokens, starts, is_answer in rows:
        for part in np.split(np.arange(len(tokens)), np.flatnonzero(starts)[1:]):
            found.append((int(tokens[part[0]]), len(part)))
            assert len(set(tokens[part].tolist())) == 1
            assert is_answer[part].tolist() == [False] * (len(part) - 1) + [True]
    assert sorted(found) == list(enumerate(lengths))
    if open_rows == 0:
        assert len(rows) == len(lengths)
    elif len(rows) <= open_rows:  # two rows that were open together do not fit into one
        sizes = sorted(len(tokens) for tokens, _, _ in rows)
        assert all(a + b > 10 for a, b in itertools.combinations(sizes, 2))


def test_other_settings_are_refused_and_text_is_not_read_as_dialogues(tmp_path):
    prepared(tmp_path, PAIRS)
    message = error_of(prepared, tmp_path, PAIRS, turns="all")
    assert "with --chat turns=one and this command has --chat turns=all" in message
    (tmp_path / "a.txt").write_text("text")
    message = error_of(
        prepare,
        [str(tmp_path / "a.txt")],
        tmp_path / "text",
        sequence_length=T,
        tokenizer="bytes",
        chat=ChatSettings(template="default"),
    )
    assert "has no records" in message


def test_the_words_of_the_command_line_are_the_settings():
    words = ["template=default", "turns=all", "too_long=left", "malformed=skip", "rows=padded"]
    assert chat_settings(words) == ChatSettings(
        template="default", turns="all", too_long="left", malformed="skip", rows="padded"
    )
    assert chat_settings([]) == ChatSettings()
    assert "no setting 'row'" in error_of(chat_settings, ["row=padded"])
    assert "one of packed, padded" in error_of(chat_settings, ["rows=both"])

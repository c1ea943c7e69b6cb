"""How long the training texts are: what is counted, how counts add up, and what a run remembers."""

import json
from pathlib import Path

import numpy as np
import pytest

from llada_jax.data.chat_template import Document
from llada_jax.data.dialogue_units import ChatSettings
from llada_jax.data.lengths import added, answer_lengths, described, lengths_json, rounded_up
from llada_jax.data.preparation import prepare
from llada_jax.data.records import read_dataset
from llada_jax.data.text import Cut
from llada_jax.run.start import open_data
from llada_jax.verbs.prepare import summary

EOS = 2
T = 64


def test_lengths_are_exact_up_to_64_and_then_rounded_up_by_a_sixteenth_at_most():
    rounded = [rounded_up(length) for length in range(1, 20_000)]
    assert rounded[:64] == list(range(1, 65))
    for length, up in enumerate(rounded, start=1):
        assert length <= up <= length * 17 / 16
        assert rounded_up(up) == up
    assert len(set(rounded)) < 64 + 16 * 9, "few enough for dataset.json"


@pytest.mark.parametrize("num_texts", [1, 2, 99, 100, 101, 1000])
def test_the_lengths_that_shares_of_the_texts_do_not_exceed(num_texts):
    lengths = np.sort(np.random.default_rng(num_texts).integers(1, 60, num_texts))
    found = described(added([{int(length): 1} for length in lengths]))
    expected = {
        # the k-th smallest, where k texts are the least that make up the share
        name: lengths[-(-num_texts * percent // 100) - 1]
        for name, percent in (("median", 50), ("most", 99), ("longest", 100))
    }
    assert found == expected
    assert described({}) == {}


def test_an_answer_is_counted_with_the_end_that_it_has_or_will_have():
    #                       q  A  A EOS q  B  q  C  EOS, where only the first and the last have one
    tokens = np.array([5, 7, 7, EOS, 5, 8, 5, 9, EOS])
    is_answer = np.array([0, 1, 1, 1, 0, 1, 0, 1, 1], bool)
    assert answer_lengths(Document(tokens, is_answer), [EOS, 3]) == [3, 2, 2]
    assert answer_lengths(Document(tokens, ~is_answer), [EOS]) == [2, 2, 2]


def test_counts_of_parts_add_up_unless_one_of_them_was_not_counted():
    parts = [{"lengths": {"answers": {"9": 1, "12": 2}}}, {"lengths": {"answers": {"9": 4}}}]
    assert lengths_json(parts) == {"lengths": {"answers": {"9": 5, "12": 2}}}
    assert lengths_json([*parts, {"splits": {}}]) == {}


@pytest.fixture(scope="module")
def datasets(tmp_path_factory) -> dict[str, str]:
    """Ten dialogues with answers of 1 to 10 letters, and lines of 3, 2 and 100 letters."""
    folder = tmp_path_factory.mktemp("lengths")
    with open(folder / "in.jsonl", "w") as file:
        for n in range(1, 11):
            file.write(json.dumps({"prompt": "q", "response": "a" * n}) + "\n")
    (folder / "in.txt").write_text("abc\nde\n" + "x" * 100)
    settings = {"sequence_length": T, "tokenizer": "bytes", "heldout": 0.0}
    chat = ChatSettings(template="default")
    prepare([str(folder / "in.jsonl")], folder / "chat", chat=chat, **settings)
    cut = Cut(documents="line")
    prepare([str(folder / "in.txt")], folder / "text", cut=cut, **settings)
    return {name: str(folder / name) for name in ("chat", "text")}


def test_prepare_counts_answers_of_dialogues_and_documents_of_text(datasets):
    assert read_dataset(datasets["chat"]).lengths == {
        "answers": {str(length): 1 for length in range(2, 12)}
    }
    content = json.loads(Path(datasets["chat"], "dataset.json").read_text())
    line = "half of the answers to train on have up to 6 tokens, 99% up to 11, the longest 11"
    assert line in summary("out", content)
    # with one EOS each; 101 is rounded up
    assert read_dataset(datasets["text"]).lengths == {"documents": {"3": 1, "4": 1, "104": 1}}


def test_a_run_remembers_the_lengths_of_all_its_datasets(datasets):
    data = open_data([(datasets["chat"], 0.5), (datasets["text"], 0.5)], sequence_length=T)
    assert data.lengths() == {
        "answers": {"median": 6, "most": 11, "longest": 11},
        "documents": {"median": 4, "most": 104, "longest": 104},
    }


def test_a_dataset_of_an_older_version_has_no_lengths(datasets, tmp_path):
    content = json.loads(Path(datasets["chat"], "dataset.json").read_text())
    del content["lengths"]
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    assert read_dataset(tmp_path).lengths == {}

"""Baselines of dialogues; those of text are checked with the command, in tests/verbs."""

import lzma
from collections import Counter

import numpy as np
import pytest

from llada_jax.data.records import Records, read_dataset
from llada_jax.data.tokenizer import load_tokenizer
from llada_jax.evaluation.baselines import unigram_bits_per_byte, xz_bits_per_byte


@pytest.mark.parametrize("rows", ["packed", "padded"])
def test_baselines_of_dialogues_are_of_the_answers(dialogues, rows):
    """As the bound of a model is, whose bits per byte stand next to theirs."""
    info, tokenizer = read_dataset(dialogues(rows)), load_tokenizer("bytes")

    def answers(split: str) -> list[int]:
        records = Records(info, split=split)
        found = (records[i]["tokens"][records[i]["is_maskable"]] for i in range(len(records)))
        return np.concatenate(list(found)).tolist()

    train, heldout = answers("train"), answers("heldout")
    texts = {
        name: bytes(token for token in tokens if token != tokenizer.eos_id)
        for name, tokens in (("train", train), ("heldout", heldout))
    }
    count, total = Counter(train), len(train) + tokenizer.vocab_size
    bits = -sum(np.log2((count[token] + 1) / total) for token in heldout)
    unigram = unigram_bits_per_byte(info, split="heldout")
    assert unigram == pytest.approx(bits / len(texts["heldout"]))
    alone, after_train = xz_bits_per_byte(info, tokenizer, split="heldout")

    def size(text: bytes) -> int:
        return len(lzma.compress(text, preset=9))

    assert alone == pytest.approx(8 * size(texts["heldout"]) / len(texts["heldout"]))
    added = size(texts["train"] + texts["heldout"]) - size(texts["train"])
    assert after_train == pytest.approx(8 * added / len(texts["heldout"]))

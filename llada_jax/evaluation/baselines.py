"""What compresses a text without a neural network: yardsticks for a model's bits per byte, of the
tokens that the model is scored on. Of dialogues these are the answers.
"""

import lzma

import numpy as np

from llada_jax.data.records import DatasetInfo, Records


def _scored(info: DatasetInfo, split: str, eos_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the scored tokens of a split in file order, int32, and which are EOS, bool."""
    records = Records(info, split=split)
    rows = (records[i] for i in range(len(records)))
    # rows of text do not say what is scored, which is all of it
    pieces = [row["tokens"][row.get("is_maskable", row["segment_ids"] > 0)] for row in rows]
    tokens = np.concatenate(pieces)
    return tokens, tokens == eos_id


def unigram_bits_per_byte(info: DatasetInfo, *, split: str) -> float:
    """Returns the cross-entropy of a split under the token frequencies of the training split, in
    bits/byte.
    """
    eos_id, vocab_size = info.tokenizer["eos_id"], info.tokenizer["vocab_size"]
    train, _ = _scored(info, "train", eos_id)
    heldout, _ = _scored(info, split, eos_id)
    # one more of each token: a token that training never saw would cost infinitely many bits
    counts_V = np.bincount(train, minlength=vocab_size) + 1.0
    bits_V = -np.log2(counts_V / counts_V.sum())
    return float(bits_V[heldout].sum() / info.split(split).num_scored_bytes)


def xz_bits_per_byte(info: DatasetInfo, tokenizer, *, split: str) -> tuple[float, float]:
    """Returns the size of a split's text under `xz -9`, in bits/byte: alone, and after the training
    text.

    The second number is what the split adds to the compressed size of the training text: a fair
    match for a model that has read that text too, as far as the 64 MiB reach that `xz -9` looks
    back.
    """
    eos_id = info.tokenizer["eos_id"]
    texts = {}
    for name in ("train", split):
        tokens, is_eos = _scored(info, name, eos_id)
        texts[name] = tokenizer.decode(tokens[~is_eos]).encode()
    num_bytes = info.split(split).num_scored_bytes

    def compressed(text: bytes) -> int:
        return len(lzma.compress(text, preset=9))

    alone = compressed(texts[split])
    added = compressed(texts["train"] + texts[split]) - compressed(texts["train"])
    return 8 * alone / num_bytes, 8 * added / num_bytes

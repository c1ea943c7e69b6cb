"""From prompts as text to completions as text."""

import numpy as np
from support.toy_networks import EOS, MASK, PAD, VOCAB, eos_after

from llada_jax.samplers.text import cut_at_eos, decode_after, generate_text


class LetterTokenizer:
    """Words a, b, c, ... with the habit of SentencePiece: the space before the first word is
    dropped in decoding.
    """

    kind = "sentencepiece"
    vocab_size, mask_id, pad_id, eos_id = VOCAB, MASK, PAD, EOS

    def encode(self, text):
        return [ord(word) - ord("a") for word in text.split()]

    def decode(self, ids):
        return " ".join(chr(ord("a") + int(i)) for i in ids if i not in (MASK, EOS))


def test_text_keeps_the_space_after_the_prompt_and_ends_before_eos():
    completions = generate_text(
        eos_after([2, 4]), {}, LetterTokenizer(), ["b b", ""], gen_length=4, block_length=2, steps=4
    )
    assert completions[0].text == " d d"
    assert completions[0].tokens == [3, 3]
    assert completions[1].text == "d d d d"
    assert [c.num_steps for c in completions] == [4, 4]
    unstopped = generate_text(
        eos_after([2]), {}, LetterTokenizer(), ["b b"], gen_length=4, stop_at_eos=False
    )
    assert unstopped[0].tokens == [3, 3, EOS, 3]


def test_decoding_after_a_prompt():
    tokenizer = LetterTokenizer()
    assert decode_after(tokenizer, [1], [2, 3]) == " c d"
    assert decode_after(tokenizer, [], [2, 3]) == "c d"
    assert cut_at_eos([1, 2, EOS, 4], EOS) == [1, 2]
    assert cut_at_eos(np.array([1, 2]), EOS) == [1, 2]

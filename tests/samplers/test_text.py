"""From prompts as text to completions as text."""

import jax.numpy as jnp
import numpy as np
import pytest
from support.recital import BYTES, letters, recite
from support.toy_networks import EOS, MASK, PAD, VOCAB, eos_after, with_likely_padding

from llada_jax.errors import UserError
from llada_jax.samplers.text import (
    continue_text,
    cut_at_end,
    decode_after,
    generate_text,
    generate_tokens,
    infill_text,
)


class LetterTokenizer:
    """Words a, b, c, ... with the habit of SentencePiece: the space before the first word is
    dropped in decoding.
    """

    kind = "sentencepiece"
    vocab_size, mask_id, pad_id, end_ids = VOCAB, MASK, PAD, (EOS,)

    def encode(self, text):
        return [ord(word) - ord("a") for word in text.split()]

    def decode(self, ids):
        return " ".join(chr(ord("a") + int(i)) for i in ids if i not in (MASK, EOS))


def test_text_keeps_the_space_after_the_prompt_and_ends_before_eos():
    # by rows of the batch, in which the shorter prompt comes first
    completions = generate_text(
        eos_after([4, 2]), {}, LetterTokenizer(), ["b b", ""], gen_length=4, block_length=2, steps=4
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
    assert cut_at_end([1, 2, EOS, 4], [EOS]) == [1, 2]
    assert cut_at_end([1, 2, 4, EOS], [EOS, 4]) == [1, 2]
    assert cut_at_end(np.array([1, 2]), [EOS]) == [1, 2]
    # tokens that complete a letter of the prompt do not bring the prompt with them
    broken = "é".encode()[1:] + b"x"
    assert decode_after(BYTES, [*b"ab", "é".encode()[0]], broken) == BYTES.decode(list(broken))


def test_text_is_continued_token_by_token_as_asked(monkeypatch):
    asked = {}

    def continue_tokens(cached_fn, params, prompts, **settings):
        asked.update(settings)
        return np.array([[*b"so", BYTES.eos_id, *b"on"]]), np.array([5])

    monkeypatch.setattr("llada_jax.samplers.text.continue_tokens", continue_tokens)
    # what denoising alone has is left out where it has its default
    settings = {"gen_length": 5, "cfg_scale": 0.0, "steps": None, "append": False}
    for stops, end in ((True, 2), (False, 5)):
        (found,) = continue_text(None, {}, BYTES, ["and"], stop_at_eos=stops, **settings)
        assert found.tokens == [*b"so", BYTES.eos_id, *b"on"][:end]
        assert asked == {
            "gen_length": 5,
            "stop_at_eos": stops,
            "eos_id": BYTES.end_ids,
            "bos_id": BYTES.bos_id,
            "mask_id": BYTES.mask_id,
            "pad_id": BYTES.pad_id,
            "num_ids": BYTES.vocab_size,
        }
    with pytest.raises(UserError, match="on_step is called between steps of denoising"):
        continue_text(None, {}, BYTES, ["and"], gen_length=5, on_step=print)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_of_the_embedding_that_the_tokenizer_has_no_id_for_are_never_sampled(temperature):
    """The vocabulary is padded to a multiple of 64 rows; the last ones here are the likeliest."""

    def likes_the_padding(params, tokens_BT, segment_ids_BT, positions_BT, start=0, length=None):
        shape = (len(tokens_BT), tokens_BT.shape[1] if length is None else length, 64)
        return jnp.broadcast_to(jnp.arange(64.0), shape)

    settings = {"mask_id": 3, "pad_id": 0, "gen_length": 32, "temperature": temperature}
    tokens_BT, _ = generate_tokens(likes_the_padding, {}, [[1], [2]], num_ids=40, **settings)
    assert tokens_BT.max() == 39
    everything_BT, _ = generate_tokens(likes_the_padding, {}, [[1], [2]], **settings)
    assert everything_BT.max() == 63


def test_texts_and_gaps_have_no_ids_that_the_tokenizer_does_not_have():
    network = with_likely_padding(recite)
    request = (network, letters("It is a truth."), BYTES)
    (generated,) = generate_text(*request, ["It is"], gen_length=10)
    assert generated.text == " a truth."
    (filled,) = infill_text(*request, ["It [MASK:2] a truth."])
    assert filled.text == "It is a truth."

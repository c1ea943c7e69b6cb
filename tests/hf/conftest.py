"""The tokenizers that the tests of exported ones share."""

import pytest
from support.tokenizer_texts import training_texts

from llada_jax.data.tokenizer import load_tokenizer
from llada_jax.data.tokenizer_training import train_sentencepiece


@pytest.fixture(scope="session")
def ours():
    """One tokenizer of each kind, by the name of the kind."""
    texts = training_texts()
    return {
        "bytes": load_tokenizer("bytes"),
        "unigram": train_sentencepiece(texts, vocab_size=1200, model_type="unigram"),
        "bpe": train_sentencepiece(texts, vocab_size=1200, model_type="bpe"),
    }

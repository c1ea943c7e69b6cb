"""Tokenizers: lossless round trips, special ids that no text can forge, files that survive saving,
clear refusals.
"""

import json
import random

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llada_jax.data.codecs import SEGMENT_CHARS
from llada_jax.data.tokenizer import load_tokenizer
from llada_jax.data.tokenizer_training import train_sentencepiece
from llada_jax.errors import UserError

TEXT = (
    "It is a truth universally acknowledged, that a single man in possession of a good fortune, "
    "must be in want of a "
    "wife.\n\nHowever little known the feelings or views of such a man may be on his first "
    "entering a neighbourhood, "
    "this truth is so well fixed in the minds of the surrounding families.\n\tIn 1813 the cost was "
    "18 shillings.\n"
)
HARD_TEXTS = (
    "",
    " ",
    "  leading and trailing  ",
    "runs      of spaces",
    "\u2581",
    "a\u2581b \u2581\u2581 \n\u2581",
    "\u2585 \u2047",
    "nul \x00 byte",
    "tab\tline\nfeed\r\nreturn\r\n\n\n",
    "e\u0301 \u1112\u1161\u11ab \U0001f469\u200d\U0001f52c \U0001f600",
    "日本語 العربية",
    "<mask></s><s><pad><unk>\n<0x41>",
    "\ufeffbyte order mark",
    "a" * (3 * SEGMENT_CHARS) + "\n" * 2_000 + "\u2581" * 3,
)


@pytest.fixture(scope="module")
def tokenizers():
    return {
        "bytes": load_tokenizer("bytes"),
        "unigram": train_sentencepiece([TEXT], vocab_size=310, model_type="unigram"),
        "bpe": train_sentencepiece([TEXT], vocab_size=310, model_type="bpe"),
    }


KINDS = pytest.mark.parametrize("kind", ["bytes", "unigram", "bpe"])


def special_ids(tokenizer) -> set[int]:
    return {tokenizer.mask_id, tokenizer.eos_id, tokenizer.bos_id, tokenizer.pad_id}


@KINDS
@pytest.mark.parametrize("text", HARD_TEXTS)
def test_hard_texts_survive_encoding_without_a_special_id(tokenizers, kind, text):
    ids = tokenizers[kind].encode(text)
    assert tokenizers[kind].decode(ids) == text
    assert not special_ids(tokenizers[kind]) & set(ids)


@KINDS
@given(text=st.text() | st.text(alphabet="ab \n\u2581<mask>/s\r\t\x00", max_size=200))
@settings(max_examples=150)
@example(text="\u2581 \u2581")
def test_any_unicode_text_survives_encoding(tokenizers, kind, text):
    ids = tokenizers[kind].encode(text)
    assert tokenizers[kind].decode(ids) == text
    assert all(0 <= i < tokenizers[kind].vocab_size for i in ids)


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
@given(
    lines=st.lists(st.sampled_from([" the feelings", "a truth.", "", "\t", "x" * 400]), max_size=60)
)
@settings(max_examples=25)
def test_encoding_in_segments_gives_the_ids_of_the_whole(tokenizers, kind, lines):
    """The reference is SentencePiece itself on the whole text."""
    text = "\n".join(lines)
    assert tokenizers[kind].encode(text) == tokenizers[kind]._codec._processor.encode(text)


@KINDS
def test_batches_give_the_ids_of_single_texts(tokenizers, kind):
    batch = tokenizers[kind].encode_batch(list(HARD_TEXTS))
    assert batch == [tokenizers[kind].encode(text) for text in HARD_TEXTS]


@KINDS
def test_the_special_ids_are_four_distinct_rows_and_decode_to_nothing(tokenizers, kind):
    tokenizer = tokenizers[kind]
    assert len(special_ids(tokenizer)) == 4
    assert all(i < tokenizer.vocab_size for i in special_ids(tokenizer))
    a, b = tokenizer.encode("left"), tokenizer.encode("right")
    beyond = [
        tokenizer.vocab_size,
        tokenizer.vocab_size + 63,
    ]  # rows that only round the embedding up
    assert (
        tokenizer.decode([tokenizer.bos_id, *a, tokenizer.mask_id, *b, *beyond, tokenizer.eos_id])
        == "leftright"
    )
    assert tokenizer.decode(np.array(a, dtype=np.int32)) == "left"


def test_bytes_are_their_own_ids():
    tokenizer = load_tokenizer("bytes")
    assert tokenizer.encode("Aé\n") == [0x41, 0xC3, 0xA9, 0x0A]
    assert (tokenizer.vocab_size, tokenizer.mask_id) == (260, 256)
    assert (
        tokenizer.decode([0xC3]) == "\ufffd"
    )  # half a character, as an unfinished canvas may hold


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_training_gives_exactly_the_vocabulary_asked_for_with_the_line_feed_as_a_piece(
    tokenizers, kind
):
    assert tokenizers[kind].vocab_size == 310
    assert tokenizers[kind].encode("\n\n\n") == [5, 5, 5]
    assert tokenizers[kind].encode("a\nb")[1:-1] == [5]


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_training_is_deterministic(tokenizers, kind):
    again = train_sentencepiece(iter([TEXT]), vocab_size=310, model_type=kind)
    assert again.fingerprint == tokenizers[kind].fingerprint
    assert (
        again.fingerprint
        != train_sentencepiece([TEXT], vocab_size=311, model_type=kind).fingerprint
    )


@KINDS
def test_saving_and_loading_keeps_ids_and_fingerprint(tokenizers, kind, tmp_path):
    tokenizers[kind].save(tmp_path / "tokenizer")
    loaded = load_tokenizer(tmp_path / "tokenizer")
    assert loaded.fingerprint == tokenizers[kind].fingerprint
    assert vars(loaded).keys() == vars(tokenizers[kind]).keys()
    for name in ("kind", "vocab_size", "mask_id", "eos_id", "bos_id", "pad_id"):
        assert getattr(loaded, name) == getattr(tokenizers[kind], name)
    assert loaded.encode(TEXT) == tokenizers[kind].encode(TEXT)


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_a_vocabulary_too_large_for_the_text_names_the_largest_that_works(kind):
    with pytest.raises(UserError, match="at most") as caught:
        train_sentencepiece([TEXT], vocab_size=8000, model_type=kind)
    largest = int(str(caught.value).split("at most ")[1].split()[0])
    assert train_sentencepiece([TEXT], vocab_size=largest, model_type=kind).vocab_size == largest
    with pytest.raises(UserError, match=f"at most {largest} "):
        train_sentencepiece([TEXT], vocab_size=largest + 1, model_type=kind)


def test_a_vocabulary_too_small_for_the_bytes_names_the_smallest():
    with pytest.raises(UserError, match="too small: .* need 2[0-9]{2}; use --tokenizer spm-bpe:2"):
        train_sentencepiece([TEXT], vocab_size=100, model_type="bpe")


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
@pytest.mark.parametrize("spaces", ["", "   "])
def test_a_space_survives_a_training_text_with_next_to_none(model_type, spaces):
    letters = [chr(0x4E00 + n) for n in range(40)]
    text = "".join(random.Random(0).choices(letters, k=9_000)) + spaces
    tokenizer = train_sentencepiece([text], vocab_size=303, model_type=model_type)
    for asked in (" ", f"{text[:9]}  a {text[9:20]} \u2581 "):
        assert tokenizer.decode(tokenizer.encode(asked)) == asked


@pytest.mark.parametrize("texts", [[], [""], ["\n\n"]])
def test_training_on_nothing_is_refused(texts):
    with pytest.raises(UserError, match="empty corpus"):
        train_sentencepiece(texts, vocab_size=300, model_type="unigram")


# ---- given SentencePiece models


def train_foreign(path, **options):
    import sentencepiece

    options = {
        "vocab_size": 300,
        "model_type": "bpe",
        "byte_fallback": True,
        "minloglevel": 2,
        **options,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.split("\n")), model_prefix=str(path.with_suffix("")), **options
    )
    return path


def test_a_model_without_mask_is_refused_and_gets_one_after_its_last_id_on_request(tmp_path):
    path = train_foreign(
        tmp_path / "foreign.model",
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
    )
    with pytest.raises(UserError, match="no mask token.*--add-mask-token"):
        load_tokenizer(path)
    tokenizer = load_tokenizer(path, add_mask_token=True)
    assert (tokenizer.mask_id, tokenizer.vocab_size) == (300, 301)
    assert tokenizer.eos_id == 2
    assert tokenizer.pad_id == tokenizer.eos_id  # it has no pad of its own
    text = "A single man.  In want of a wife é"
    assert tokenizer.decode(tokenizer.encode(text)) == text  # its dummy prefix is gone again
    tokenizer.save(tmp_path / "saved")
    loaded = load_tokenizer(tmp_path / "saved")
    assert (loaded.mask_id, loaded.vocab_size, loaded.fingerprint) == (
        300,
        301,
        tokenizer.fingerprint,
    )


def test_a_model_without_eos_gets_both_tokens(tmp_path):
    path = train_foreign(tmp_path / "foreign.model", eos_id=-1, bos_id=-1)
    with pytest.raises(UserError, match="no mask token and end-of-text token"):
        load_tokenizer(path)
    tokenizer = load_tokenizer(path, add_mask_token=True)
    assert (tokenizer.mask_id, tokenizer.eos_id, tokenizer.vocab_size) == (300, 301, 302)
    assert tokenizer.decode([301, 300, *tokenizer.encode("wife")]) == "wife"


def test_a_mask_that_the_model_matches_in_text_is_not_forged_by_a_text(tmp_path):
    path = train_foreign(
        tmp_path / "foreign.model", user_defined_symbols=["<mask>"], add_dummy_prefix=False
    )
    tokenizer = load_tokenizer(path)
    assert tokenizer._codec._processor.encode("<mask>") == [
        tokenizer.mask_id
    ]  # what the library does by itself
    ids = tokenizer.encode("a<mask>b")
    assert tokenizer.mask_id not in ids
    assert tokenizer.decode(ids) == "a<mask>b"
    # full-width letters, of which the model's normalisation makes the same
    assert tokenizer.mask_id not in tokenizer.encode("a\uff1cmask\uff1eb")


# ---- Hugging Face tokenizer.json


def save_huggingface(folder, tokenizer, config=None):
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def byte_level_bpe(special_tokens):
    import tokenizers as hf

    tokenizer = hf.Tokenizer(hf.models.BPE())
    tokenizer.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = hf.decoders.ByteLevel()
    trainer = hf.trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=special_tokens,
        initial_alphabet=hf.pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return tokenizer


@given(text=st.text())
@example(text="<|mdm_mask|> <|endoftext|>\u2581\x00\r\n")
@settings(max_examples=50)
def test_a_byte_level_tokenizer_is_lossless_and_reads_special_tokens_as_text(byte_level, text):
    ids = byte_level.encode(text)
    assert byte_level.decode(ids) == text
    assert not special_ids(byte_level) & set(ids)


@pytest.mark.parametrize("kind", ["bytes", "bpe", "huggingface"])
def test_half_of_a_surrogate_pair_is_refused_in_one_sentence(tokenizers, byte_level, kind):
    tokenizer = {**tokenizers, "huggingface": byte_level}[kind]
    with pytest.raises(UserError, match=r"'b.ud800' holds half of a surrogate pair at character 1"):
        tokenizer.encode_batch(["a", "b\ud800"])


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf") / "llada"
    return load_tokenizer(
        save_huggingface(folder, byte_level_bpe(["<|endoftext|>", "<|mdm_mask|>"]))
    )


def test_the_published_mask_is_found_by_name_and_eos_stands_in_for_bos_and_pad(byte_level):
    assert byte_level.kind == "huggingface"
    assert (byte_level.eos_id, byte_level.mask_id, byte_level.vocab_size) == (0, 1, 320)
    assert byte_level.bos_id == byte_level.pad_id == byte_level.eos_id


def test_declared_names_win_over_usual_ones(tmp_path):
    tokenizer = byte_level_bpe(["<mask>", "<gap>", "</s>", "<stop>"])
    config = {"mask_token": "<gap>", "eos_token": {"content": "<stop>"}, "pad_token": None}
    loaded = load_tokenizer(save_huggingface(tmp_path / "hf", tokenizer, config))
    assert (loaded.mask_id, loaded.eos_id, loaded.pad_id) == (1, 3, 3)


def test_a_huggingface_tokenizer_gets_a_mask_that_its_saved_file_contains(tmp_path):
    folder = save_huggingface(tmp_path / "hf", byte_level_bpe(["</s>"]))
    with pytest.raises(UserError, match="--add-mask-token"):
        load_tokenizer(folder)
    tokenizer = load_tokenizer(folder, add_mask_token=True)
    assert (tokenizer.mask_id, tokenizer.vocab_size) == (320, 321)
    tokenizer.save(tmp_path / "saved")
    import tokenizers as hf

    assert (
        hf.Tokenizer.from_file(str(tmp_path / "saved" / "tokenizer.json")).token_to_id("<mask>")
        == 320
    )
    assert load_tokenizer(tmp_path / "saved").fingerprint == tokenizer.fingerprint


def test_a_unigram_whose_vocabulary_holds_its_specials_does_not_emit_them_for_text(tmp_path):
    """XLM-R's vocabulary has "</s>" with score 0, so the model itself prefers it to its letters."""
    import tokenizers as hf

    vocabulary = [("<unk>", 0.0), ("</s>", 0.0), ("<mask>", 0.0), *((c, -5.0) for c in "</smak>ab")]
    tokenizer = hf.Tokenizer(hf.models.Unigram(vocabulary, unk_id=0))
    tokenizer.decoder = hf.decoders.Fuse()
    loaded = load_tokenizer(save_huggingface(tmp_path / "hf", tokenizer))
    ids = loaded.encode("a</s><mask>b")
    assert not special_ids(loaded) & set(ids)
    assert loaded.decode(ids) == "a</s><mask>b"


@pytest.mark.parametrize("text", ["a<MASK>b", "a\uff1cmask\uff1eb", "a<mask>b"])
def test_a_special_token_that_only_the_normalised_text_spells_is_text_too(tmp_path, text):
    import tokenizers as hf

    tokenizer = byte_level_bpe(["</s>"])
    tokenizer.normalizer = hf.normalizers.Sequence(
        [hf.normalizers.NFKC(), hf.normalizers.Lowercase()]
    )
    tokenizer.add_tokens([hf.AddedToken("<mask>", special=False, normalized=True)])
    loaded = load_tokenizer(save_huggingface(tmp_path / "hf", tokenizer))
    assert tokenizer.encode(text).ids.count(loaded.mask_id) == 1
    ids = loaded.encode(text)
    assert not special_ids(loaded) & set(ids)
    assert loaded.decode(ids) == "a<mask>b"


def test_truncation_and_padding_stored_in_the_file_are_switched_off(tmp_path):
    tokenizer = byte_level_bpe(["</s>", "<mask>"])
    tokenizer.enable_truncation(max_length=4)
    tokenizer.enable_padding(length=64)
    loaded = load_tokenizer(save_huggingface(tmp_path / "hf", tokenizer))
    assert loaded.decode(loaded.encode(TEXT)) == TEXT

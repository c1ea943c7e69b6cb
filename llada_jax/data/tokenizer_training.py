"""Training of a SentencePiece tokenizer that loses nothing and is the same on every machine."""

import io
import re
from collections.abc import Iterable, Iterator

from llada_jax.data.codecs import SPACE_MARK, SentencePiece
from llada_jax.data.tokenizer import Tokenizer, with_special_ids
from llada_jax.errors import UserError, require

# A longer line is cut for training. A character has at most 4 bytes, so that what is left always
# fits MAX_SENTENCE_BYTES, above which SentencePiece silently drops a line.
MAX_LINE_CHARS = 4_000
MAX_SENTENCE_BYTES = 4 * MAX_LINE_CHARS + 4


def train_sentencepiece(texts: Iterable[str], *, vocab_size: int, model_type: str) -> Tokenizer:
    """Trains a lossless SentencePiece model; the same texts give the same bytes on any machine.

    The ids are 0 unknown (never produced), 1 bos, 2 eos, 3 pad, 4 mask, 5 line feed, 6..261 the
    bytes, then the pieces.

    Args:
        texts: read once; every character is held in memory, so hand in a sample.
        vocab_size: rows of the embedding, all of the above included.
        model_type: "unigram" or "bpe".

    Raises:
        UserError: the texts are empty, or hold too few or too many distinct pieces for vocab_size.
    """
    sentencepiece = require("sentencepiece")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines_for_training(texts),
            model_writer=model,
            vocab_size=vocab_size,
            model_type=model_type,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=3,
            # Also where a text has next to no spaces, as Chinese does: in bytes, a space would
            # become its mark.
            required_chars=SPACE_MARK,
            control_symbols=["<mask>"],
            user_defined_symbols=["\n"],
            max_sentence_length=MAX_SENTENCE_BYTES,
            # Not the number of cores: the last digits of its sums, and hence the pieces, depend on
            # the number of threads.
            num_threads=16,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _training_error(str(error), vocab_size=vocab_size, model_type=model_type) from error
    codec = SentencePiece(_as_saved(model.getvalue()), name="trained model")
    return with_special_ids(codec, codec.declared(), {}, name="trained model", add_mask_token=False)


def _as_saved(model: bytes) -> bytes:
    """Returns a model without its list of required characters, which mattered in training alone; a
    unigram model also has its scores rounded to multiples of 1/64, whose sums are exact in float32.

    Without the rounding, "===" becomes "==" "=" in one place and "=" "==" in another, depending on
    the last bit of the sum, and other libraries, which add in float64, give other ids. The line
    feed becomes an ordinary piece, since SentencePiece subtracts 0.1 from the score of a
    user-defined one; no other piece contains it, so it is still encoded alone.
    """
    protobuf = require("sentencepiece.sentencepiece_model_pb2")
    content = protobuf.ModelProto.FromString(model)
    content.trainer_spec.ClearField("required_chars")
    if content.trainer_spec.model_type == content.trainer_spec.UNIGRAM:
        kinds = protobuf.ModelProto.SentencePiece
        normal = [piece for piece in content.pieces if piece.type == kinds.NORMAL]
        for piece in normal:
            piece.score = round(piece.score * 64) / 64
        for piece in content.pieces:
            if piece.type == kinds.USER_DEFINED:
                piece.type, piece.score = kinds.NORMAL, max(p.score for p in normal)
    return content.SerializeToString(deterministic=True)


def _lines_for_training(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for line in text.split("\n"):
            for i in range(0, len(line), MAX_LINE_CHARS):
                yield line[i : i + MAX_LINE_CHARS]


def _training_error(message: str, *, vocab_size: int, model_type: str) -> UserError:
    """Returns what the trainer's message means for --tokenizer, with a size that works."""
    largest = re.search(r"too high .* value <= (\d+)", message)
    smallest = re.search(r"smaller than required_chars\. \d+ vs (\d+)", message)
    spec = {"unigram": "spm", "bpe": "spm-bpe"}[model_type]
    if largest:
        return UserError(
            f"A {model_type} vocabulary of {vocab_size} cannot be trained: this text yields at "
            f"most {largest[1]} pieces; use --tokenizer {spec}:{largest[1]} or less, more text, or "
            "--tokenizer bytes."
        )
    if smallest:
        return UserError(
            f"A {model_type} vocabulary of {vocab_size} is too small: the 256 bytes, the special "
            f"tokens and the characters of this text need {smallest[1]}; use --tokenizer "
            f"{spec}:{smallest[1]} or more, or bytes."
        )
    if "sentences_.empty()" in message or "all_chars_count" in message:
        return UserError(
            "A tokenizer cannot be trained on an empty corpus: give documents with text in them."
        )
    return UserError(
        f"SentencePiece could not train a {model_type} vocabulary of {vocab_size}: "
        f"{message.strip()}"
    )

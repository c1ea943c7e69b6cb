"""The tokenizer files of an export: what `transformers.AutoTokenizer` reads, with the ids that this
package gives.

A Hugging Face tokenizer is carried through byte for byte, but for a tokenizer_config.json that
names no class. SentencePiece models and bytes become a tokenizer.json of the `tokenizers` library
(https://huggingface.co/docs/tokenizers), built so that the ids are the same:

- SentencePiece's space mark is written as the space that it stands for, so that a text may hold the
  mark itself.
- A unigram model with byte pieces works on bytes (the alphabet of GPT-2), where no character is
  unknown; the names of special and byte pieces have a score so low that a text that spells them out
  is still read as ordinary text.
- A BPE model lists the merges that SentencePiece derives from the scores; none leads to a special
  or byte piece.
"""

import base64
import json
from pathlib import Path
from typing import Any

from llada_jax.data.chat_template import environment
from llada_jax.data.codecs import SPACE_MARK
from llada_jax.data.tokenizer import CHAT_TEMPLATE, PROBES, Tokenizer
from llada_jax.errors import UserError, require
from llada_jax.storage import files

# a score that no sum of other scores falls below
NEVER = -1e6
# of the byte of an unknown character: below every ordinary piece, above NEVER
BYTE_SCORE = -1e3


def read_template(path: str) -> str:
    """Returns the Jinja source in a file, in which jinja2 has found no mistake.

    Raises:
        UserError: the file cannot be read, or is not a template.
    """
    jinja2 = require("jinja2", extra="hf")
    with files.reading(f"--chat-template {path}", remedy="give a text file"):
        template = Path(path).read_text()
    try:
        environment().parse(template)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(
            f"--chat-template {path} is not a Jinja template (line {error.lineno}: {error}); fix "
            "that line."
        ) from error
    return template


def tokenizer_files(
    tokenizer: Tokenizer, *, max_length: int, chat_template: str | None = None
) -> dict[str, bytes]:
    """Returns the files, by name, from which AutoTokenizer makes this tokenizer.

    Args:
        max_length: tokens in a row of training, which transformers warns of exceeding.
        chat_template: Jinja source; None keeps the one that the tokenizer has, if any.

    Raises:
        UserError: the tokenizer is a SentencePiece model that tokenizer.json cannot express.
    """
    if tokenizer.kind == "huggingface":
        files = tokenizer.files
        stated = json.loads(files.get("tokenizer_config.json", b"{}"))
        # Without it transformers 4 looks the class up by the model, which is none of its own.
        if "tokenizer_class" not in stated:
            config = {**_config(tokenizer, max_length), **stated}
            files |= _json_files({"tokenizer_config.json": config})
    else:
        content = (
            _bytes_json(tokenizer) if tokenizer.kind == "bytes" else _sentencepiece_json(tokenizer)
        )
        config = _config(tokenizer, max_length)
        special = {
            name: config[name]
            for name in config
            if name in ("mask_token", "eos_token", "bos_token", "pad_token")
        }
        files = _json_files(
            {
                "tokenizer.json": content,
                "tokenizer_config.json": config,
                "special_tokens_map.json": special,
            }
        )
        if tokenizer.kind == "sentencepiece":
            _check_same_ids(tokenizer, files["tokenizer.json"])
        if chat_template is None and CHAT_TEMPLATE in tokenizer.files:
            chat_template = tokenizer.files[CHAT_TEMPLATE].decode()
    if chat_template is not None:
        config = json.loads(files["tokenizer_config.json"])
        files |= _json_files({"tokenizer_config.json": {**config, "chat_template": chat_template}})
        # Newer versions of transformers would read these instead of the key.
        files.pop("chat_template.jinja", None)
        files.pop("chat_template.json", None)
    return files


def _json_files(contents: dict[str, dict]) -> dict[str, bytes]:
    return {
        name: (json.dumps(c, indent=2, ensure_ascii=False) + "\n").encode()
        for name, c in contents.items()
    }


def _config(tokenizer: Tokenizer, max_length: int) -> dict:
    """Returns tokenizer_config.json."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        # without the end-of-text token that stands for a missing BOS, see chat_template.names_of
        **{
            f"{what}_token": token
            for what, token in tokenizer.special_tokens.items()
            if what != "bos" or tokenizer.bos_id != tokenizer.eos_id
        },
        # The default of older versions removes the space in " .".
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": max_length,
        # masks to be denoised come after the prompt
        "padding_side": "left",
    }


def _tokenizer_json(
    *,
    model: dict,
    decoders: list,
    special: dict[int, str],
    normalizers=(),
    pre_tokenizer=None,
    added=(),
):
    """Returns tokenizer.json.

    Args:
        special: {id: how it is written}; never found in a text.
        added: (id, how it is written) of tokens that are found in texts.
    """
    tokens = {
        **{i: (content, True) for i, content in special.items()},
        **{i: (content, False) for i, content in added},
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": i,
                "content": content,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": is_special,
            }
            for i, (content, is_special) in sorted(tokens.items())
        ],
        "normalizer": {"type": "Sequence", "normalizers": list(normalizers)}
        if normalizers
        else None,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": model,
    }


def _special(tokenizer: Tokenizer) -> dict[int, str]:
    ids = {
        "mask": tokenizer.mask_id,
        "eos": tokenizer.eos_id,
        "bos": tokenizer.bos_id,
        "pad": tokenizer.pad_id,
    }
    return {i: tokenizer.special_tokens[what] for what, i in ids.items()}


# ---- bytes


def byte_alphabet() -> list[str]:
    """Returns the character that stands for each byte in byte-level vocabularies (GPT-2): printable
    ones for themselves, the others from U+0100 on.
    """
    printable = {
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    }
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


BYTE_LEVEL = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": False,
    "use_regex": False,
}


def _bytes_json(tokenizer: Tokenizer) -> dict:
    """A byte-level BPE without merges."""
    vocab = {character: byte for byte, character in enumerate(byte_alphabet())}
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "vocab": vocab,
        "merges": [],
    }
    return _tokenizer_json(
        model=model, decoders=[BYTE_LEVEL], special=_special(tokenizer), pre_tokenizer=BYTE_LEVEL
    )


# ---- SentencePiece


def _sentencepiece_json(tokenizer: Tokenizer) -> dict:
    protobuf = require("sentencepiece.sentencepiece_model_pb2")
    model = protobuf.ModelProto.FromString(tokenizer.files["sentencepiece.model"])
    trainer = model.trainer_spec
    if (
        trainer.model_type not in (trainer.UNIGRAM, trainer.BPE)
        or trainer.treat_whitespace_as_suffix
    ):
        raise UserError(
            "A SentencePiece model of words or characters, or with treat_whitespace_as_suffix, "
            "cannot be written as a tokenizer.json; train on data prepared with a unigram or bpe "
            "model, such as --tokenizer spm:8000."
        )
    pieces = Pieces(model)
    special = {**dict.fromkeys(pieces.control), **_special(tokenizer)}
    parts: dict[str, Any] = {
        "special": {i: content or pieces.names[i] for i, content in special.items()},
        "normalizers": _normalizers(
            model, is_mark_a_space=tokenizer.decode(tokenizer.encode(SPACE_MARK)) != SPACE_MARK
        ),
    }
    unknown = {
        "type": "Replace",
        "pattern": {"String": pieces.names[pieces.unknown]},
        "content": "\ufffd",
    }
    strip = (
        [{"type": "Strip", "content": " ", "start": 1, "stop": 0}]
        if model.normalizer_spec.add_dummy_prefix
        else []
    )
    if trainer.model_type == trainer.UNIGRAM and pieces.bytes:
        return _tokenizer_json(
            model=_unigram_of_bytes(pieces),
            pre_tokenizer=BYTE_LEVEL,
            **parts,
            decoders=[
                unknown,
                {"type": "ByteFallback"},
                BYTE_LEVEL,
                *([{"type": "Fuse"}, *strip] if strip else []),
            ],
        )
    decoders = [unknown, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]
    if trainer.model_type == trainer.UNIGRAM:
        return _tokenizer_json(model=_unigram_of_characters(pieces), decoders=decoders, **parts)
    # A user-defined symbol of one character is never merged anyway; longer ones must be found
    # before BPE begins.
    added = [(i, pieces.names[i]) for i in pieces.user_defined if len(pieces.names[i]) > 1]
    return _tokenizer_json(model=_bpe(pieces), decoders=decoders, added=added, **parts)


class Pieces:
    """The vocabulary of a SentencePiece model, by the kind of piece.

    names: how piece i is written, its text with real spaces, or such as <s> and <0x41>. scores:
    floats. normal, user_defined, control: lists of ids. bytes: {id: byte}. unknown: an id.
    """

    def __init__(self, model):
        kind = type(model.pieces[0])
        of_kind = lambda wanted: [i for i, piece in enumerate(model.pieces) if piece.type == wanted]  # noqa: E731
        self.normal, self.user_defined, self.control = map(
            of_kind, (kind.NORMAL, kind.USER_DEFINED, kind.CONTROL)
        )
        self.bytes = {i: int(model.pieces[i].piece[3:-1], 16) for i in of_kind(kind.BYTE)}
        (self.unknown,) = of_kind(kind.UNKNOWN)
        is_text = {*self.normal, *self.user_defined}
        self.names = [
            p.piece.replace(SPACE_MARK, " ") if i in is_text else p.piece
            for i, p in enumerate(model.pieces)
        ]
        self.scores = [piece.score for piece in model.pieces]
        top = max((self.scores[i] for i in self.normal), default=0.0)
        # The score that SentencePiece's search gives them.
        for i in self.user_defined:
            self.scores[i] = len(model.pieces[i].piece.encode()) * top - 0.1


def _normalizers(model, *, is_mark_a_space: bool) -> list[dict]:
    """Returns what SentencePiece does to a text first, in its order."""
    spec = model.normalizer_spec
    steps: list[dict[str, Any]] = []
    if spec.precompiled_charsmap:
        steps.append(
            {
                "type": "Precompiled",
                "precompiled_charsmap": base64.b64encode(spec.precompiled_charsmap).decode(),
            }
        )
    if spec.remove_extra_whitespaces:
        steps.append({"type": "Replace", "pattern": {"Regex": r"\A +| +\z"}, "content": ""})
        steps.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
    if spec.add_dummy_prefix:
        steps.append({"type": "Prepend", "prepend": " "})
    if is_mark_a_space:
        steps.append({"type": "Replace", "pattern": {"String": SPACE_MARK}, "content": " "})
    return steps


def _unigram_of_bytes(pieces: Pieces) -> dict:
    alphabet = byte_alphabet()
    vocab = [[name, NEVER] for name in pieces.names]
    for i in (*pieces.normal, *pieces.user_defined):
        vocab[i] = ["".join(alphabet[byte] for byte in pieces.names[i].encode()), pieces.scores[i]]
    taken = {name for name, _ in vocab}
    for i, byte in pieces.bytes.items():
        # The byte of a character that is a piece is never needed, and keeps its name, <0x41>: two
        # entries of one name would be one token.
        if alphabet[byte] not in taken:
            vocab[i] = [alphabet[byte], BYTE_SCORE]
    return {"type": "Unigram", "unk_id": None, "vocab": vocab, "byte_fallback": False}


def _unigram_of_characters(pieces: Pieces) -> dict:
    """Without byte pieces. Where each character of a piece is a piece, the score of an unknown
    character, which follows from the lowest of all, decides nothing, and NEVER may be that lowest.
    """
    normal = {pieces.names[i] for i in pieces.normal}
    is_closed = all(character in normal for name in normal for character in name)
    lowest = NEVER if is_closed else min(pieces.scores[i] for i in pieces.normal)
    vocab = [[name, lowest] for name in pieces.names]
    for i in (*pieces.normal, *pieces.user_defined):
        vocab[i][1] = pieces.scores[i]
    return {"type": "Unigram", "unk_id": pieces.unknown, "vocab": vocab, "byte_fallback": False}


def _bpe(pieces: Pieces) -> dict:
    vocab = {name: i for i, name in enumerate(pieces.names)}
    normal = {pieces.names[i]: pieces.scores[i] for i in pieces.normal}
    merges = [
        (-score, vocab[name[:cut]], vocab[name[cut:]])
        for name, score in normal.items()
        for cut in range(1, len(name))
        if name[:cut] in normal and name[cut:] in normal
    ]
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": pieces.names[pieces.unknown],
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": bool(pieces.bytes),
        "ignore_merges": False,
        "vocab": vocab,
        "merges": [[pieces.names[left], pieces.names[right]] for _, left, right in sorted(merges)],
    }


def _check_same_ids(tokenizer: Tokenizer, content: bytes) -> None:
    """Raises UserError when the converted tokenizer reads a probe, or the text of a piece,
    differently from the original.

    The two libraries implement the same algorithms in their own ways, and a model may have been
    trained with options that one of them ignores. So the result is compared, and not trusted.
    """
    tokenizers = require("tokenizers", extra="hf")
    converted = tokenizers.Tokenizer.from_str(content.decode())
    # As here: "<s>" in a text is three characters.
    converted.encode_special_tokens = True
    texts = [*PROBES, *filter(None, (tokenizer.decode([i]) for i in range(tokenizer.vocab_size)))]
    theirs = [
        encoding.ids for encoding in converted.encode_batch_fast(texts, add_special_tokens=False)
    ]
    for text, wanted, found in zip(texts, tokenizer.encode_batch(texts), theirs):
        if wanted != found:
            raise UserError(
                f"This SentencePiece model cannot be written as a tokenizer.json: {text!r} would "
                f"be the ids {found[:8]} and not {wanted[:8]}; train on data prepared with "
                "--tokenizer spm:N or a Hugging Face tokenizer."
            )

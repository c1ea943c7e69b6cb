"""The kinds of tokenizer: raw bytes, a SentencePiece model, a Hugging Face tokenizer.json, and ids
whose texts are not known.

Each knows its own ids and nothing of mask, eos, bos and pad, which llada_jax.data.tokenizer owns. A
library is imported only when a tokenizer of its kind is made.
"""

import json
import re
from typing import Protocol

import numpy as np

from llada_jax.errors import UserError, one_line, require
from llada_jax.schemas import TokenizerJson, check, parse_json


class Codec(Protocol):
    """What differs between the kinds of tokenizer.

    Attributes:
        kind: the name under which a saved tokenizer is found again.
        num_ids: its own ids are 0..num_ids-1; special ids that are appended come after them.
        files: {name: content} of what decides text -> ids, and hence the fingerprint.
        companions: {name: content} of what else is saved, instead of a file of that name or
            next to it.
    """

    kind: str
    num_ids: int
    files: dict[str, bytes]
    companions: dict[str, bytes]

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """Returns the int32 ids of each text."""

    def decode(self, ids: list[int]) -> str:
        """Returns the text of ids below num_ids, none of them special."""

    def piece(self, i: int) -> str:
        """Returns how the token is written."""

    def id_of(self, piece: str) -> int | None:
        """Returns the id of a token by how it is written; None when there is no such token."""

    def markers(self) -> dict[str, int]:
        """Returns the ids of the special tokens, which `encode` never gives, by their spelling."""


class Bytes:
    """The bytes of UTF-8 as ids 0..255, without any library."""

    kind = "bytes"
    num_ids = 256
    files = {}
    companions = {}

    def piece(self, i):
        # Asked for special ids only, which lie beyond the bytes unless a saved file is damaged.
        raise KeyError(f"byte {i} cannot be a special token")

    def id_of(self, piece):
        return None

    def encode(self, texts):
        return [np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int32) for text in texts]

    def decode(self, ids):
        return bytes(ids).decode(errors="replace")

    def markers(self):
        return {}


class NoText:
    """Ids without texts: what is known of weights that came without a tokenizer."""

    kind = "none"
    file = "vocabulary.json"
    companions = {}

    def __init__(self, num_ids: int):
        self.num_ids = num_ids
        self.files = {self.file: (json.dumps({"num_ids": num_ids}) + "\n").encode()}

    @classmethod
    def from_file(cls, content: bytes) -> "NoText":
        """Returns what was saved; KeyError, ValueError or TypeError where it is damaged."""
        return cls(int(json.loads(content)["num_ids"]))

    def piece(self, i):
        return ""

    def id_of(self, piece):
        return None

    def encode(self, texts):
        raise UserError(
            "This checkpoint has no tokenizer, and text needs one; name it with --tokenizer, or "
            "with load(..., tokenizer=...)."
        )

    def decode(self, ids):
        self.encode([])

    def markers(self):
        return {}


# SentencePiece writes a space as this character, and hence reads this character as a space.
SPACE_MARK = "\u2581"

# Lines are encoded in groups of about this many characters: SentencePiece's BPE slows down with the
# length of its input (measured: 1.8 MB/s on one 4 MB document, 5.5 MB/s in groups), and memory
# stays small for a document of any length.
SEGMENT_CHARS = 1000


class SentencePiece:
    """A SentencePiece model, unigram or BPE."""

    kind = "sentencepiece"
    file = "sentencepiece.model"
    companions = {}

    def __init__(self, model: bytes, *, name: str):
        sentencepiece = require("sentencepiece")
        self.files = {self.file: model}
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            # The constructor takes an empty model for none, and leaves the processor without one.
            self._processor.load_from_serialized_proto(model)
            self.num_ids = self._processor.get_piece_size()
            self._pieces = self._processor.id_to_piece(list(range(self.num_ids)))
        # Of a model that is damaged, a piece may not be text.
        except (RuntimeError, UnicodeDecodeError) as error:
            raise UserError(
                f"{name} is not a SentencePiece model ({one_line(str(error))}); give another file."
            ) from error
        self._text = [self._text_of(i) for i in range(self.num_ids)]
        # Both must exist before the first use of `decode` and `encode`, which decide them.
        self._starts_with_space = False
        self._segments = None
        # Whatever the model makes of the letter, which it may not know, a space before it is added.
        self._starts_with_space = self.decode(self._plain(["a"])[0]).startswith(" ")
        self._mark_ids = [
            self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()
        ]
        is_cut_at_lines = not any("\n" in piece and piece != "\n" for piece in self._pieces)
        if is_cut_at_lines and not self._starts_with_space and self._is_lossless():
            # No piece crosses a line feed, so encoding group by group gives the ids of the whole. A
            # literal mark in a text is a segment of its own that is spelled in bytes, because the
            # model would read it as a space.
            self._segments = re.compile(
                f"{SPACE_MARK}|[^{SPACE_MARK}]{{1,{SEGMENT_CHARS}}}[^\n{SPACE_MARK}]*\n?",
                flags=re.DOTALL,
            )

    def _text_of(self, i: int) -> bytes:
        """Returns the bytes that piece i stands for; several pieces may form one character."""
        if self._processor.is_byte(i):
            return bytes([int(self._pieces[i][3:-1], 16)])
        if self._processor.is_control(i):
            return b""
        if self._processor.is_unknown(i):
            return "\ufffd".encode()
        return self._pieces[i].replace(SPACE_MARK, " ").encode()

    def _is_lossless(self) -> bool:
        """Whether the model neither adds, drops nor normalises characters, and has byte pieces for
        those that it does not know.
        """
        probe = " a  b\n\n\tc\r\n ﬁ e\u0301 \u2603 \U0001f600 "
        return self.decode(self._plain([probe])[0]) == probe

    def _plain(self, texts):
        # One thread, because prepare runs a process per core.
        return self._processor.encode(texts, num_threads=1)

    def encode(self, texts):
        if self._segments is None:
            return [np.array(ids, dtype=np.int32) for ids in self._plain(texts)]
        segments_of_texts = [self._segments.findall(text) for text in texts]
        flat = [segment for segments in segments_of_texts for segment in segments]
        encoded = iter(zip(flat, self._plain(flat)))
        arrays = []
        for segments in segments_of_texts:
            ids = []
            for _ in segments:
                segment, segment_ids = next(encoded)
                ids += self._mark_ids if segment == SPACE_MARK else segment_ids
            arrays.append(np.array(ids, dtype=np.int32))
        return arrays

    def decode(self, ids):
        text = b"".join(self._text[i] for i in ids).decode(errors="replace")
        return text.removeprefix(" ") if self._starts_with_space else text

    def piece(self, i):
        return self._pieces[i]

    def id_of(self, piece):
        return self._pieces.index(piece) if piece in self._pieces else None

    def markers(self):
        control = filter(self._processor.is_control, range(self.num_ids))
        return {self._pieces[i]: i for i in control}

    def declared(self):
        """Returns {"eos": piece, ...} for the special tokens that the model itself names; its id is
        -1 where it has none.
        """
        sp = self._processor
        ids = {"eos": sp.eos_id(), "bos": sp.bos_id(), "pad": sp.pad_id()}
        return {what: self._pieces[i] for what, i in ids.items() if i >= 0}

    def append(self, what, token, new_id):
        """Does nothing: the model never emits an id after its last piece."""


class HuggingFace:
    """A tokenizer.json, read with the tokenizers library."""

    kind = "huggingface"
    file = "tokenizer.json"

    def __init__(self, content: bytes, *, name: str, companions: dict[str, bytes]):
        self._name = name
        # tokenizer.json is saved as it was given, while `files` holds the form that is used.
        self.companions = {self.file: content, **companions}
        require("tokenizers", extra="hf")
        self._json = parse_json(content, file=f"{name}/{self.file}")
        check(self._json, TokenizerJson, file=f"{name}/{self.file}")
        # Some published files cut the text at 128 tokens.
        self._json["truncation"] = self._json["padding"] = None
        self._build()

    def _build(self):
        # Serialized here and not by the library, so that the fingerprint does not change with the
        # library's version.
        content = json.dumps(self._json, ensure_ascii=False, indent=1)
        self.files = {self.file: content.encode()}
        tokenizers = require("tokenizers", extra="hf")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(content)
        except Exception as error:
            # The library raises nothing more specific.
            raise UserError(
                f"{self._name}: tokenizer.json cannot be used ({error}); fetch it again."
            ) from error
        # Reads "<s>" in a text as three characters and not as the special token.
        self._tokenizer.encode_special_tokens = True
        ids = self._tokenizer.get_vocab(with_added_tokens=True).values()
        if not ids:
            raise UserError(f"{self._name}: tokenizer.json has no tokens; fetch it again.")
        self.num_ids = 1 + max(ids)

    def encode(self, texts):
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]

    def decode(self, ids):
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def piece(self, i):
        return self._tokenizer.id_to_token(int(i)) or ""

    def id_of(self, piece):
        return self._tokenizer.token_to_id(piece)

    def markers(self):
        tokens = self._json.get("added_tokens") or ()
        return {token["content"]: token["id"] for token in tokens if token.get("special")}

    def append(self, what, token, new_id):
        """Adds a special token after the last id; `what` is "mask" or "eos"."""
        self._json.setdefault("added_tokens", []).append(
            {
                "id": new_id,
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
        )
        self._build()
        # From here on, the file in `files` is what is saved.
        self.companions.pop(self.file, None)
        if "tokenizer_config.json" in self.companions:
            config = {
                **json.loads(self.companions["tokenizer_config.json"]),
                f"{what}_token": token,
            }
            self.companions["tokenizer_config.json"] = (
                json.dumps(config, indent=2, ensure_ascii=False) + "\n"
            ).encode()
        if self.id_of(token) != new_id:
            raise UserError(
                f"{self._name}: a {what} token cannot be appended as id {new_id}, because the ids "
                "of tokenizer.json have gaps; add the token with the tokenizers library and give "
                "that file."
            )

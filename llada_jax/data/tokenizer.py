"""Text <-> token ids, and the only owner of the special ids mask, eos, bos and pad.

Three kinds: a SentencePiece model (trained here or given), a Hugging Face tokenizer.json, raw
bytes. A library is imported only when a tokenizer of its kind is made.
"""

import hashlib
import io
import json
import os
import re
from collections.abc import Iterable

import numpy as np
from etils import epath

from llada_jax.errors import UserError, require

SPECIAL_IDS = "special_ids.json"  # beside the model's own file in a saved directory

# What may lie beside a tokenizer.json and tells transformers how to use it: kept with the
# tokenizer, never read for ids.
COMPANIONS = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
)

# How published tokenizers call their special tokens, the likeliest first. Consulted after what the
# tokenizer declares.
SPECIAL_NAMES = {
    "mask": ("<mask>", "[MASK]", "<|mdm_mask|>", "<|mask|>", "<[MASK]>", "<|mask_token|>"),
    "eos": (
        "</s>",
        "<|endoftext|>",
        "<|end_of_text|>",
        "<eos>",
        "<｜end▁of▁sentence｜>",
        "[EOS]",
        "[SEP]",
    ),
    "bos": (
        "<s>",
        "<|startoftext|>",
        "<|begin_of_text|>",
        "<bos>",
        "<｜begin▁of▁sentence｜>",
        "[BOS]",
        "[CLS]",
    ),
    "pad": ("<pad>", "[PAD]", "<|pad|>", "<|padding|>"),
}


class Tokenizer:
    """One tokenizer with its special ids. Made by `load_tokenizer` or `train_sentencepiece`.

    Attributes:
        kind: "sentencepiece", "huggingface" or "bytes".
        vocab_size: rows of the embedding, every special id included.
        mask_id, eos_id, bos_id, pad_id: ints below vocab_size; bos and pad are eos where the model
            has none of its own, as in the published LLaDA.
        fingerprint: hex digest of all that decides text -> ids and the special ids.
    """

    def __init__(self, codec, special_ids: dict[str, int]):
        self.kind = codec.kind
        self.vocab_size = max(codec.num_ids, *(i + 1 for i in special_ids.values()))
        self.mask_id = special_ids["mask"]
        self.eos_id = special_ids["eos"]
        self.bos_id = special_ids.get("bos", self.eos_id)
        self.pad_id = special_ids.get("pad", self.eos_id)
        self._codec = codec
        self._is_special_V = np.zeros(self.vocab_size, dtype=bool)
        self._is_special_V[[self.mask_id, self.eos_id, self.bos_id, self.pad_id]] = True
        written = [codec.piece(i) for i in np.flatnonzero(self._is_special_V) if i < codec.num_ids]
        # Matches the place after the first letter of every special token that is spelled out in a
        # text.
        cuts = [
            f"(?<={re.escape(piece[0])})(?={re.escape(piece[1:])})"
            for piece in written
            if len(piece) > 1
        ]
        self._inside_special = re.compile("|".join(cuts) or "(?!)")
        self.fingerprint = _digest({SPECIAL_IDS: self._meta(), **codec.files})

    def __repr__(self) -> str:
        return f"Tokenizer({self.kind}, {self.vocab_size} ids, fingerprint {self.fingerprint[:12]})"

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text, none of them special: "<mask>" in a text is six ordinary
        characters.
        """
        return self.encode_arrays([text])[0].tolist()

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """The same for many texts at once, which is faster where the library batches."""
        return [ids.tolist() for ids in self.encode_arrays(texts)]

    def encode_arrays(self, texts: list[str]) -> list[np.ndarray]:
        """The same as int32 arrays."""
        arrays = self._codec.encode(texts)
        for i, ids in enumerate(arrays):
            if self._is_special_V[
                ids
            ].any():  # the library took a spelled-out special token for the real one
                arrays[i] = np.concatenate(self._codec.encode(self._inside_special.split(texts[i])))
        return arrays

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of ids; special ids, and rows of the embedding beyond the vocabulary,
        stand for no text.
        """
        ids = np.asarray(list(ids) if not isinstance(ids, np.ndarray) else ids, dtype=np.int64)
        ids = ids[(ids >= 0) & (ids < self._codec.num_ids)]
        return self._codec.decode(ids[~self._is_special_V[ids]].tolist())

    def id_of(self, token: str) -> int | None:
        """Returns the id of a token as the tokenizer writes it, such as "<|eot_id|>"; None when it
        has no such token.
        """
        return self._codec.id_of(token)

    @property
    def files(self) -> dict[str, bytes]:
        """The tokenizer's own files by name, as they were given: the SentencePiece model, or
        tokenizer.json with what lay beside it; none for bytes.
        """
        return {**self._codec.files, **self._codec.beside}

    @property
    def special_tokens(self) -> dict[str, str]:
        """How "mask", "eos", "bos" and "pad" are written; the usual name where the model itself has
        none.
        """
        ids = {"mask": self.mask_id, "eos": self.eos_id, "bos": self.bos_id, "pad": self.pad_id}
        ours = {i: SPECIAL_NAMES[what][0] for what, i in reversed(ids.items())}
        return {
            what: self._codec.piece(i) if i < self._codec.num_ids else ours[i]
            for what, i in ids.items()
        }

    def save(self, directory) -> None:
        """Writes the directory that `load_tokenizer` reads."""
        directory = epath.Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in self.files.items():
            (directory / name).write_bytes(content)
        (directory / SPECIAL_IDS).write_bytes(self._meta())

    def _meta(self) -> bytes:
        ids = {"mask": self.mask_id, "eos": self.eos_id, "bos": self.bos_id, "pad": self.pad_id}
        return (json.dumps({"kind": self.kind, "special_ids": ids}, indent=2) + "\n").encode()


def load_tokenizer(path, *, add_mask_token: bool = False, mask_token: str = "") -> Tokenizer:
    """Loads "bytes", a directory written by `Tokenizer.save`, a SentencePiece .model or a folder
    with tokenizer.json.

    In a folder with a checkpoint, the special ids of its config.json count: the model was trained
    with them.

    Args:
        path: what to load; local or any URL that epath reads.
        add_mask_token: gives a tokenizer that lacks them a mask id, and an end-of-text id, after
            its last id.
        mask_token: a token of it that is to be the mask; "" leaves that to what it declares and to
            the usual names.

    Raises:
        UserError: nothing there, an unreadable model, or no mask token and add_mask_token is False.
    """
    if os.fspath(path) == "bytes":
        return _bytes_tokenizer()
    path = epath.Path(path)
    if (path / SPECIAL_IDS).exists():
        return _load_saved(path)
    if path.name.endswith(".model") and path.is_file():
        codec = _SentencePiece(path.read_bytes(), name=str(path))
        declared, stated = codec.declared(), {}
    elif (path / "tokenizer.json").exists():
        codec = _HuggingFace(
            (path / "tokenizer.json").read_bytes(), name=str(path), companions=_companions(path)
        )
        declared, stated = (
            _declared_in_config(path),
            _stated_in_model_config(path, num_ids=codec.num_ids),
        )
    else:
        raise UserError(
            f"There is no tokenizer at {str(path)!r}: give 'bytes', a SentencePiece .model file, a "
            "folder with a "
            "tokenizer.json, or the tokenizer folder of a prepared data set."
        )
    if mask_token:
        stated["mask"] = codec.id_of(mask_token)
        if stated["mask"] is None:
            raise UserError(
                f"Tokenizer {str(path)!r} has no token {mask_token!r} that could be the mask; name "
                "another."
            )
    return _with_special_ids(codec, declared, stated, name=str(path), add_mask_token=add_mask_token)


def load_same(directory, fingerprint: str, *, of: str) -> Tokenizer:
    """Returns the tokenizer in a directory, which must be the one that something was made with.

    Args:
        of: what was made with it, such as "the records", for the error.

    Raises:
        UserError: it is another one, or cannot be read.
    """
    tokenizer = load_tokenizer(directory)
    if tokenizer.fingerprint != fingerprint:
        raise UserError(
            f"{directory} ({tokenizer.fingerprint[:12]}) is not the tokenizer of {of} "
            f"({fingerprint[:12]}); put that one "
            "back, or use a new directory."
        )
    return tokenizer


def _load_saved(path) -> Tokenizer:
    try:
        meta = json.loads((path / SPECIAL_IDS).read_text())
        kind, special_ids = meta["kind"], meta["special_ids"]
        if kind == "bytes":
            return Tokenizer(_Bytes(), special_ids)
        if kind == "huggingface":
            content = (path / _HuggingFace.file).read_bytes()
            return Tokenizer(
                _HuggingFace(content, name=str(path), companions=_companions(path)), special_ids
            )
        codec = {"sentencepiece": _SentencePiece}[kind]
        return Tokenizer(codec((path / codec.file).read_bytes(), name=str(path)), special_ids)
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError, OSError) as error:
        raise UserError(
            f"The tokenizer at {str(path)!r} is damaged ({type(error).__name__}: {error}); restore "
            "the folder or "
            "prepare the data again."
        ) from error


def _with_special_ids(
    codec, declared: dict[str, str], stated: dict[str, int], *, name: str, add_mask_token: bool
) -> Tokenizer:
    """Takes the ids that are stated, then finds special tokens by the names the model declares,
    then by the usual ones, and appends what is missing.
    """
    special_ids = dict(stated)
    for what, usual in SPECIAL_NAMES.items():
        if what in special_ids:
            continue
        names = [declared[what], *usual] if what in declared else usual
        known = [i for i in map(codec.id_of, names) if i is not None]
        if known:
            special_ids[what] = known[0]
    missing = [what for what in ("mask", "eos") if what not in special_ids]
    if missing and not add_mask_token:
        tokens = " and ".join(
            {"mask": "mask token", "eos": "end-of-text token"}[what] for what in missing
        )
        raise UserError(
            f"Tokenizer {name!r} has no {tokens}, which masked diffusion needs: pass "
            "--add-mask-token to append what "
            f"is missing after its {codec.num_ids} ids."
        )
    for new_id, what in enumerate(missing, start=codec.num_ids):
        codec.append(what, new_id)
        special_ids[what] = new_id
    return Tokenizer(codec, special_ids)


def _companions(folder) -> dict[str, bytes]:
    """Returns the COMPANIONS that lie in a folder."""
    return {name: (folder / name).read_bytes() for name in COMPANIONS if (folder / name).exists()}


def _declared_in_config(folder) -> dict[str, str]:
    """Returns {"mask": "<mask>", ...} as far as tokenizer_config.json beside a tokenizer.json
    declares them.
    """
    file = folder / "tokenizer_config.json"
    if not file.exists():
        return {}
    try:
        declared = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"{file} is not valid JSON ({error}); mend it or remove it.") from error
    names = {what: declared.get(f"{what}_token") for what in SPECIAL_NAMES}
    names = {
        what: name["content"] if isinstance(name, dict) else name for what, name in names.items()
    }
    return {what: name for what, name in names.items() if name}


def _stated_in_model_config(folder, *, num_ids: int) -> dict[str, int]:
    """Returns {"mask": 126336, ...} as far as the config.json of a checkpoint beside a
    tokenizer.json states ids of it.
    """
    file = folder / "config.json"
    if not file.exists():
        return {}
    try:
        config = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"{file} is not valid JSON ({error}); mend it or remove it.") from error
    ids = {what: config.get(f"{what}_token_id") for what in SPECIAL_NAMES}
    ids = {
        what: i[0] if isinstance(i, list) and i else i for what, i in ids.items()
    }  # the first of several ends a text
    return {what: i for what, i in ids.items() if type(i) is int and 0 <= i < num_ids}


def _digest(files: dict[str, bytes]) -> str:
    digest = hashlib.sha256()
    for name in sorted(files):
        digest.update(f"{name} {len(files[name])}\n".encode() + files[name])
    return digest.hexdigest()


# A codec is what differs between the kinds: `kind`, `num_ids` (its own ids are 0..num_ids-1),
# `files` (name -> content of what decides text -> ids), `beside` (what else is saved, in their
# place or beside them), encode(texts) -> int32 arrays, decode(ordinary ids) -> text, piece(id) ->
# how a token is written, id_of(piece) -> its id or None, append(what, new_id) makes room for a
# special token after the last id.


class _Bytes:
    kind = "bytes"
    num_ids = 256
    files = {}
    beside = {}

    def id_of(self, piece):
        return None

    def encode(self, texts):
        return [np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int32) for text in texts]

    def decode(self, ids):
        return bytes(ids).decode(errors="replace")


def _bytes_tokenizer() -> Tokenizer:
    return Tokenizer(_Bytes(), {"mask": 256, "eos": 257, "bos": 258, "pad": 259})


# SentencePiece writes a space as this character, and hence reads this character as a space
SPACE_MARK = "\u2581"

# Lines are encoded in groups of about this many characters: SentencePiece's BPE slows down with the
# length of its input (measured: 1.8 MB/s on one 4 MB document, 5.5 MB/s in groups), and memory
# stays small for a document of any length.
SEGMENT_CHARS = 1000


class _SentencePiece:
    kind = "sentencepiece"
    file = "sentencepiece.model"
    beside = {}

    def __init__(self, model: bytes, *, name: str):
        sentencepiece = require("sentencepiece")
        self.files = {self.file: model}
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise UserError(
                f"{name} is no SentencePiece model ({error}); give another file."
            ) from error
        self.num_ids = self._processor.get_piece_size()
        self._pieces = self._processor.id_to_piece(list(range(self.num_ids)))
        self._text = [self._text_of(i) for i in range(self.num_ids)]
        self._starts_with_space = False
        self._segments = None
        self._starts_with_space = self.decode(self._plain(["a"])[0]) == " a"
        self._mark_ids = [
            self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()
        ]
        is_cut_at_lines = not any("\n" in piece and piece != "\n" for piece in self._pieces)
        if is_cut_at_lines and not self._starts_with_space and self._is_lossless():
            # No piece crosses a line feed, so encoding group by group gives the ids of the whole. A
            # literal mark is a segment of its own, spelled in bytes.
            self._segments = re.compile(
                f"{SPACE_MARK}|[^{SPACE_MARK}]{{1,{SEGMENT_CHARS}}}[^\n{SPACE_MARK}]*\n?",
                flags=re.DOTALL,
            )

    def _text_of(self, i: int) -> bytes:
        """The bytes that piece i stands for; pieces that are joined may form one character."""
        if self._processor.is_byte(i):
            return bytes([int(self._pieces[i][3:-1], 16)])
        if self._processor.is_control(i):
            return b""
        if self._processor.is_unknown(i):
            return "\ufffd".encode()
        return self._pieces[i].replace(SPACE_MARK, " ").encode()

    def _is_lossless(self) -> bool:
        """True when the model neither adds, drops nor normalises characters, and has byte pieces
        for the unknown.
        """
        probe = " a  b\n\n\tc\r\n ﬁ e\u0301 \u2603 \U0001f600 "
        return self.decode(self._plain([probe])[0]) == probe

    def _plain(self, texts):
        # One thread: prepare runs a process per core.
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

    def declared(self):
        """Returns the pieces of the special tokens that the model itself names (its id is -1 where
        it has none).
        """
        sp = self._processor
        ids = {"eos": sp.eos_id(), "bos": sp.bos_id(), "pad": sp.pad_id()}
        return {what: self._pieces[i] for what, i in ids.items() if i >= 0}

    def append(self, what, new_id):
        """Nothing to do: the model never emits an id after its last piece."""


class _HuggingFace:
    kind = "huggingface"
    file = "tokenizer.json"

    def __init__(self, content: bytes, *, name: str, companions: dict[str, bytes]):
        self._name = name
        self.beside = {self.file: content, **companions}  # tokenizer.json is saved as it was given
        try:
            self._json = json.loads(content)
        except ValueError as error:
            raise UserError(
                f"{name}: tokenizer.json is not valid JSON ({error}); fetch it again."
            ) from error
        self._json["truncation"] = self._json["padding"] = (
            None  # some published files cut the text at 128 tokens
        )
        self._build()

    def _build(self):
        # Written by us, not by the library, so that the fingerprint does not move with the
        # library's version.
        content = json.dumps(self._json, ensure_ascii=False, indent=1)
        self.files = {self.file: content.encode()}
        tokenizers = require("tokenizers", extra="hf")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(content)
        except Exception as error:  # the library raises nothing more precise
            raise UserError(
                f"{self._name}: tokenizer.json cannot be used ({error}); fetch it again."
            ) from error
        self._tokenizer.encode_special_tokens = True  # read "<s>" in a text as three characters
        self.num_ids = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())

    def encode(self, texts):
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]

    def decode(self, ids):
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def piece(self, i):
        return self._tokenizer.id_to_token(int(i)) or ""

    def id_of(self, piece):
        return self._tokenizer.token_to_id(piece)

    def append(self, what, new_id):
        name = SPECIAL_NAMES[what][0]
        self._json.setdefault("added_tokens", []).append(
            {
                "id": new_id,
                "content": name,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
        )
        self._build()
        self.beside.pop(self.file, None)  # from here on tokenizer.json is the one that we wrote
        if "tokenizer_config.json" in self.beside:
            config = {**json.loads(self.beside["tokenizer_config.json"]), f"{what}_token": name}
            self.beside["tokenizer_config.json"] = (
                json.dumps(config, indent=2, ensure_ascii=False) + "\n"
            ).encode()
        if self.id_of(name) != new_id:
            raise UserError(
                f"{self._name}: a {what} token cannot be appended as id {new_id}, because the ids "
                "of tokenizer.json "
                "have gaps; add the token with the tokenizers library and give that file."
            )


# A line longer than this many characters is cut for training: 4 bytes a character stay below
# MAX_SENTENCE_BYTES.
MAX_LINE_CHARS = 4_000
MAX_SENTENCE_BYTES = 4 * MAX_LINE_CHARS + 4


def train_sentencepiece(texts: Iterable[str], *, vocab_size: int, model_type: str) -> Tokenizer:
    """Trains a lossless SentencePiece model on texts; the same texts give the same bytes on any
    machine.

    Ids: 0 unknown (never produced), 1 bos, 2 eos, 3 pad, 4 mask, 5 line feed, 6..261 the bytes,
    then pieces.

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
            control_symbols=["<mask>"],
            user_defined_symbols=["\n"],
            max_sentence_length=MAX_SENTENCE_BYTES,
            # fixed: the last digits of its sums, hence the pieces, depend on the number of threads
            num_threads=16,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _training_error(str(error), vocab_size=vocab_size, model_type=model_type) from error
    codec = _SentencePiece(_on_grid(model.getvalue()), name="trained model")
    return _with_special_ids(
        codec, codec.declared(), {}, name="trained model", add_mask_token=False
    )


def _on_grid(model: bytes) -> bytes:
    """Rounds the scores of a unigram model to multiples of 1/64, so that sums of them are exact in
    float32.

    Otherwise "===" is "==" "=" in one place and "=" "==" in another, as the last bit of the sum
    falls, and no other library, whose sums are float64, gives the same ids. The line feed becomes
    an ordinary piece, since SentencePiece takes 0.1 from the score of a user-defined one; no other
    piece holds it, so it stays alone. BPE models stay as they are.
    """
    protobuf = require("sentencepiece.sentencepiece_model_pb2")
    content = protobuf.ModelProto.FromString(model)
    if content.trainer_spec.model_type != content.trainer_spec.UNIGRAM:
        return model
    kinds = protobuf.ModelProto.SentencePiece
    normal = [piece for piece in content.pieces if piece.type == kinds.NORMAL]
    for piece in normal:
        piece.score = round(piece.score * 64) / 64
    for piece in content.pieces:
        if piece.type == kinds.USER_DEFINED:
            piece.type, piece.score = kinds.NORMAL, max(p.score for p in normal)
    return content.SerializeToString(deterministic=True)


def _lines_for_training(texts: Iterable[str]) -> Iterable[str]:
    for text in texts:
        for line in text.split("\n"):
            for i in range(0, len(line), MAX_LINE_CHARS):
                yield line[i : i + MAX_LINE_CHARS]


def _training_error(message: str, *, vocab_size: int, model_type: str) -> UserError:
    largest = re.search(r"too high .* value <= (\d+)", message)
    smallest = re.search(r"smaller than required_chars\. \d+ vs (\d+)", message)
    spec = {"unigram": "spm", "bpe": "spm-bpe"}[model_type]
    if largest:
        return UserError(
            f"A {model_type} vocabulary of {vocab_size} cannot be trained: this text yields at "
            f"most {largest[1]} "
            f"pieces; use --tokenizer {spec}:{largest[1]} or less, more text, or --tokenizer bytes."
        )
    if smallest:
        return UserError(
            f"A {model_type} vocabulary of {vocab_size} is too small: the 256 bytes, the special "
            "tokens and the "
            f"characters of this text need {smallest[1]}; use --tokenizer {spec}:{smallest[1]} or "
            "more, or bytes."
        )
    if "sentences_.empty()" in message or "all_chars_count" in message:
        return UserError(
            "A tokenizer cannot be trained on an empty corpus: give documents with text in them."
        )
    return UserError(
        f"SentencePiece could not train a {model_type} vocabulary of {vocab_size}: "
        f"{message.strip()}"
    )

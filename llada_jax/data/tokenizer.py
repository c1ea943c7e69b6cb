"""Tokenizers: text <-> token ids, their identity, and the special ids that a tokenizer has.

What differs between the kinds (raw bytes, SentencePiece, a Hugging Face tokenizer.json, ids without
texts) is in llada_jax.data.codecs.
"""

import copy
import hashlib
import json
import os
import re
from collections.abc import Iterable

import numpy as np
from etils import epath

from llada_jax.data.codecs import Bytes, Codec, HuggingFace, NoText, SentencePiece
from llada_jax.data.special_ids import (
    END_OF_TURN,
    SPECIAL_NAMES,
    WrongSpecialIds,
    check_special_ids,
    declared_in_config,
    stated_in_model_config,
)
from llada_jax.errors import UserError
from llada_jax.ranges import MAX_SIZE
from llada_jax.schemas import SavedTokenizer, fault_of
from llada_jax.storage.files import check_readable
from llada_jax.storage.remote import path_of

# Lies next to the model's own files in a saved directory, and is written last.
SPECIAL_IDS = "special_ids.json"

# Jinja source of the form in which dialogues are written.
CHAT_TEMPLATE = "chat_template.jinja"

# What may lie next to a tokenizer.json so that transformers knows how to use it: kept with the
# tokenizer, never read for ids.
COMPANIONS = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    CHAT_TEMPLATE,
    "chat_template.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
)

# Texts of which two tokenizers that are the same give the same ids.
PROBES = (
    "Hello world",
    " two  spaces   three ",
    "line\nfeed\n\n\ttab",
    "In 1813 it cost £18.50!",
    "naïve café Привет मानक 日本語 العربية",
    "\U0001f600 \U0001f469\u200d\U0001f52c",
)


class Tokenizer:
    """One tokenizer with its special ids. Made by `load_tokenizer` and `train_sentencepiece`.

    Attributes:
        kind: "sentencepiece", "huggingface" or "bytes"; "none" for the ids of weights that came
            without a tokenizer, where whatever needs text raises UserError.
        vocab_size: rows of the embedding, every special id included.
        mask_id, eos_id, bos_id, pad_id: ints below vocab_size; bos and pad are eos where the model
            has none of its own, as in the published LLaDA.
        eot_id: the id that ends a turn of a conversation; None where there is none.
        fingerprint: hex digest of all that decides text -> ids and the special ids.
    """

    def __init__(self, codec: Codec, special_ids: dict[str, int]):
        check_special_ids(special_ids)
        self.kind = codec.kind
        self.vocab_size = max(codec.num_ids, *(i + 1 for i in special_ids.values()))
        self.mask_id = special_ids["mask"]
        self.eos_id = special_ids["eos"]
        self.bos_id = special_ids.get("bos", self.eos_id)
        self.pad_id = special_ids.get("pad", self.eos_id)
        turns = [i for i in map(codec.id_of, END_OF_TURN) if i is not None]
        self._named_eot_id = turns[0] if turns else None
        self.eot_id = special_ids.get("eot", self._named_eot_id)
        self._codec = codec
        self._is_special_V = np.zeros(self.vocab_size, dtype=bool)
        self._is_special_V[[self.mask_id, self.eos_id, self.bos_id, self.pad_id]] = True
        written = [
            codec.piece(int(i)) for i in np.flatnonzero(self._is_special_V) if i < codec.num_ids
        ]
        # Matches the place after the first letter of every special token that a text spells out:
        # cut there, neither part is the token.
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
        """Returns the ids of a text, none of them special: "<mask>" in a text is six characters."""
        return self.encode_arrays([text])[0].tolist()

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Returns the ids of many texts at once, which is faster where the library batches."""
        return [ids.tolist() for ids in self.encode_arrays(texts)]

    def encode_arrays(self, texts: list[str]) -> list[np.ndarray]:
        """Returns the ids of many texts as int32 arrays.

        Raises:
            UserError: a text holds half of a surrogate pair.
        """
        try:
            arrays = self._codec.encode(texts)
        except (TypeError, UnicodeEncodeError):  # each library has its own error for it
            _check_unicode(texts)
            raise
        for i, ids in enumerate(arrays):
            # The library took a token that the text spells out for the real one; such a text is
            # encoded again in parts.
            if self._is_special_V[ids].any():
                arrays[i] = np.concatenate(self._codec.encode(self._inside_special.split(texts[i])))
                # Spelled only by what the library made of the text, such as its lower case: that
                # word is encoded letter by letter.
                if self._is_special_V[arrays[i]].any():
                    words = re.split(r"(?<=\s)", texts[i])
                    parts = self._codec.encode(words)
                    for n, word in enumerate(words):
                        if self._is_special_V[parts[n]].any():
                            parts[n] = np.concatenate(self._codec.encode(list(word)))
                    arrays[i] = np.concatenate(parts)
        return arrays

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of ids. Special ids add no text, nor do rows of the embedding beyond the
        vocabulary.
        """
        ids = np.asarray(list(ids) if not isinstance(ids, np.ndarray) else ids, dtype=np.int64)
        ids = ids[(ids >= 0) & (ids < self._codec.num_ids)]
        return self._codec.decode(ids[~self._is_special_V[ids]].tolist())

    def id_of(self, token: str) -> int | None:
        """Returns the id of a token as the tokenizer writes it, such as "<|eot_id|>"; None when it
        has no such token.
        """
        return self._codec.id_of(token)

    def piece(self, token: int) -> str:
        """Returns how a token is written, such as "<|endoftext|>"; "" for a special token that was
        added beyond the tokenizer's own ids.
        """
        return self._codec.piece(token) if token < self._codec.num_ids else ""

    @property
    def files(self) -> dict[str, bytes]:
        """The tokenizer's own files by name, as they were given: the SentencePiece model, or
        tokenizer.json with what lay next to it; none for bytes.
        """
        return {**self._codec.files, **self._codec.companions}

    @property
    def special_tokens(self) -> dict[str, str]:
        """How "mask", "eos", "bos" and "pad" are written; the usual name where the model itself has
        none.
        """
        ids = {"mask": self.mask_id, "eos": self.eos_id, "bos": self.bos_id, "pad": self.pad_id}
        ours = {i: SPECIAL_NAMES[what][0] for what, i in reversed(ids.items())}
        return {what: self.piece(i) or ours[i] for what, i in ids.items()}

    @property
    def end_ids(self) -> tuple[int, ...]:
        """What ends a text: EOS first, then the end of a turn."""
        ends = (self.eos_id, self.eot_id)
        return tuple(dict.fromkeys(i for i in ends if i is not None))

    @property
    def special_ids(self) -> dict[str, int]:
        """The ids of mask, eos, bos, pad and, where there is one, eot (end of turn)."""
        ids = {"mask": self.mask_id, "eos": self.eos_id, "bos": self.bos_id, "pad": self.pad_id}
        return ids if self.eot_id is None else {**ids, "eot": self.eot_id}

    @property
    def chat_template(self) -> str | None:
        """The Jinja template of conversations that came with the tokenizer, if one did."""
        files = self.files
        if CHAT_TEMPLATE in files:
            return files[CHAT_TEMPLATE].decode()
        for name in ("chat_template.json", "tokenizer_config.json"):
            found = json.loads(files.get(name, b"{}")).get("chat_template")
            # There may be several by name, of which one is for conversations.
            if isinstance(found, list):
                found = {one["name"]: one["template"] for one in found}.get("default")
            if found:
                return found
        return None

    @property
    def markers(self) -> dict[str, int]:
        """How special tokens are spelled in chat templates, with their ids: the four, and those of
        the vocabulary that `encode` reads as ordinary characters.
        """
        ids = {"mask": self.mask_id, "pad": self.pad_id, "bos": self.bos_id, "eos": self.eos_id}
        names = self.special_tokens
        return {**self._codec.markers(), **{names[what]: i for what, i in ids.items()}}

    def with_chat_template(self, template: str) -> "Tokenizer":
        """Returns the same tokenizer, which keeps this Jinja source among its files."""
        other = copy.copy(self)
        other._codec = copy.copy(self._codec)
        other._codec.companions = {**self._codec.companions, CHAT_TEMPLATE: template.encode()}
        return other

    def behaves_like(self, other: "Tokenizer") -> bool:
        """Whether another tokenizer has the same special ids and gives the same ids to fixed texts
        and to the text of every id.

        A tokenizer that was written in another form, as an export does, has another fingerprint
        and is still the same one. Of ids without texts only mask and EOS are compared, which is all
        that is known of them for sure.
        """
        if "none" in (self.kind, other.kind):
            return (self.mask_id, self.eos_id) == (other.mask_id, other.eos_id)
        names = ("vocab_size", "mask_id", "eos_id", "bos_id", "pad_id")
        if any(getattr(self, name) != getattr(other, name) for name in names):
            return False
        pieces = {t.decode([i]) for t in (self, other) for i in range(self.vocab_size)}
        texts = [*PROBES, *sorted(pieces)]
        return self.encode_batch(texts) == other.encode_batch(texts)

    def save(self, directory) -> None:
        """Writes the directory that `load_tokenizer` reads; SPECIAL_IDS, by which it is recognised,
        comes last.
        """
        directory = epath.Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in self.files.items():
            (directory / name).write_bytes(content)
        (directory / SPECIAL_IDS).write_bytes(self._meta())

    def _meta(self) -> bytes:
        ids = self.special_ids
        if self.eot_id == self._named_eot_id:
            # found again by its name; written down it would change the fingerprint
            ids.pop("eot", None)
        return (json.dumps({"kind": self.kind, "special_ids": ids}, indent=2) + "\n").encode()


def load_tokenizer(
    path,
    *,
    add_mask_token: bool = False,
    mask_token: str = "",
    trained_ids: dict[str, int] | None = None,
) -> Tokenizer:
    """Loads "bytes", a directory written by `Tokenizer.save`, a SentencePiece .model or a folder
    with tokenizer.json or, without that, tokenizer.model.

    In a folder with a checkpoint, the special ids in its config.json come first, because the model
    was trained with them.

    Args:
        path: what to load; local or any URL that epath reads.
        add_mask_token: appends a mask id and an end-of-text id after the last id, where the
            tokenizer lacks them.
        mask_token: the token to use as the mask; "" looks at what the tokenizer declares and then
            for the usual names.
        trained_ids: {"mask": id, ...} of the model that it is for, as far as they are known; None
            takes what the config.json in the folder states.

    Raises:
        UserError: there is no tokenizer, it cannot be read, it has no mask token and
            add_mask_token is False, or it has other special ids than the model.
    """
    if os.fspath(path) == "bytes":
        ids = {"mask": 256, "eos": 257, "bos": 258, "pad": 259}
        return _with_ids_of_model(Tokenizer(Bytes(), ids), trained_ids or {}, name="bytes")
    path = path_of(path)
    if (path / SPECIAL_IDS).exists():
        return _with_ids_of_model(_load_saved(path), trained_ids or {}, name=str(path))
    if path.name.endswith(".model") and path.is_file():
        codec = SentencePiece(path.read_bytes(), name=str(path))
        declared, stated = codec.declared(), {}
    elif not (path / "tokenizer.json").exists() and (path / "tokenizer.model").exists():
        file = path / "tokenizer.model"
        codec = SentencePiece(file.read_bytes(), name=str(file))
        declared = {**codec.declared(), **declared_in_config(path)}
        # Tokens that were added later have ids after those of the file.
        stated = stated_in_model_config(path, num_ids=MAX_SIZE)
    elif (path / "tokenizer.json").exists():
        codec = HuggingFace(  # type: ignore[assignment]
            (path / "tokenizer.json").read_bytes(), name=str(path), companions=_companions(path)
        )
        declared, stated = (
            declared_in_config(path),
            stated_in_model_config(path, num_ids=codec.num_ids),
        )
    else:
        raise UserError(_why_not_a_tokenizer(path))
    if trained_ids is not None:
        stated = dict(trained_ids)
    if mask_token:
        stated["mask"] = codec.id_of(mask_token)
        if stated["mask"] is None:
            raise UserError(
                f"Tokenizer {str(path)!r} has no token {mask_token!r} to use as the mask; name one "
                "that it has."
            )
    return with_special_ids(codec, declared, stated, name=str(path), add_mask_token=add_mask_token)


def _check_unicode(texts: Iterable[str]) -> None:
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            shown = ascii(text) if len(text) <= 40 else f"{ascii(text[:40])}..."
            raise UserError(
                f"{shown} holds half of a surrogate pair at character {error.start}, which is not "
                "Unicode text; leave it out, or decode the bytes that it comes from again."
            ) from error


def _why_not_a_tokenizer(path: epath.Path) -> str:
    """Returns what is wrong with a path that is not taken as a tokenizer."""
    check_readable(path)
    if not path.exists():
        return (
            f"There is no tokenizer at {str(path)!r}: give 'bytes', a SentencePiece .model file, a "
            "folder with a tokenizer.json or tokenizer.model, or that of a prepared data set."
        )
    if path.is_dir():
        return (
            f"There is no tokenizer at {str(path)!r}, which is a folder without tokenizer.json, "
            f"tokenizer.model and {SPECIAL_IDS}; give the folder that has one of them."
        )
    if path.name in ("tokenizer.json", "tokenizer_config.json", SPECIAL_IDS):
        return (
            f"{str(path)!r} is a file of a tokenizer that has several; give its folder, "
            f"{str(path.parent)!r}."
        )
    return (
        f"The file {str(path)!r} is not taken as a tokenizer, because its name does not end with "
        ".model; give a SentencePiece .model file, or the folder of a tokenizer.json."
    )


def has_tokenizer(folder) -> bool:
    """Whether a folder holds files of a tokenizer; UserError when this user may not read it."""
    check_readable(folder)
    names = (SPECIAL_IDS, "tokenizer.json", "tokenizer.model")
    return any((epath.Path(folder) / name).exists() for name in names)


def ids_alone(num_ids: int, special_ids: dict[str, int], *, add_mask_token: bool) -> Tokenizer:
    """Returns what stands for the tokenizer of weights that came without one.

    Args:
        num_ids: of the vocabulary, without the rows that only fill up the embedding.
        special_ids: as far as they are known.
        add_mask_token: appends a mask id after the last where none is known.

    Raises:
        UserError: no EOS or no mask is known.
    """
    if add_mask_token:
        special_ids = {"mask": num_ids, **special_ids}
    missing = [what for what in ("mask", "eos") if what not in special_ids]
    if missing:
        raise UserError(
            f"There is no tokenizer, and no {' or '.join(f'{what}_token_id' for what in missing)} "
            "is stated next to the weights; give the tokenizer with --tokenizer."
        )
    return Tokenizer(NoText(num_ids), special_ids)


def _with_ids_of_model(tokenizer: Tokenizer, trained: dict[str, int], *, name: str) -> Tokenizer:
    """Returns a tokenizer whose special ids are fixed; UserError unless they are the model's."""
    ours = tokenizer.special_ids
    for what, i in trained.items():
        if what in ours and ours[what] != i:
            raise UserError(
                f"Tokenizer {name!r} has the {what} id {ours[what]}, and the model was trained "
                f"with {i}; give the tokenizer of the model."
            )
    return tokenizer


def load_same(directory, fingerprint: str, *, of: str) -> Tokenizer:
    """Returns the tokenizer in a directory, which must be the one that something was made with.

    Args:
        directory: what `Tokenizer.save` wrote.
        fingerprint: of the tokenizer that was used.
        of: what was made with it, such as "the records", for the error.

    Raises:
        UserError: it is another one, or cannot be read.
    """
    tokenizer = load_tokenizer(directory)
    if tokenizer.fingerprint != fingerprint:
        raise UserError(
            f"{directory} ({tokenizer.fingerprint[:12]}) is not the tokenizer of {of} "
            f"({fingerprint[:12]}); put that one back, or use a new directory."
        )
    return tokenizer


def _load_saved(path) -> Tokenizer:
    try:
        content = json.loads((path / SPECIAL_IDS).read_text())
        fault = fault_of(content, SavedTokenizer)
        fault = fault and f"{SPECIAL_IDS} {fault}"
        if not fault:
            kind, special_ids = content["kind"], content["special_ids"]
            made = Tokenizer(_saved_codec(path, kind), special_ids)
            template = path / CHAT_TEMPLATE
            if kind != "huggingface" and template.exists():
                return made.with_chat_template(template.read_text())
            return made
    except (KeyError, ValueError, RecursionError, OSError, WrongSpecialIds) as error:
        check_readable(path, whole=True)
        fault = f"{type(error).__name__}: {error}"
    raise UserError(
        f"The tokenizer at {str(path)!r} is damaged ({fault}); restore the folder or prepare the "
        "data again."
    )


def _saved_codec(path, kind: str) -> Codec:
    if kind == "bytes":
        return Bytes()
    if kind == "none":
        return NoText.from_file((path / NoText.file).read_bytes())
    if kind == "huggingface":
        content = (path / HuggingFace.file).read_bytes()
        return HuggingFace(content, name=str(path), companions=_companions(path))
    codec = {"sentencepiece": SentencePiece}[kind]
    return codec((path / codec.file).read_bytes(), name=str(path))


def with_special_ids(
    codec: SentencePiece | HuggingFace,
    declared: dict[str, str],
    stated: dict[str, int],
    *,
    name: str,
    add_mask_token: bool,
) -> Tokenizer:
    """Returns the tokenizer of a codec.

    A special id is, in this order, the one that is stated, that of the token which the model
    declares, that of a usual name, and, with add_mask_token, a new one after the last.

    Args:
        declared: {"mask": "<mask>", ...}, as far as the model names its tokens.
        stated: {"mask": 126336, ...}, as far as a checkpoint gives ids.
        name: of the tokenizer, for the error.
        add_mask_token: see `load_tokenizer`.

    Raises:
        UserError: there is no mask or end-of-text token and add_mask_token is False.
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
            f"--add-mask-token to append what is missing after its {codec.num_ids} ids."
        )
    for new_id, what in enumerate(missing, start=codec.num_ids):
        codec.append(what, SPECIAL_NAMES[what][0], new_id)
        special_ids[what] = new_id
    try:
        return Tokenizer(codec, special_ids)
    except WrongSpecialIds as error:
        raise UserError(
            f"Tokenizer {name!r} {error}; correct tokenizer_config.json and config.json next to it."
        ) from error


def _companions(folder) -> dict[str, bytes]:
    """Returns the COMPANIONS that lie in a folder."""
    return {name: (folder / name).read_bytes() for name in COMPANIONS if (folder / name).exists()}


def _digest(files: dict[str, bytes]) -> str:
    digest = hashlib.sha256()
    for name in sorted(files):
        digest.update(f"{name} {len(files[name])}\n".encode() + files[name])
    return digest.hexdigest()

"""Turns units of dialogues into shards of records that say which tokens are of answers.

The counterpart of build.write_unit. A document never continues in another row, so that an answer is
always read after the whole of its prompt.
"""

import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from llada_jax.data.build import (
    COUNTS,
    SPLITS,
    Job,
    Unit,
    receipt_path,
    write_json,
    write_shard_of,
    writing_to,
)
from llada_jax.data.chat_template import Chat, Document
from llada_jax.data.dialogues import Malformed, identity_of, parse_dialogue, text_of
from llada_jax.data.inputs import Input, printable
from llada_jax.data.packing import is_heldout
from llada_jax.data.text import read_records
from llada_jax.data.tokenizer import Tokenizer
from llada_jax.errors import UserError

SCORED = ("num_scored_tokens", "num_scored_bytes")
# Rows that are open for short documents while a shard is packed. On lengths as instructions have
# them, 64 leave about 1% of padding; each holds at most T tokens.
OPEN_ROWS = 64


CHAT_CHOICES = {
    "turns": ("one", "all", "each"),
    "too_long": ("drop", "left", "error"),
    "malformed": ("skip", "error"),
    "rows": ("packed", "padded"),
}


@dataclass(frozen=True, kw_only=True)
class ChatSettings:
    """How dialogues become documents.

    Attributes:
        template: Jinja source, or "" for that of the tokenizer.
        turns: "one": a dialogue is one document, of which each epoch draws one answer; "all": all
            of its answers are scored; "each": every answer is a document of its own, with what
            comes before it.
        too_long: what happens to a document of more than T tokens: "drop", "left" (its beginning is
            cut off) or "error".
        malformed: "skip" or "error".
        rows: "packed", or "padded": one document per row.
    """

    template: str = ""
    turns: str = "one"
    too_long: str = "error"
    malformed: str = "error"
    rows: str = "packed"


def write_dialogues(
    unit: Unit, job: Job, tokenizer: Tokenizer, on_progress: Callable[..., None]
) -> None:
    """Writes the shards of a unit and then its receipt."""
    settings = job.chat
    assert settings is not None
    chat = Chat(settings.template, tokenizer)
    counts = {split: dict.fromkeys((*COUNTS, *SCORED), 0) for split in SPLITS}
    told: dict = {"malformed": Counter(), "first_malformed": "", "num_too_long": 0, "num_cut": 0}

    def skip(where: str, reason: str) -> None:
        if settings.malformed == "error":
            raise UserError(
                f"{printable(where)}: {reason}; fix or remove the record, or leave such records "
                "out with --chat malformed=skip."
            )
        told["malformed"][reason] += 1
        told["first_malformed"] = told["first_malformed"] or f"{printable(where)}: {reason}"

    def fitting(document: Document, where: str) -> Document | None:
        """Returns the document as it is stored; None when it is left out."""
        length = len(document.tokens)
        if length <= job.sequence_length:
            return document
        if settings.too_long == "error":
            raise UserError(
                f"{printable(where)}: the dialogue has {length} tokens and --sequence-length is "
                f"{job.sequence_length}; raise that, or choose --chat too_long=drop or left."
            )
        told["num_too_long"] += 1
        if settings.too_long == "drop":
            return None
        cut = cut_left(document, job.sequence_length)
        if cut is None:
            skip(where, "an answer is longer than the sequence")
            return None
        told["num_cut"] += 1
        return cut

    def documents() -> Iterator[tuple[str, Document]]:
        """Yields (split, document) and counts it."""
        for file in unit.inputs:
            for where, record in read_records(
                file.path, job.cut.form, lambda num_bytes: on_progress(read_bytes=num_bytes)
            ):
                try:
                    messages = parse_dialogue(record)
                    made = [
                        chat.document(
                            part, tools=record.get("tools"), only_last=settings.turns == "each"
                        )
                        for part in parts_of(messages, settings.turns)
                    ]
                except Malformed as error:
                    skip(where, str(error))
                    continue
                held_out = is_heldout(identity_of(messages), fraction=job.heldout)
                split = "heldout" if held_out else "train"
                for document in filter(None, (fitting(document, where) for document in made)):
                    num_bytes = len(tokenizer.decode(document.tokens).encode())
                    counted = counts[split]
                    counted["num_documents"] += 1
                    counted["num_tokens"] += len(document.tokens)
                    counted["num_bytes"] += num_bytes
                    answers = document.tokens[document.is_answer]
                    counted["num_scored_tokens"] += len(answers)
                    counted["num_scored_bytes"] += len(tokenizer.decode(answers).encode())
                    on_progress(text_bytes=num_bytes, tokens=len(document.tokens))
                    yield split, document

    def training_documents(spool) -> Iterator[Document]:
        for split, document in documents():
            if split == "train":
                yield document
            else:
                np.array([len(document.tokens)], dtype=np.int64).tofile(spool)
                document.tokens.tofile(spool)
                document.is_answer.tofile(spool)

    def heldout_documents(spool) -> Iterator[Document]:
        spool.seek(0)
        while len(length := np.fromfile(spool, dtype=np.int64, count=1)):
            tokens = np.fromfile(spool, dtype=np.int32, count=length[0])
            yield Document(tokens, np.fromfile(spool, dtype=bool, count=length[0]))

    with writing_to(job.output):
        # see build.write_unit for the spool
        with tempfile.TemporaryFile(dir=job.output) as spool:
            streams = {"train": training_documents(spool), "heldout": heldout_documents(spool)}
            open_rows = OPEN_ROWS if settings.rows == "packed" else 0
            shards = {
                split: write_shard_of(
                    split,
                    unit,
                    job,
                    pack_whole(streams[split], job.sequence_length, open_rows=open_rows),
                    tokenizer,
                    counts[split],
                )
                for split in SPLITS
            }
        receipt = {
            "fingerprint": unit.fingerprint,
            "input": [printable(file.path) for file in unit.inputs],
            "num_empty_documents": 0,
            "dialogues": told,
            "splits": {split: {**counts[split], **shards[split]} for split in SPLITS},
        }
        write_json(receipt_path(job.output, unit), receipt)


def parts_of(messages: list[dict], turns: str) -> list[list[dict]]:
    """Returns the messages of each document that a dialogue becomes.

    With turns="each", earlier answers are part of the prompt; the template may write them
    otherwise than an answer at the end.
    """
    if turns != "each":
        return [messages]
    ends = [n + 1 for n, message in enumerate(messages) if message["role"] == "assistant"]
    return [messages[:end] for end in ends]


def cut_left(document: Document, length: int) -> Document | None:
    """Returns the last `length` tokens of a document, in which an answer that has lost its
    beginning is part of the prompt; None when that leaves no answer.
    """
    tokens, is_answer = document.tokens[-length:], document.is_answer[-length:].copy()
    if document.is_answer[-length - 1]:
        is_answer[: int(np.argmin(is_answer)) if not is_answer.all() else length] = False
    return Document(tokens, is_answer) if is_answer.any() else None


def pack_whole(
    documents: Iterator[Document], sequence_length: int, *, open_rows: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Puts whole documents into rows: each into the fullest of the open rows that has room for it.

    Args:
        documents: each of at most `sequence_length` tokens.
        open_rows: rows that wait for more documents; 0: every document has a row of its own.

    Yields:
        (tokens int32[n], starts bool[n], is_answer bool[n]) with 1 <= n <= sequence_length.
    """
    rows: list[list[Document]] = []
    lengths: list[int] = []
    for document in documents:
        length = len(document.tokens)
        room = [n for n, used in enumerate(lengths) if used + length <= sequence_length]
        if room:
            best = max(room, key=lengths.__getitem__)
            rows[best].append(document)
            lengths[best] += length
            continue
        rows.append([document])
        lengths.append(length)
        if len(rows) > open_rows:
            fullest = max(range(len(rows)), key=lengths.__getitem__)
            del lengths[fullest]
            yield _row(rows.pop(fullest))
    yield from map(_row, rows)


def _row(documents: list[Document]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    starts = [np.arange(len(document.tokens)) == 0 for document in documents]
    tokens, is_answer = (np.concatenate(arrays) for arrays in zip(*documents))
    return tokens, np.concatenate(starts), is_answer


def dialogues_json(receipts: list[dict], settings: ChatSettings) -> dict:
    """Returns the part "dialogues" of dataset.json."""
    told = [receipt["dialogues"] for receipt in receipts]
    malformed: Counter = sum((Counter(part["malformed"]) for part in told), Counter())
    return {
        "turns": settings.turns,
        "rows": settings.rows,
        "num_malformed": malformed.total(),
        "malformed": dict(malformed.most_common()),
        "first_malformed": next((p["first_malformed"] for p in told if p["first_malformed"]), ""),
        "num_too_long": sum(part["num_too_long"] for part in told),
        "num_cut": sum(part["num_cut"] for part in told),
    }


def dialogue_texts(inputs: list[Input], form: str, *, heldout: float, chars: int) -> Iterator[str]:
    """Yields what is said in the dialogues that are not held out, without markup, for the training
    and the check of a tokenizer: equal shares of every file, `chars` characters in all.
    """
    for file in inputs:
        left = max(1, chars // len(inputs))
        for _, record in read_records(file.path, form):
            try:
                messages = parse_dialogue(record)
            except Malformed:
                continue  # reported when the unit is written
            if not is_heldout(identity_of(messages), fraction=heldout):
                text = text_of(messages)
                yield text[:left]
                left -= len(text)
            if left <= 0:
                break

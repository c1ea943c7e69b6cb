"""Turns units of dialogues into records that say which tokens are of answers.

The counterpart of build.write_unit. A document never continues in another row, so that an answer is
always read after the whole of its prompt. The two dialogues of a pair are neighbours in one row, so
that whatever splits a batch by rows keeps them together.
"""

import dataclasses
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from llada_jax.data.build import (
    COUNTS,
    SPLITS,
    Job,
    Unit,
    fingerprint,
    write_receipt,
    write_records,
    writing_to,
)
from llada_jax.data.chat_template import TEMPLATES, Chat, Document, read_template, template_of
from llada_jax.data.dialogues import KINDS, Malformed, identity_of, parse_record, text_of
from llada_jax.data.inputs import Input, printable
from llada_jax.data.lengths import ANSWERS, LENGTHS, added, answer_lengths, rounded_up
from llada_jax.data.packing import is_heldout
from llada_jax.data.records import Dialogues
from llada_jax.data.text import read_records
from llada_jax.data.tokenizer import Tokenizer
from llada_jax.errors import UserError

# Documents that stay together in one row.
Group = tuple[Document, ...]
SCORED = ("num_scored_tokens", "num_scored_bytes")
# Rows that are open for short documents while a shard is packed. On lengths as instructions have
# them, 64 leave about 1% of padding; each holds at most T tokens.
OPEN_ROWS = 64


CHAT_CHOICES = {
    "records": KINDS,
    "turns": ("one", "all", "each"),
    "too_long": ("drop", "left", "error"),
    "malformed": ("skip", "error"),
    "rows": ("packed", "padded"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatSettings:
    """How dialogues become documents.

    Attributes:
        records: "dialogues", or "pairs" of answers to one prompt, the chosen and the rejected one.
        template: Jinja source, or "" for that of the tokenizer.
        turns: "one": a dialogue is one document, of which each epoch draws one answer; "all": all
            of its answers are scored; "each": every answer is a document of its own, with what
            comes before it, as it always is in pairs.
        too_long: what happens to a document of more than T tokens, and to a pair whose documents
            have more together: "drop", "left" (the beginning is cut off, in both documents of a
            pair alike) or "error".
        malformed: "skip" or "error".
        rows: "packed", or "padded": one document, or one pair, per row.
    """

    records: str = "dialogues"
    template: str = ""
    turns: str = "one"
    too_long: str = "error"
    malformed: str = "error"
    rows: str = "packed"

    def __post_init__(self) -> None:
        if self.records == "pairs":
            object.__setattr__(self, "turns", "each")

    def to_json(self) -> dict:
        """Returns the settings as they are recorded and compared: `records` only where it decides
        something, so that what earlier versions began can be finished.
        """
        settings = dataclasses.asdict(self)
        return {k: v for k, v in settings.items() if (k, v) != ("records", "dialogues")}


def write_dialogues(
    unit: Unit, job: Job, tokenizer: Tokenizer, on_progress: Callable[..., None]
) -> None:
    """Writes the records of a unit and then its receipt."""
    settings = job.chat
    assert settings is not None
    chat = Chat(settings.template, tokenizer)
    counts = {split: dict.fromkeys((*COUNTS, *SCORED), 0) for split in SPLITS}
    told: dict = {"malformed": Counter(), "first_malformed": "", "num_too_long": 0, "num_cut": 0}
    told["first_too_long"] = ""
    lengths: Counter = Counter()

    def skip(where: str, reason: str) -> None:
        if settings.malformed == "error":
            raise UserError(
                f"{printable(where)}: {reason}; fix or remove the record, or leave such records "
                "out with --chat malformed=skip."
            )
        told["malformed"][reason] += 1
        told["first_malformed"] = told["first_malformed"] or f"{printable(where)}: {reason}"

    def fitting(group: Group, where: str) -> Group | None:
        """Returns the documents as they are stored; None when they are left out."""
        length = sum(len(document.tokens) for document in group)
        if length <= job.sequence_length:
            return group
        if settings.too_long == "error":
            what = "dialogue has" if len(group) == 1 else "two dialogues of the pair have"
            raise UserError(
                f"{printable(where)}: the {what} {length} tokens and --sequence-length is "
                f"{job.sequence_length}; raise that, or choose --chat too_long=drop or left."
            )
        told["num_too_long"] += 1
        told["first_too_long"] = told["first_too_long"] or f"{printable(where)}: {length} tokens"
        if settings.too_long == "drop":
            return None
        # alike in both documents of a pair, whose prompts must stay the same
        num_cut = -((job.sequence_length - length) // len(group))
        cut = [cut_left(document, num_cut) for document in group]
        if None in cut:
            skip(where, "an answer is longer than the sequence")
            return None
        told["num_cut"] += 1
        return tuple(cut)  # type: ignore[arg-type]

    def groups() -> Iterator[tuple[str, Group]]:
        """Yields (split, documents that share a row) and counts them."""
        for file in unit.inputs:
            for where, record in read_records(
                file.path, job.cut.form, lambda num_bytes: on_progress(read_bytes=num_bytes)
            ):
                try:
                    dialogues = parse_record(record, settings.records)
                    made = [
                        tuple(
                            chat.document(
                                part, tools=record.get("tools"), only_last=settings.turns == "each"
                            )
                            for part in parts
                        )
                        for parts in groups_of(dialogues, settings.turns)
                    ]
                except Malformed as error:
                    skip(where, str(error))
                    continue
                held_out = is_heldout(_identity_of(dialogues), fraction=job.heldout)
                split = "heldout" if held_out else "train"
                for group in filter(None, (fitting(group, where) for group in made)):
                    for document in group:
                        count(document, counts[split])
                        if split == "train":
                            lengths.update(
                                map(rounded_up, answer_lengths(document, tokenizer.end_ids))
                            )
                    yield split, group

    def count(document: Document, counted: dict) -> None:
        num_bytes = len(tokenizer.decode(document.tokens).encode())
        counted["num_documents"] += 1
        counted["num_tokens"] += len(document.tokens)
        counted["num_bytes"] += num_bytes
        answers = document.tokens[document.is_answer]
        counted["num_scored_tokens"] += len(answers)
        counted["num_scored_bytes"] += len(tokenizer.decode(answers).encode())
        on_progress(text_bytes=num_bytes, tokens=len(document.tokens))

    def training_groups(spool) -> Iterator[Group]:
        for split, group in groups():
            if split == "train":
                yield group
            else:
                # see build.write_unit for why it is not tofile
                spool.write(np.int64(len(group)).tobytes())
                for document in group:
                    spool.write(np.int64(len(document.tokens)).tobytes())
                    spool.write(document.tokens.tobytes() + document.is_answer.tobytes())

    def heldout_groups(spool) -> Iterator[Group]:
        spool.seek(0)

        def document() -> Document:
            length = np.fromfile(spool, dtype=np.int64, count=1)[0]
            tokens = np.fromfile(spool, dtype=np.int32, count=length)
            return Document(tokens, np.fromfile(spool, dtype=bool, count=length))

        while len(size := np.fromfile(spool, dtype=np.int64, count=1)):
            yield tuple(document() for _ in range(size[0]))

    with writing_to(job.output):
        # see build.write_unit for the spool
        with tempfile.TemporaryFile(dir=job.output) as spool:
            streams = {"train": training_groups(spool), "heldout": heldout_groups(spool)}
            open_rows = OPEN_ROWS if settings.rows == "packed" else 0
            rows = {
                split: pack_whole(streams[split], job.sequence_length, open_rows=open_rows)
                for split in SPLITS
            }
            splits = write_records(unit, job, rows, tokenizer, counts)
        write_receipt(
            unit,
            job,
            splits,
            {
                "num_empty_documents": 0,
                "dialogues": told,
                LENGTHS: {ANSWERS: added([lengths])},
            },
        )


def groups_of(dialogues: list[list[dict]], turns: str) -> list[tuple[list[dict], ...]]:
    """Returns the messages of each document that a record becomes, in groups that share a row: a
    pair is a group, and every document of a dialogue is one by itself.

    With turns="each", earlier answers are part of the prompt; the template may write them
    otherwise than an answer at the end.
    """
    if len(dialogues) > 1 or turns != "each":
        return [tuple(dialogues)]
    (messages,) = dialogues
    ends = [n + 1 for n, message in enumerate(messages) if message["role"] == "assistant"]
    return [(messages[:end],) for end in ends]


def _identity_of(dialogues: list[list[dict]]) -> str:
    """Of a pair that of its prompt: several pairs with one prompt stay in one split."""
    return identity_of(dialogues[0] if len(dialogues) == 1 else dialogues[0][:-1])


def cut_left(document: Document, num_cut: int) -> Document | None:
    """Returns a document without its first tokens, in which an answer that has lost its beginning
    is part of the prompt; None when that leaves no answer.

    Args:
        num_cut: how many tokens; at least 1.
    """
    tokens, is_answer = document.tokens[num_cut:], document.is_answer[num_cut:].copy()
    if document.is_answer[num_cut - 1 : num_cut].any():
        is_answer[: len(tokens) if is_answer.all() else int(np.argmin(is_answer))] = False
    return Document(tokens, is_answer) if is_answer.any() else None


def pack_whole(
    groups: Iterator[Group], sequence_length: int, *, open_rows: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Puts whole documents into rows: each group of them into the fullest of the open rows that has
    room for it.

    Args:
        groups: documents that stay together, each group of at most `sequence_length` tokens.
        open_rows: rows that wait for more documents; 0: every group has a row of its own.

    Yields:
        (tokens int32[n], starts bool[n], is_answer bool[n]) with 1 <= n <= sequence_length.
    """
    rows: list[list[Document]] = []
    lengths: list[int] = []
    for group in groups:
        length = sum(len(document.tokens) for document in group)
        room = [n for n, used in enumerate(lengths) if used + length <= sequence_length]
        if room:
            best = max(room, key=lengths.__getitem__)
            rows[best].extend(group)
            lengths[best] += length
            continue
        rows.append(list(group))
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


def dialogues_json(receipts: Sequence[dict], settings: ChatSettings | Dialogues) -> dict:
    """Returns the part "dialogues" of dataset.json, from those of receipts or of other data
    sets.
    """
    told = [receipt["dialogues"] for receipt in receipts]
    malformed: Counter = sum((Counter(part["malformed"]) for part in told), Counter())
    return {
        "records": settings.records,
        "turns": settings.turns,
        "rows": settings.rows,
        "num_malformed": malformed.total(),
        "malformed": dict(malformed.most_common()),
        "first_malformed": _first("first_malformed", told),
        "num_too_long": sum(part["num_too_long"] for part in told),
        "first_too_long": _first("first_too_long", told),
        "num_cut": sum(part["num_cut"] for part in told),
    }


def _first(name: str, told: list[dict]) -> str:
    # data sets and receipts of version 0.1 have no "first_too_long"
    return next((part[name] for part in told if part.get(name)), "")


def dialogue_texts(
    inputs: list[Input], form: str, kind: str, *, heldout: float, chars: int
) -> Iterator[str]:
    """Yields what is said in the dialogues that are not held out, without markup, for the training
    and the check of a tokenizer: equal shares of every file, `chars` characters in all.

    Args:
        kind: what a record holds; see dialogues.parse_record.
    """
    for file in inputs:
        left = max(1, chars // len(inputs))
        for _, record in read_records(file.path, form):
            try:
                dialogues = parse_record(record, kind)
            except Malformed:
                # reported when the unit is written
                continue
            if not is_heldout(_identity_of(dialogues), fraction=heldout):
                # of a pair the prompt once
                text = "\n".join(map(text_of, [dialogues[0], *(d[-1:] for d in dialogues[1:])]))
                yield text[:left]
                left -= len(text)
            if left <= 0:
                break


# ---- settings


def source_of_chat(chat: ChatSettings, tokenizer: Tokenizer | None) -> dict:
    """Returns what dataset.json says of the settings.

    Args:
        tokenizer: whose own template its fingerprint leaves out; None where it will be trained.
    """
    template = chat.template
    if template and template not in TEMPLATES:
        template = fingerprint(read_template(template))[:16]
    elif not template and tokenizer and tokenizer.chat_template:
        template = fingerprint(tokenizer.chat_template)[:16]
    return {**chat.to_json(), "template": template}


def with_template(tokenizer: Tokenizer, setting: str) -> Tokenizer:
    """Returns the tokenizer with the template that `--chat template=` means."""
    template = template_of(tokenizer, setting)
    # refuses what is not Jinja, before anything is written
    Chat(template, tokenizer).check_writes_answers()
    return tokenizer.with_chat_template(template)

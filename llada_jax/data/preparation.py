"""The recipe from raw text to a data set: a tokenizer, packed records, dataset.json.

The inputs are grouped into units (llada_jax.data.build). A unit is read, tokenized and packed by
one process and is finished when its receipt is written. Then the units are joined into shards
(llada_jax.data.assembly), and dataset.json comes last. So the result depends neither on the number
of processes nor on how often they were interrupted, and running the same preparation again
continues after the last finished unit.
"""

import contextlib
import dataclasses
import fcntl
import functools
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from llada_jax.data.assembly import (
    join_units,
    lost_units,
    plan_shards,
    shards_json,
    unfinished,
)
from llada_jax.data.build import (
    LOCK,
    RECEIPTS,
    Job,
    as_flag,
    check_splits,
    dataset_json,
    fingerprint,
    has_training_text,
    in_parts,
    is_done,
    read_json,
    receipt_path,
    remove_leftovers,
    size_of,
    units_of,
    write_json,
    writing_to,
)
from llada_jax.data.dialogue_units import (
    SCORED,
    ChatSettings,
    dialogue_texts,
    dialogues_json,
    source_of_chat,
    with_template,
)
from llada_jax.data.duplicates import count_duplicates, without_duplicates
from llada_jax.data.inputs import Input, find_inputs, printable
from llada_jax.data.packing import is_heldout
from llada_jax.data.parts import INPUTS, part_folder
from llada_jax.data.records import FORMAT, JSON_NAME, record_size, write_dataset_json
from llada_jax.data.round_trip import describe_loss, is_lossless
from llada_jax.data.shards import stored_size
from llada_jax.data.text import Cut, check_cut, read_documents
from llada_jax.data.tokenizer import Tokenizer, load_tokenizer
from llada_jax.data.tokenizer_training import train_sentencepiece
from llada_jax.data.workers import run_units
from llada_jax.errors import UserError
from llada_jax.progress import reported_every
from llada_jax.ranges import RANGES, SIZE, check_number
from llada_jax.storage import files
from llada_jax.storage.locks import try_lock
from llada_jax.storage.remote import is_remote
from llada_jax.streams import write_line
from llada_jax.units import format_seconds

# A tokenizer is trained on at most this many characters: unigram training takes about 25 bytes of
# memory and, on one or two cores, 4 microseconds per character (32 million: 0.8 GB, two minutes).
SAMPLE_CHARS = 20_000_000
# A document of the sample is not cut below this length, so that at least twenty files give some.
SAMPLE_DOCUMENT_CHARS = SAMPLE_CHARS // 20
TRAINING_SECONDS = 10.0  # between two lines of progress while it is trained

# Whether a tokenizer gives the text back is checked on this much of it, which takes a second.
CHECK_CHARS, CHECK_FILES, CHECK_DOCUMENT_CHARS = 500_000, 25, 20_000

LOCK_SECONDS = 5.0  # how long the processes of a killed run are given to notice it

# What another run may not change, because the finished units of the directory were made with them.
SETTINGS = (
    "sequence_length",
    "tokenizer",
    "documents",
    "text_field",
    "document_start",
    "heldout",
    # Written only when it was given.
    "format",
    "drop_duplicates",
    # Of dialogues alone.
    "chat",
)


def prepare(
    patterns: list[str],
    output,
    *,
    sequence_length: int,
    tokenizer: str,
    cut: Cut = Cut(),  # noqa: B008
    heldout: float = 0.01,
    workers: int = 1,
    add_mask_token: bool = False,
    drop_duplicates: bool = False,
    chat: ChatSettings | None = None,
    part: tuple[int, int] | None = None,
) -> dict:
    """Writes the data set directory `output` and returns the content of its dataset.json.

    Args:
        patterns: files, globs, directories or URLs.
        output: local directory: new, empty, or one in which the same preparation was interrupted or
            finished.
        sequence_length: T, tokens in a record.
        tokenizer: "spm:N", "spm-bpe:N", "bytes", or what `load_tokenizer` takes.
        cut: how files are cut into documents.
        heldout: share of the documents, chosen by the hash of their text, that goes into the split
            "heldout".
        workers: number of processes.
        add_mask_token: see `load_tokenizer`.
        drop_duplicates: whether a document that is a copy of an earlier one is left out.
        chat: how the records of the inputs become dialogues; its template is what
            chat_template.template_of takes. None: the inputs are text.
        part: (I, N): writes part I of N below `output`, for parts.join_parts, and needs a tokenizer
            that is not trained.

    Raises:
        UserError: the input is unusable, the settings differ from those that the directory was
            begun with, or the disk refuses.
    """
    # 1. What to do, checked before anything is written.
    _check_numbers(sequence_length=sequence_length, heldout=heldout, workers=workers)
    make_tokenizer, tokenizer_name = _parse_tokenizer(tokenizer, add_mask_token=add_mask_token)
    _check_words(tokenizer, cut)
    is_trained = tokenizer.startswith(("spm:", "spm-bpe:"))
    if part is not None:
        if is_trained:
            raise UserError(
                f"--tokenizer {tokenizer}: each part would train another one; train it once, for "
                "example by preparing a sample of the text, and give every part that folder, "
                "--tokenizer DIR/tokenizer."
            )
        output = part_folder(output, *part)
    # An earlier start has written into this folder, which may lie among the inputs.
    own = os.fspath(output) if os.path.isdir(os.path.join(output, RECEIPTS)) else ""
    inputs = find_inputs(patterns, cut.form, on_note=_say, output=own)
    check_cut(inputs, cut)
    source = {
        "input": [printable(pattern) for pattern in patterns],
        "num_files": len(inputs),
        "input_fingerprint": fingerprint([i.identity for i in inputs]),
        "tokenizer": tokenizer_name,
        "sequence_length": sequence_length,
        "documents": cut.documents,
        "text_field": cut.text_field,
        "document_start": cut.document_start,
        "heldout": heldout,
        **({"format": cut.form} if cut.form else {}),
        **({"drop_duplicates": True} if drop_duplicates else {}),
        **(
            {"chat": source_of_chat(chat, None if is_trained else make_tokenizer([]))}
            if chat
            else {}
        ),
        **({INPUTS: [fingerprint(i.identity)[:16] for i in inputs]} if part else {}),
    }
    output = _begin_output(output)
    with _lock(output):
        # 2. What an earlier run has done, which must have been the same preparation.
        _refuse_other_settings(output, source, is_own_template=bool(chat and not chat.template))
        # 3. The tokenizer: made once, if need be by training it on a sample of the training text.
        if chat:
            texts = functools.partial(
                dialogue_texts, inputs, cut.form, chat.records, heldout=heldout
            )
            make = functools.partial(with_template, setting=chat.template)
            made = _make_tokenizer_once(
                output, source, lambda: make(make_tokenizer(texts(chars=SAMPLE_CHARS)))
            )
            chat = dataclasses.replace(chat, template=made.chat_template or "")
            sample = [text for text in texts(chars=CHECK_CHARS) if text.strip()]
        else:
            made = _make_tokenizer_once(
                output, source, lambda: make_tokenizer(sample_texts(inputs, cut, heldout=heldout))
            )
            sample = texts_to_check(inputs, cut)
        # 4. The units that have no receipt yet, or whose records are lost.
        job = Job(
            output=output,
            sequence_length=sequence_length,
            cut=cut,
            heldout=heldout,
            is_lossy=not is_lossless(sample, made),
            drops_duplicates=drop_duplicates,
            chat=chat,
        )
        # a dialogue is read as a whole record, from the beginning of its file on
        parts = inputs if chat else in_parts(inputs, cut)
        units = units_of(parts, job, made.fingerprint)
        remove_leftovers(output, units)
        if drop_duplicates:
            hash_all = functools.partial(run_units, workers=workers, num_bytes_done=0)
            units = without_duplicates(units, job, hash_all)
        pending = [unit for unit in units if not is_done(output, unit)]
        if pending and job.is_lossy:
            _say_what_is_lost(sample, made)
        run = functools.partial(run_units, job=job, workers=workers)
        run(pending, num_bytes_done=size_of(units) - size_of(pending))
        receipts = [read_json(receipt_path(output, unit)) for unit in units]
        size = stored_size(
            record_size(
                sequence_length=sequence_length,
                vocab_size=made.vocab_size,
                with_answers=chat is not None,
            )
        )
        planned = plan_shards(units, receipts, stored_size=size)
        missing = unfinished(output, planned)
        if not pending and not missing and (output / JSON_NAME).exists():
            write_line(f"{output} is complete; nothing to do.")
            return json.loads((output / JSON_NAME).read_text())
        lost = lost_units(output, missing, stored_size=size)
        run(lost, num_bytes_done=size_of(units) - size_of(lost))
        join_units(output, planned)
        # 5. dataset.json, which shows readers that everything is there.
        copies = None if chat else count_duplicates(output, units)
        source |= {} if copies is None else {"num_duplicate_documents": copies}
        content = dataset_json(receipts, shards_json(planned), source, made)
        if chat:
            content = _of_dialogues(content, receipts, chat)
        check_splits(content, heldout=heldout)
        write_dataset_json(output, content)
        return content


# ---- what to do


def _check_numbers(*, sequence_length: int, heldout: float, workers: int) -> None:
    check_number("--sequence-length ", sequence_length, RANGES["data.sequence_length"])
    if not 0 <= heldout < 1:
        raise UserError(
            f"--heldout {heldout} must lie in [0, 1); 0.01 holds out one document in a hundred."
        )
    check_number("--workers ", workers, RANGES["data.num_threads"])


def _check_words(tokenizer: str, cut: Cut) -> None:
    """Raises UserError for words that dataset.json could not hold."""
    for flag, word in (
        ("--tokenizer", tokenizer),
        ("--text-field", cut.text_field),
        ("--document-start", cut.document_start),
    ):
        if printable(word) != word:
            raise UserError(f"{flag} {printable(word)!r} is not valid UTF-8; write it as UTF-8.")


def _say(note: str) -> None:
    write_line(f"prepare: {printable(note)}.")


def _parse_tokenizer(
    spec: str, *, add_mask_token: bool
) -> tuple[Callable[[Iterable[str]], Tokenizer], str]:
    """Returns a function from sample texts to the tokenizer, and the name under which the settings
    are compared.
    """
    kind, colon, size = spec.partition(":")
    model_type = {"spm": "unigram", "spm-bpe": "bpe"}.get(kind)
    if model_type and colon:
        if not re.fullmatch("[0-9]{1,18}", size):
            raise UserError(
                f"--tokenizer {spec}: {size!r} is not a vocabulary size; write for example "
                f"{kind}:8000."
            )
        check_number(f"--tokenizer {kind}:", int(size), SIZE)

        def train(texts: Iterable[str]) -> Tokenizer:
            write_line(
                f"prepare: training {spec} on at most {SAMPLE_CHARS / 1e6:.0f} MB of the text"
            )
            with _saying_that_it_goes_on(f"training {spec}"):
                return train_sentencepiece(texts, vocab_size=int(size), model_type=model_type)

        return train, spec
    tokenizer = load_tokenizer(spec, add_mask_token=add_mask_token)
    # refuses ids without texts before anything is written
    tokenizer.encode("")
    # The fingerprint rather than the path: the same model may have moved.
    name = spec if tokenizer.kind == "bytes" else f"{tokenizer.kind} {tokenizer.fingerprint[:16]}"
    return lambda texts: tokenizer, name


# ---- dialogues


def _of_dialogues(content: dict, receipts: list[dict], chat: ChatSettings) -> dict:
    """Returns dataset.json of dialogues from that of text."""
    for name, split in content["splits"].items():
        for count in SCORED:
            split[count] = sum(receipt["splits"][name][count] for receipt in receipts)
    told = dialogues_json(receipts, chat)
    if not any(split["num_documents"] for split in content["splits"].values()):
        raise UserError(
            f"No dialogue is left of the input files: {told['num_malformed']} records are "
            f"malformed (the first: {told['first_malformed'] or 'none'}) and "
            f"{told['num_too_long']} dialogues are too long (the first: "
            f"{told['first_too_long'] or 'none'}); docs/finetuning.md lists the forms."
        )
    # the number that the form had in the fingerprints of version 0.1
    form = 3 if chat.records == "pairs" else 2
    read_as = [content["fingerprint"], form, chat.turns, chat.rows]
    return {
        **content,
        "format": FORMAT,
        "fingerprint": fingerprint(read_as),
        "dialogues": told,
    }


def _saying_that_it_goes_on(what: str) -> contextlib.AbstractContextManager[None]:
    """Says every TRAINING_SECONDS how long the block has taken.

    SentencePiece's trainer reports nothing until it returns; it lets other threads run.
    """

    def say(seconds: float) -> None:
        write_line(f"prepare: {what}, {format_seconds(seconds)} so far")

    return reported_every(TRAINING_SECONDS, say)


def texts_to_check(inputs: list[Input], cut: Cut) -> list[str]:
    """Returns the text on which a tokenizer is checked: the beginnings of the first documents of
    CHECK_FILES files, which are spread evenly over all, CHECK_CHARS characters in all.
    """
    texts = []
    step = max(1, -(-len(inputs) // CHECK_FILES))
    share = CHECK_CHARS // min(len(inputs), CHECK_FILES)
    for file in inputs[::step]:
        left = share
        # A defect is reported when its unit is read, so that the units before it are finished.
        with contextlib.suppress(UserError):
            for text in read_documents(file.path, cut):
                if text.strip():
                    texts.append(text[: min(left, CHECK_DOCUMENT_CHARS)])
                    left -= len(texts[-1])
                if left <= 0:
                    break
    return texts


def _say_what_is_lost(sample: list[str], tokenizer: Tokenizer) -> None:
    loss = describe_loss(sample, tokenizer)
    if loss:
        write_line(
            f"prepare: the tokenizer cannot give back the text: {loss}. num_bytes counts only the "
            "bytes that its tokens stand for, so that bits per byte are right; --tokenizer spm:N "
            "trains a tokenizer that loses nothing."
        )


# ---- the output directory


def _begin_output(output) -> Path:
    """Creates the directory; raises UserError when it holds anything that prepare did not begin."""
    if is_remote(output):
        raise UserError(
            f"--output {output} must be a local or mounted directory, because an interrupted "
            "prepare continues in it; copy the finished directory to the bucket, from which train "
            "reads it."
        )
    if printable(str(output)) != str(output):
        raise UserError(
            f"--output {printable(str(output))} is not valid UTF-8, and a run could not record the "
            "name of its data; give another name."
        )
    output = Path(output)
    with writing_to(output):
        output.mkdir(parents=True, exist_ok=True)
        foreign = sorted(entry.name for entry in output.iterdir() if entry.name != RECEIPTS)
        if foreign and not (output / RECEIPTS).is_dir():
            raise UserError(
                f"--output {output} is not empty (it holds {foreign[0]!r}) and was not begun by "
                "prepare; give a new directory."
            )
        (output / RECEIPTS).mkdir(exist_ok=True)
    _refuse_older_version(output)
    return output


def _refuse_older_version(output: Path) -> None:
    """Raises UserError for a directory that version 0.1 has begun or finished."""
    if any(output.glob("*.arrayrecord")):
        raise UserError(
            f"{output} was written by version 0.1 of llada_jax; train still reads it where it is "
            "complete, and prepare needs another --output, or a directory that was deleted."
        )


@contextlib.contextmanager
def _lock(output: Path):
    """Keeps other prepare commands out of the directory, and waits for the workers of a killed one,
    which may still be writing.
    """
    with contextlib.ExitStack() as until_end:
        with writing_to(output):
            file = until_end.enter_context(open(output / LOCK, "a"))
        deadline = time.monotonic() + LOCK_SECONDS
        while not try_lock(file, fcntl.LOCK_EX):
            if time.monotonic() > deadline:
                raise UserError(
                    f"Another prepare is writing into {output}; wait for it to end, or give "
                    "another --output."
                )
            time.sleep(0.05)
        # From here on shared with the workers (workers._start_worker): when this process is killed,
        # the lock stays until the last of them is gone.
        try_lock(file, fcntl.LOCK_SH)
        yield


def _refuse_other_settings(output: Path, source: dict, *, is_own_template: bool) -> None:
    """Raises UserError when text was prepared with other settings, or when the directory is
    complete and the inputs have changed since.
    """
    is_complete = (output / JSON_NAME).exists()
    file = output / JSON_NAME if is_complete else output / RECEIPTS / "settings.json"
    if not file.exists():
        return
    before = read_json(file)
    before = before.get("source", {}) if is_complete else before
    for key in SETTINGS:
        was, now = before.get(key), source.get(key)
        # an older version did not write down the tokenizer's own template
        if key == "chat" and is_own_template and was and now and not was["template"]:
            now = {**now, "template": ""}
        if was != now and not is_complete and not has_training_text(output):
            # A command failed and was given other settings: the tokenizer is made again, too.
            (output / RECEIPTS / "tokenizer.json").unlink(missing_ok=True)
        elif was != now:
            raise UserError(
                f"{output} was prepared with {as_flag(key, was, now)} and this command has "
                f"{as_flag(key, now, was)}; give the same, a new --output, or delete the directory."
            )
    if is_complete and before.get("input_fingerprint") != source["input_fingerprint"]:
        raise UserError(
            f"{output} is complete, and its {before.get('num_files')} input files have changed "
            f"since or others are given now ({source['num_files']}); give another --output, or "
            "delete the directory."
        )


def _make_tokenizer_once(output: Path, source: dict, make: Callable[[], Tokenizer]) -> Tokenizer:
    """Returns the tokenizer saved in the directory; makes and saves it when there is none for these
    inputs.

    The receipt is written after the tokenizer has its name, so a kill in between makes it again.
    """
    receipt, directory = output / RECEIPTS / "tokenizer.json", output / "tokenizer"
    key = fingerprint(
        [source["tokenizer"], source["input_fingerprint"], source["heldout"], SAMPLE_CHARS]
    )
    if receipt.exists() and read_json(receipt) == key and directory.exists():
        return load_tokenizer(directory)
    tokenizer = make()
    with writing_to(output):
        write_json(output / RECEIPTS / "settings.json", source)
        with files.whole_directory(directory) as partial:
            tokenizer.save(partial)
        write_json(receipt, key)
    return tokenizer


def sample_texts(inputs: list[Input], cut: Cut, *, heldout: float) -> Iterator[str]:
    """Yields the text on which a tokenizer is trained: whole documents from the beginning of every
    file, without what is held out, SAMPLE_CHARS characters in all.

    Files share the budget equally. They are read from the smallest to the largest, so that what a
    small one does not use is there for the larger ones. A document that is longer than the share of
    its file is taken whole at the cost of the next files, which give nothing until that is paid
    back: cut at their shares, a million files would give 20 characters each. Only a document of
    more than SAMPLE_DOCUMENT_CHARS, such as a whole corpus in one .txt, is cut.
    """
    # What no file has been promised, what the files so far may still take (below 0: owe), and what
    # has been taken.
    free, credit, taken = SAMPLE_CHARS, 0, 0
    for i, file in enumerate(sorted(inputs, key=lambda file: (file.size, file.path))):
        share = free // (len(inputs) - i)
        free, credit = free - share, credit + share
        if credit <= 0:
            continue
        for text in read_documents(file.path, cut):
            if not text.strip() or is_heldout(text, fraction=heldout):
                continue
            text = text[: min(max(credit, SAMPLE_DOCUMENT_CHARS), SAMPLE_CHARS - taken)]
            yield text
            credit, taken = credit - len(text), taken + len(text)
            if credit <= 0:
                break
        else:
            free, credit = free + credit, 0
        if taken >= SAMPLE_CHARS:
            return

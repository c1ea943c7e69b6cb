"""The verb prepare: raw text -> tokenizer and packed records, in parallel, restartable at every file it has finished.

The inputs are grouped into units. A unit is read, tokenized and packed by one process into its own shards, and counts
as done once its receipt is written; dataset.json comes last. So the result depends on neither the number of processes
nor the number of interruptions.
"""

import concurrent.futures
import contextlib
import fcntl
import hashlib
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llada_jax.command_line import Parser
from llada_jax.data.packing import is_heldout, pack
from llada_jax.data.records import FORMAT, JSON_NAME, encode_record, write_dataset_json, write_shard
from llada_jax.data.text import Cut, Input, check_cut, find_inputs, read_documents
from llada_jax.errors import UserError, reason
from llada_jax.file_lock import try_lock
from llada_jax.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece

SPLITS = ("train", "heldout")
COUNTS = ("num_records", "num_tokens", "num_bytes", "num_documents", "num_padding")

# Small files share a unit until it has this many bytes: ten thousand small files must not give ten thousand shards with
# one padded row each, while at a few MB/s a unit still takes well under a minute, all that an interruption can cost.
UNIT_BYTES = 64_000_000
# Documents are tokenized in batches of about this many characters: the libraries' fixed costs vanish in it.
BATCH_CHARS = 1_000_000
# A tokenizer is trained on at most this many characters: unigram training takes about 25 bytes of memory and, on one or
# two cores, 4 microseconds a character (32 million: 0.8 GB, two minutes).
SAMPLE_CHARS = 20_000_000

RECEIPTS = "receipts"
LOCK_SECONDS = 5.0  # how long the processes of a killed run are given to notice it


def main(argv: list[str]) -> None:
    """Runs the verb."""
    args = _parser().parse_args(argv)
    cut = Cut(documents=args.documents, text_field=args.text_field, document_start=args.document_start)
    content = prepare(
        args.input,
        args.output,
        sequence_length=args.sequence_length,
        tokenizer=args.tokenizer,
        cut=cut,
        heldout=args.heldout,
        workers=args.workers,
        add_mask_token=args.add_mask_token,
    )
    print(json.dumps(content, indent=2, ensure_ascii=False) if args.json else summary(args.output, content))


def _parser() -> Parser:
    parser = Parser(
        "prepare",
        "Tokenizes raw text and packs it into the records that train reads. Running it again continues.",
        "llada-jax prepare --input books/ --output data/books --sequence-length 1024 --tokenizer spm:8000",
    )
    parser.usage = "llada-jax prepare --input PATH... --output DIR --sequence-length T --tokenizer SPEC [flags]"
    add = parser.add_argument
    add("--input", nargs="+", required=True, metavar="PATH", help="files, globs, directories or URLs")
    add("--output", required=True, metavar="DIR", help="local directory of the data set")
    add("--sequence-length", type=int, required=True, metavar="T", help="tokens in a record")
    add("--tokenizer", required=True, metavar="SPEC", help="spm:8000 or spm-bpe:8000 (trained), bytes, or a PATH")
    add("--text-field", default="text", metavar="F", help="field or column with the text (text)")
    add("--documents", default="", choices=("file", "line", "record"), metavar="HOW",
        help="a document is a file, line or record (.txt: file, others: record)")  # fmt: skip
    add("--document-start", default="", metavar="REGEX", help="a .txt line that matches begins a new document")
    add("--heldout", type=float, default=0.01, metavar="P", help="share of the documents held out (0.01)")
    add("--workers", type=int, default=_num_cores(), metavar="N", help="processes (one a core)")
    add("--add-mask-token", action="store_true", help="append a mask token to a tokenizer without one")
    add("--json", action="store_true", help="print dataset.json instead of the summary")
    return parser


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def prepare(
    patterns: list[str],
    output,
    *,
    sequence_length: int,
    tokenizer: str,
    cut: Cut = Cut(),  # noqa: B008 (frozen)
    heldout: float = 0.01,
    workers: int = 1,
    add_mask_token: bool = False,
) -> dict:
    """Writes the data set directory `output` and returns the content of its dataset.json.

    Args:
        patterns: files, globs, directories, URLs.
        output: local directory: new, empty, or one in which the same preparation was interrupted or completed.
        sequence_length: T, tokens in a record.
        tokenizer: "spm:N", "spm-bpe:N", "bytes", or what `load_tokenizer` takes.
        cut: how files are cut into documents.
        heldout: share of the documents, chosen by the hash of their text, that goes into the split "heldout".
        workers: processes.
        add_mask_token: see `load_tokenizer`.

    Raises:
        UserError: unusable input, settings that differ from those of the directory, or a disk that does not take it.
    """
    # 1. What is to be done.
    _check_numbers(sequence_length=sequence_length, heldout=heldout, workers=workers)
    make_tokenizer, tokenizer_name = _parse_tokenizer(tokenizer, add_mask_token=add_mask_token)
    inputs = find_inputs(patterns)
    check_cut(inputs, cut)
    source = {
        "input": list(patterns),
        "num_files": len(inputs),
        "input_fingerprint": _fingerprint([i.identity for i in inputs]),
        "tokenizer": tokenizer_name,
        "sequence_length": sequence_length,
        "documents": cut.documents,
        "text_field": cut.text_field,
        "document_start": cut.document_start,
        "heldout": heldout,
    }
    output = _open_output(output)
    with _lock(output):
        # 2. What has been done already.
        _refuse_other_settings(output, source)
        # 3. The tokenizer, once: trained on a sample of the training text.
        made = _tokenizer(output, source, lambda: make_tokenizer(_sample(inputs, cut, heldout=heldout)))
        # 4. The units that have no receipt yet.
        job = Job(output=output, sequence_length=sequence_length, cut=cut, heldout=heldout)
        units = _units(inputs, job, made.fingerprint)
        _remove_leftovers(output, units)
        pending = [unit for unit in units if not _is_done(output, unit)]
        if pending:
            _run_units(pending, job, workers=workers, num_bytes_done=_size(units) - _size(pending))
        elif (output / JSON_NAME).exists():
            print(f"{output} is complete; nothing to do.", file=sys.stderr)
            return json.loads((output / JSON_NAME).read_text())
        # 5. dataset.json, the sign that all of it is there.
        receipts = [_read_json(_receipt_path(output, unit)) for unit in units]
        content = _dataset_json(receipts, source, made)
        _check_splits(content, heldout=heldout)
        write_dataset_json(output, content)
        return content


def summary(output, content: dict) -> str:
    """Returns what was written, in a few lines."""
    splits = content["splits"]
    total = {name: sum(split[name] for split in splits.values()) for name in COUNTS}
    bytes_per_token = total["num_bytes"] / total["num_tokens"]
    lines = [
        f"{output}: {total['num_documents']:,} documents, {total['num_bytes']:,} bytes, {total['num_tokens']:,} tokens "
        f"({bytes_per_token:.3f} bytes/token), vocabulary {content['tokenizer']['vocab_size']:,}"
    ]
    for name, split in splits.items():
        padding = split["num_padding"] / max(1, split["num_records"] * content["sequence_length"])
        lines.append(
            f"  {name:<8}{split['num_records']:>12,} records of {content['sequence_length']:,} tokens, "
            f"{split['num_documents']:,} documents, {split['num_bytes']:,} bytes, {padding:.3%} padding"
        )
    if content["source"]["num_empty_documents"]:
        lines.append(f"  {content['source']['num_empty_documents']:,} empty documents were skipped")
    return "\n".join(lines)


# ---- what is to be done


def _check_numbers(*, sequence_length: int, heldout: float, workers: int) -> None:
    if sequence_length < 2:
        raise UserError(f"--sequence-length {sequence_length} must be at least 2; LLaDA uses 4096.")
    if not 0 <= heldout < 1:
        raise UserError(f"--heldout {heldout} must lie in [0, 1); 0.01 holds out one document in a hundred.")
    if workers < 1:
        raise UserError(f"--workers {workers} must be at least 1; leave it out to use every core.")


def _parse_tokenizer(spec: str, *, add_mask_token: bool) -> tuple[Callable[[Iterable[str]], Tokenizer], str]:
    """Returns a function from sample texts to the tokenizer, and the name under which the settings are compared."""
    kind, colon, size = spec.partition(":")
    model_type = {"spm": "unigram", "spm-bpe": "bpe"}.get(kind)
    if model_type and colon:
        if not size.isdecimal():
            raise UserError(f"--tokenizer {spec}: {size!r} is no vocabulary size; write for example {kind}:8000.")

        def train(texts: Iterable[str]) -> Tokenizer:
            print(f"prepare: training {spec} on at most {SAMPLE_CHARS / 1e6:.0f} MB of the text", file=sys.stderr)
            return train_sentencepiece(texts, vocab_size=int(size), model_type=model_type)

        return train, spec
    tokenizer = load_tokenizer(spec, add_mask_token=add_mask_token)
    # The fingerprint rather than the path: the same model may have moved.
    name = spec if tokenizer.kind == "bytes" else f"{tokenizer.kind} {tokenizer.fingerprint[:16]}"
    return lambda texts: tokenizer, name


def _fingerprint(content) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


# ---- the output directory


def _open_output(output) -> Path:
    """Creates the directory and checks that it is empty or ours."""
    if "://" in str(output):
        raise UserError(
            f"--output {output} must be a local or mounted directory, since ArrayRecord files are written in place; "
            "copy the finished directory to where it is needed."
        )
    output = Path(output)
    with _writing(output):
        output.mkdir(parents=True, exist_ok=True)
        foreign = sorted(entry.name for entry in output.iterdir() if entry.name != RECEIPTS)
        if foreign and not (output / RECEIPTS).is_dir():
            raise UserError(
                f"--output {output} is not empty (it holds {foreign[0]!r}) and was not begun by prepare; give a new "
                "directory."
            )
        (output / RECEIPTS).mkdir(exist_ok=True)
    return output


@contextlib.contextmanager
def _lock(output: Path):
    """Holds the directory against other prepare commands, and against processes of a killed one that still write."""
    with _writing(output), open(output / RECEIPTS / "lock", "a") as file:
        deadline = time.monotonic() + LOCK_SECONDS
        while not try_lock(file, fcntl.LOCK_EX):
            if time.monotonic() > deadline:
                raise UserError(
                    f"Another prepare is writing into {output}; wait for it to end, or give another --output."
                )
            time.sleep(0.05)
        try_lock(file, fcntl.LOCK_SH)  # shared from here on with the workers, see _start_worker
        yield


def _refuse_other_settings(output: Path, source: dict) -> None:
    """Raises UserError when the directory was begun with other settings, or is complete and the inputs have changed."""
    is_complete = (output / JSON_NAME).exists()
    file = output / JSON_NAME if is_complete else output / RECEIPTS / "settings.json"
    if not file.exists():
        return
    before = _read_json(file)
    before = before.get("source", {}) if is_complete else before
    for key in ("sequence_length", "tokenizer", "documents", "text_field", "document_start", "heldout"):
        if before.get(key) != source[key]:
            raise UserError(
                f"{output} was prepared with --{key.replace('_', '-')} {before.get(key)!r} and this command says "
                f"{source[key]!r}; give the same value, another --output, or delete the directory."
            )
    if is_complete and before.get("input_fingerprint") != source["input_fingerprint"]:
        raise UserError(
            f"{output} is complete, and its {before.get('num_files')} input files have changed since or others are "
            f"given now ({source['num_files']}); give another --output, or delete the directory."
        )


def _tokenizer(output: Path, source: dict, make: Callable[[], Tokenizer]) -> Tokenizer:
    """Returns the tokenizer saved in the directory; makes and saves it when there is none for these inputs."""
    receipt, directory = output / RECEIPTS / "tokenizer.json", output / "tokenizer"
    key = _fingerprint([source["tokenizer"], source["input_fingerprint"], source["heldout"], SAMPLE_CHARS])
    if receipt.exists() and _read_json(receipt) == key and directory.exists():
        return load_tokenizer(directory)
    tokenizer = make()
    with _writing(output):
        _write_json(output / RECEIPTS / "settings.json", source)
        shutil.rmtree(directory, ignore_errors=True)
        partial = output / "tokenizer.partial"
        tokenizer.save(partial)
        partial.rename(directory)
        _write_json(receipt, key)
    return tokenizer


def _sample(inputs: list[Input], cut: Cut, *, heldout: float) -> Iterator[str]:
    """Yields the beginning of every file, none of it held out, SAMPLE_CHARS in all.

    Files share the budget equally; what a small one does not use goes to the larger ones, which come later.
    """
    budget = SAMPLE_CHARS
    for i, file in enumerate(sorted(inputs, key=lambda file: (file.size, file.path))):
        share = budget // (len(inputs) - i)
        for text in read_documents(file.path, cut):
            if not text.strip() or is_heldout(text, fraction=heldout):
                continue
            yield text[:share]
            share, budget = share - len(text[:share]), budget - len(text[:share])
            if not share:
                break


@contextlib.contextmanager
def _writing(output: Path):
    """Turns a refusal of the disk into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{error.filename or output} cannot be written ({reason(error)}); free some space or give "
            "another --output, and run prepare again: what is finished is kept."
        ) from error


def _write_json(path: Path, content) -> None:
    """Writes a file that is there whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "w") as file:
        file.write(json.dumps(content, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _read_json(path: Path):
    try:
        return json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise UserError(f"{path} is damaged ({error}); delete it and run prepare again.") from error


# ---- units


@dataclass(frozen=True)
class Unit:
    """Inputs that one process turns into one shard a split."""

    index: int
    inputs: tuple[Input, ...]
    fingerprint: str  # of all that decides what the shards hold


@dataclass(frozen=True, kw_only=True)
class Job:
    """What all units share."""

    output: Path
    sequence_length: int
    cut: Cut
    heldout: float


def _units(inputs: list[Input], job: Job, tokenizer_fingerprint: str) -> list[Unit]:
    """Groups consecutive inputs: up to UNIT_BYTES together, a larger one alone."""
    groups, size = [], 0
    for file in inputs:
        if not groups or size + file.size > UNIT_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(file)
        size += file.size
    cut = [job.cut.documents, job.cut.text_field, job.cut.document_start]
    settings = [FORMAT, tokenizer_fingerprint, job.sequence_length, job.heldout, cut]
    return [
        Unit(index, tuple(group), _fingerprint([index, settings, [file.identity for file in group]]))
        for index, group in enumerate(groups)
    ]


def _size(units: list[Unit]) -> int:
    return sum(file.size for unit in units for file in unit.inputs)


def _shard_name(split: str, unit: Unit) -> str:
    return f"{split}-{unit.index:05d}.arrayrecord"


def _receipt_path(output: Path, unit: Unit) -> Path:
    return output / RECEIPTS / f"unit-{unit.index:05d}.json"


def _is_done(output: Path, unit: Unit) -> bool:
    """True when the receipt is of this very unit and its shards are as long as it says."""
    path = _receipt_path(output, unit)
    if not path.exists():
        return False
    receipt = _read_json(path)
    shards = [split["shard"] for split in receipt["splits"].values() if split["shard"]]
    return receipt["fingerprint"] == unit.fingerprint and all(
        (output / s["file"]).exists() and (output / s["file"]).stat().st_size == s["num_bytes_on_disk"] for s in shards
    )


def _remove_leftovers(output: Path, units: list[Unit]) -> None:
    """Removes half-written files, and the shards and receipts of units that exist no more."""
    keep = {_shard_name(split, unit) for split in SPLITS for unit in units}
    keep |= {_receipt_path(output, unit).name for unit in units}
    for pattern in ("*.arrayrecord*", f"{RECEIPTS}/unit-*"):
        for path in output.glob(pattern):
            if path.name not in keep:
                path.unlink()


def _write_unit(unit: Unit, job: Job, tokenizer: Tokenizer, on_progress: Callable[..., None]) -> None:
    """Writes the shards of a unit and then its receipt."""
    counts = {split: dict.fromkeys(COUNTS, 0) for split in SPLITS}
    num_empty = 0

    def training_documents(spool) -> Iterator[np.ndarray]:
        nonlocal num_empty
        for texts in _batches(unit, job, on_progress):
            full = [text for text in texts if text.strip()]
            num_empty += len(texts) - len(full)
            batch_bytes = batch_tokens = 0
            for text, ids in zip(full, tokenizer.encode_arrays(full)):
                split = "heldout" if is_heldout(text, fraction=job.heldout) else "train"
                num_bytes, num_tokens = len(text.encode()), len(ids) + 1
                counts[split]["num_documents"] += 1
                counts[split]["num_bytes"] += num_bytes
                counts[split]["num_tokens"] += num_tokens
                batch_bytes += num_bytes
                batch_tokens += num_tokens
                if split == "train":
                    yield ids
                else:
                    np.array([len(ids)], dtype=np.int64).tofile(spool)
                    ids.tofile(spool)
            on_progress(text_bytes=batch_bytes, tokens=batch_tokens)

    def heldout_documents(spool) -> Iterator[np.ndarray]:
        spool.seek(0)
        while len(length := np.fromfile(spool, dtype=np.int64, count=1)):
            yield np.fromfile(spool, dtype=np.int32, count=length[0])

    with _writing(job.output):
        # A shard is written in one go, so the held-out documents wait on the disk until the training shard is done.
        with tempfile.TemporaryFile(dir=job.output) as spool:
            documents = {"train": training_documents(spool), "heldout": heldout_documents(spool)}
            shards = {
                split: _write_shard(split, unit, job, documents[split], tokenizer, counts[split]) for split in SPLITS
            }
        receipt = {
            "fingerprint": unit.fingerprint,
            "input": [file.path for file in unit.inputs],
            "num_empty_documents": num_empty,
            "splits": {split: {**counts[split], **shards[split]} for split in SPLITS},
        }
        _write_json(_receipt_path(job.output, unit), receipt)


def _batches(unit: Unit, job: Job, on_progress: Callable[..., None]) -> Iterator[list[str]]:
    """Yields the documents of a unit in lists of about BATCH_CHARS characters."""
    batch, size = [], 0
    for file in unit.inputs:
        for text in read_documents(file.path, job.cut, lambda num_bytes: on_progress(read_bytes=num_bytes)):
            batch.append(text)
            size += len(text) + 1  # so that empty documents fill a batch too
            if size >= BATCH_CHARS:
                yield batch
                batch, size = [], 0
    yield batch


def _write_shard(
    split: str, unit: Unit, job: Job, documents: Iterator[np.ndarray], tokenizer: Tokenizer, counts: dict
) -> dict:
    """Packs documents into a shard, counts its rows, and returns its part of the receipt; no documents, no shard."""
    digest = hashlib.sha256()

    def records() -> Iterator[bytes]:
        num_tokens = 0
        for tokens, starts in pack(documents, sequence_length=job.sequence_length, eos_id=tokenizer.eos_id):
            record = encode_record(tokens, starts, sequence_length=job.sequence_length, vocab_size=tokenizer.vocab_size)
            digest.update(record)
            num_tokens += len(tokens)
            counts["num_records"] += 1
            counts["num_padding"] += job.sequence_length - len(tokens)
            yield record
        assert num_tokens == counts["num_tokens"], (num_tokens, counts)

    path = job.output / _shard_name(split, unit)
    stream = records()
    first = next(stream, None)
    if first is None:
        path.unlink(missing_ok=True)
        return {"shard": None, "digest": None}
    num_records = write_shard(path, itertools.chain([first], stream))
    shard = {"file": path.name, "num_records": num_records, "num_bytes_on_disk": path.stat().st_size}
    return {"shard": shard, "digest": digest.hexdigest()}


# ---- processes


class _Stopped(Exception):
    """Raised inside a worker when the command ends early."""


def _run_units(units: list[Unit], job: Job, *, workers: int, num_bytes_done: int) -> None:
    """Writes the units, in this process when one is enough."""
    total = num_bytes_done + _size(units)
    workers = min(workers, len(units))
    context = multiprocessing.get_context("spawn")  # a fork would copy the threads of libraries in mid-air
    counters = context.Array("q", 4)  # bytes read, bytes of text, tokens, 1 when the workers shall stop
    counters[0] = num_bytes_done
    with _Progress(total, counters) as progress:
        if workers == 1:
            tokenizer = load_tokenizer(job.output / "tokenizer")
            for unit in units:
                _write_unit(unit, job, tokenizer, _counting(counters, progress.show))
            return
        with concurrent.futures.ProcessPoolExecutor(
            workers, mp_context=context, initializer=_start_worker, initargs=(job, counters)
        ) as pool:
            pending = {pool.submit(_work, unit) for unit in units}
            try:
                while pending:
                    done, pending = concurrent.futures.wait(pending, timeout=0.2, return_when="FIRST_COMPLETED")
                    for future in done:
                        future.result()
                    progress.show()
            except BrokenProcessPool as error:
                raise UserError(
                    "A worker of prepare was killed, most likely for memory; run the same command with fewer "
                    f"--workers than {workers}: what is finished is kept."
                ) from error
            finally:
                counters[3] = 1
                pool.shutdown(wait=True, cancel_futures=True)


def _counting(counters, after: Callable[[], None]) -> Callable[..., None]:
    def on_progress(read_bytes: int = 0, text_bytes: int = 0, tokens: int = 0) -> None:
        with counters.get_lock():
            for i, number in enumerate((read_bytes, text_bytes, tokens)):
                counters[i] += number
        after()

    return on_progress


_worker = {}  # what _start_worker keeps for _work: job, tokenizer, on_progress, and the open lock file


def _start_worker(job: Job, counters) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the command itself stops us
    threading.Thread(target=_die_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a process a core is enough

    def stop_if_told():
        if counters[3]:
            raise _Stopped

    lock = open(job.output / RECEIPTS / "lock", "a")  # noqa: SIM115 (held as long as this process lives)
    try_lock(lock, fcntl.LOCK_SH)
    tokenizer = load_tokenizer(job.output / "tokenizer")
    _worker.update(job=job, tokenizer=tokenizer, on_progress=_counting(counters, stop_if_told), lock=lock)


def _die_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _work(unit: Unit) -> None:
    _write_unit(unit, _worker["job"], _worker["tokenizer"], _worker["on_progress"])


class _Progress:
    """Shows the counters on stderr: a bar on a terminal, otherwise a line every few seconds."""

    def __init__(self, total: int, counters):
        self._total, self._counters, self._first_read = max(1, total), counters, counters[0]
        self._started = time.monotonic()
        self._is_terminal = sys.stderr.isatty()
        self._every = 0.2 if self._is_terminal else 5.0
        self._shown = self._started

    def __enter__(self):
        if self._is_terminal:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

            columns = (BarColumn(), TaskProgressColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._task = self._bar.add_task("", total=self._total, completed=self._first_read)
            self._bar.start()
        return self

    def __exit__(self, *exception) -> None:
        self._show()
        if self._is_terminal:
            self._bar.stop()

    def show(self) -> None:
        """Brings the display up to date, at most every few moments."""
        if time.monotonic() - self._shown > self._every:
            self._shown = time.monotonic()
            self._show()

    def _show(self) -> None:
        read, text, tokens, _ = self._counters[:]
        seconds = max(1e-9, time.monotonic() - self._started)
        rates = f"{text / seconds / 1e6:.1f} MB/s, {tokens / seconds:,.0f} tokens/s"
        if self._is_terminal:
            self._bar.update(self._task, completed=read, description=rates)
        else:
            done = f"{read / self._total:.0%} of {self._total / 1e6:.1f} MB"
            print(f"prepare: {done}, {rates}, {seconds:.0f} s", file=sys.stderr, flush=True)


# ---- dataset.json


def _dataset_json(receipts: list[dict], source: dict, tokenizer: Tokenizer) -> dict:
    """Adds up the receipts. The fingerprint covers what a record can hold, hence not where the text came from."""
    splits = {}
    for name in SPLITS:
        parts = [receipt["splits"][name] for receipt in receipts]
        splits[name] = {count: sum(part[count] for part in parts) for count in COUNTS}
        splits[name]["shards"] = [part["shard"] for part in parts if part["shard"]]
    digests = {name: [receipt["splits"][name]["digest"] for receipt in receipts] for name in SPLITS}
    names = ("kind", "fingerprint", "vocab_size", "mask_id", "eos_id", "bos_id", "pad_id")
    return {
        "format": FORMAT,
        "sequence_length": source["sequence_length"],
        "fingerprint": _fingerprint([FORMAT, source["sequence_length"], tokenizer.fingerprint, digests]),
        "tokenizer": {name: getattr(tokenizer, name) for name in names},
        "splits": splits,
        "source": {**source, "num_empty_documents": sum(receipt["num_empty_documents"] for receipt in receipts)},
    }


def _check_splits(content: dict, *, heldout: float) -> None:
    """Raises UserError when there is nothing to train on; says so when nothing was held out against the user's wish."""
    splits, source = content["splits"], content["source"]
    if not any(split["num_documents"] for split in splits.values()):
        raise UserError(f"The {source['num_files']} input files hold no text at all; give files with text in them.")
    if not splits["train"]["num_documents"]:
        raise UserError(
            f"All {splits['heldout']['num_documents']} documents fell into the held-out split; lower --heldout "
            f"{heldout}, or cut the text into more documents with --documents or --document-start."
        )
    if heldout and not splits["heldout"]["num_documents"]:
        print(
            f"prepare: none of {splits['train']['num_documents']} documents fell into the held-out split; to have one, "
            f"raise --heldout {heldout} or cut the text into more documents.",
            file=sys.stderr,
        )

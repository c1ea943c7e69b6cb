"""The verb prepare: raw text -> tokenizer and packed records, in parallel, restartable at every
file it has finished.

The inputs are grouped into units. A unit is read, tokenized and packed by one process into its own
shards, and counts as done once its receipt is written; dataset.json comes last. So the result
depends on neither the number of processes nor the number of interruptions.
"""

import contextlib
import fcntl
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from llada_jax.data.build import (
    COUNTS,
    RECEIPTS,
    Job,
    check_splits,
    dataset_json,
    fingerprint,
    is_done,
    read_json,
    receipt_path,
    remove_leftovers,
    size_of,
    units_of,
    write_json,
    writing_to,
)
from llada_jax.data.packing import is_heldout
from llada_jax.data.records import JSON_NAME, write_dataset_json
from llada_jax.data.text import Cut, Input, check_cut, find_inputs, read_documents
from llada_jax.data.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece
from llada_jax.data.workers import run_units
from llada_jax.errors import UserError
from llada_jax.storage.locks import try_lock
from llada_jax.verbs.command_line import Parser

# A tokenizer is trained on at most this many characters: unigram training takes about 25 bytes of
# memory and, on one or two cores, 4 microseconds a character (32 million: 0.8 GB, two minutes).
SAMPLE_CHARS = 20_000_000

LOCK_SECONDS = 5.0  # how long the processes of a killed run are given to notice it


def main(argv: list[str]) -> None:
    """Runs the verb."""
    args = _parser().parse_args(argv)
    cut = Cut(
        documents=args.documents, text_field=args.text_field, document_start=args.document_start
    )
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
    print(
        json.dumps(content, indent=2, ensure_ascii=False)
        if args.json
        else summary(args.output, content)
    )


def _parser() -> Parser:
    parser = Parser(
        "prepare",
        "Tokenizes raw text and packs it into the records that train reads. Running it again "
        "continues.",
        "llada-jax prepare --input books/ --output data/books --sequence-length 1024 --tokenizer "
        "spm:8000",
    )
    parser.usage = "llada-jax prepare --input PATH... --output DIR --sequence-length T --tokenizer SPEC [flags]"
    add = parser.add_argument
    add(
        "--input",
        nargs="+",
        required=True,
        metavar="PATH",
        help="files, globs, directories or URLs",
    )
    add("--output", required=True, metavar="DIR", help="local directory of the data set")
    add("--sequence-length", type=int, required=True, metavar="T", help="tokens in a record")
    add(
        "--tokenizer",
        required=True,
        metavar="SPEC",
        help="spm:8000 or spm-bpe:8000 (trained), bytes, or a PATH",
    )
    add("--text-field", default="text", metavar="F", help="field or column with the text (text)")
    add(
        "--documents",
        default="",
        choices=("file", "line", "record"),
        metavar="HOW",
        help="a document is a file, line or record (.txt: file, others: record)",
    )
    add(
        "--document-start",
        default="",
        metavar="REGEX",
        help="a .txt line that matches begins a new document",
    )
    add(
        "--heldout",
        type=float,
        default=0.01,
        metavar="P",
        help="share of the documents held out (0.01)",
    )
    add("--workers", type=int, default=_num_cores(), metavar="N", help="processes (one a core)")
    add(
        "--add-mask-token",
        action="store_true",
        help="append a mask token to a tokenizer without one",
    )
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
    cut: Cut = Cut(),  # noqa: B008
    heldout: float = 0.01,
    workers: int = 1,
    add_mask_token: bool = False,
) -> dict:
    """Writes the data set directory `output` and returns the content of its dataset.json.

    Args:
        patterns: files, globs, directories, URLs.
        output: local directory: new, empty, or one in which the same preparation was interrupted or
            completed.
        sequence_length: T, tokens in a record.
        tokenizer: "spm:N", "spm-bpe:N", "bytes", or what `load_tokenizer` takes.
        cut: how files are cut into documents.
        heldout: share of the documents, chosen by the hash of their text, that goes into the split
            "heldout".
        workers: processes.
        add_mask_token: see `load_tokenizer`.

    Raises:
        UserError: unusable input, settings that differ from those of the directory, or a disk that
            does not take it.
    """
    # 1. What is to be done.
    _check_numbers(sequence_length=sequence_length, heldout=heldout, workers=workers)
    make_tokenizer, tokenizer_name = _parse_tokenizer(tokenizer, add_mask_token=add_mask_token)
    inputs = find_inputs(patterns)
    check_cut(inputs, cut)
    source = {
        "input": list(patterns),
        "num_files": len(inputs),
        "input_fingerprint": fingerprint([i.identity for i in inputs]),
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
        made = _tokenizer(
            output, source, lambda: make_tokenizer(_sample(inputs, cut, heldout=heldout))
        )
        # 4. The units that have no receipt yet.
        job = Job(output=output, sequence_length=sequence_length, cut=cut, heldout=heldout)
        units = units_of(inputs, job, made.fingerprint)
        remove_leftovers(output, units)
        pending = [unit for unit in units if not is_done(output, unit)]
        if pending:
            run_units(
                pending, job, workers=workers, num_bytes_done=size_of(units) - size_of(pending)
            )
        elif (output / JSON_NAME).exists():
            print(f"{output} is complete; nothing to do.", file=sys.stderr)
            return json.loads((output / JSON_NAME).read_text())
        # 5. dataset.json, the sign that all of it is there.
        receipts = [read_json(receipt_path(output, unit)) for unit in units]
        content = dataset_json(receipts, source, made)
        check_splits(content, heldout=heldout)
        write_dataset_json(output, content)
        return content


def summary(output, content: dict) -> str:
    """Returns what was written, in a few lines."""
    splits = content["splits"]
    total = {name: sum(split[name] for split in splits.values()) for name in COUNTS}
    bytes_per_token = total["num_bytes"] / total["num_tokens"]
    lines = [
        f"{output}: {total['num_documents']:,} documents, {total['num_bytes']:,} bytes, "
        f"{total['num_tokens']:,} tokens "
        f"({bytes_per_token:.3f} bytes/token), vocabulary {content['tokenizer']['vocab_size']:,}"
    ]
    for name, split in splits.items():
        padding = split["num_padding"] / max(1, split["num_records"] * content["sequence_length"])
        lines.append(
            f"  {name:<8}{split['num_records']:>12,} records of {content['sequence_length']:,} "
            "tokens, "
            f"{split['num_documents']:,} documents, {split['num_bytes']:,} bytes, {padding:.3%} "
            "padding"
        )
    if content["source"]["num_empty_documents"]:
        lines.append(f"  {content['source']['num_empty_documents']:,} empty documents were skipped")
    return "\n".join(lines)


# ---- what is to be done


def _check_numbers(*, sequence_length: int, heldout: float, workers: int) -> None:
    if sequence_length < 2:
        raise UserError(f"--sequence-length {sequence_length} must be at least 2; LLaDA uses 4096.")
    if not 0 <= heldout < 1:
        raise UserError(
            f"--heldout {heldout} must lie in [0, 1); 0.01 holds out one document in a hundred."
        )
    if workers < 1:
        raise UserError(f"--workers {workers} must be at least 1; leave it out to use every core.")


def _parse_tokenizer(
    spec: str, *, add_mask_token: bool
) -> tuple[Callable[[Iterable[str]], Tokenizer], str]:
    """Returns a function from sample texts to the tokenizer, and the name under which the settings
    are compared.
    """
    kind, colon, size = spec.partition(":")
    model_type = {"spm": "unigram", "spm-bpe": "bpe"}.get(kind)
    if model_type and colon:
        if not size.isdecimal():
            raise UserError(
                f"--tokenizer {spec}: {size!r} is no vocabulary size; write for example "
                f"{kind}:8000."
            )

        def train(texts: Iterable[str]) -> Tokenizer:
            print(
                f"prepare: training {spec} on at most {SAMPLE_CHARS / 1e6:.0f} MB of the text",
                file=sys.stderr,
            )
            return train_sentencepiece(texts, vocab_size=int(size), model_type=model_type)

        return train, spec
    tokenizer = load_tokenizer(spec, add_mask_token=add_mask_token)
    # The fingerprint rather than the path: the same model may have moved.
    name = spec if tokenizer.kind == "bytes" else f"{tokenizer.kind} {tokenizer.fingerprint[:16]}"
    return lambda texts: tokenizer, name


# ---- the output directory


def _open_output(output) -> Path:
    """Creates the directory and checks that it is empty or ours."""
    if "://" in str(output):
        raise UserError(
            f"--output {output} must be a local or mounted directory, since ArrayRecord files are "
            "written in place; "
            "copy the finished directory to where it is needed."
        )
    output = Path(output)
    with writing_to(output):
        output.mkdir(parents=True, exist_ok=True)
        foreign = sorted(entry.name for entry in output.iterdir() if entry.name != RECEIPTS)
        if foreign and not (output / RECEIPTS).is_dir():
            raise UserError(
                f"--output {output} is not empty (it holds {foreign[0]!r}) and was not begun by "
                "prepare; give a new "
                "directory."
            )
        (output / RECEIPTS).mkdir(exist_ok=True)
    return output


@contextlib.contextmanager
def _lock(output: Path):
    """Holds the directory against other prepare commands, and against processes of a killed one
    that still write.
    """
    with writing_to(output), open(output / RECEIPTS / "lock", "a") as file:
        deadline = time.monotonic() + LOCK_SECONDS
        while not try_lock(file, fcntl.LOCK_EX):
            if time.monotonic() > deadline:
                raise UserError(
                    f"Another prepare is writing into {output}; wait for it to end, or give "
                    "another --output."
                )
            time.sleep(0.05)
        try_lock(file, fcntl.LOCK_SH)  # shared from here on with the workers, see _start_worker
        yield


def _refuse_other_settings(output: Path, source: dict) -> None:
    """Raises UserError when the directory was begun with other settings, or is complete and the
    inputs have changed.
    """
    is_complete = (output / JSON_NAME).exists()
    file = output / JSON_NAME if is_complete else output / RECEIPTS / "settings.json"
    if not file.exists():
        return
    before = read_json(file)
    before = before.get("source", {}) if is_complete else before
    for key in (
        "sequence_length",
        "tokenizer",
        "documents",
        "text_field",
        "document_start",
        "heldout",
    ):
        if before.get(key) != source[key]:
            raise UserError(
                f"{output} was prepared with --{key.replace('_', '-')} {before.get(key)!r} and "
                "this command says "
                f"{source[key]!r}; give the same value, another --output, or delete the directory."
            )
    if is_complete and before.get("input_fingerprint") != source["input_fingerprint"]:
        raise UserError(
            f"{output} is complete, and its {before.get('num_files')} input files have changed "
            "since or others are "
            f"given now ({source['num_files']}); give another --output, or delete the directory."
        )


def _tokenizer(output: Path, source: dict, make: Callable[[], Tokenizer]) -> Tokenizer:
    """Returns the tokenizer saved in the directory; makes and saves it when there is none for these
    inputs.
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
        shutil.rmtree(directory, ignore_errors=True)
        partial = output / "tokenizer.partial"
        tokenizer.save(partial)
        partial.rename(directory)
        write_json(receipt, key)
    return tokenizer


def _sample(inputs: list[Input], cut: Cut, *, heldout: float) -> Iterator[str]:
    """Yields the beginning of every file, none of it held out, SAMPLE_CHARS in all.

    Files share the budget equally; what a small one does not use goes to the larger ones, which
    come later.
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

"""Small data sets of byte tokens, written the way `prepare` writes them."""

import json
from pathlib import Path

import numpy as np

from llada_jax.__main__ import main
from llada_jax.data.dialogue_units import ChatSettings
from llada_jax.data.preparation import prepare
from llada_jax.data.records import FORMAT, encode_record, write_dataset_json
from llada_jax.data.shards import write_shard
from llada_jax.data.tokenizer import load_tokenizer

SEQUENCE_LENGTH = 32


def write_dataset(
    directory: Path,
    tokens: dict[str, np.ndarray],
    *,
    sequence_length: int = SEQUENCE_LENGTH,
    starts: tuple[int, ...] = (0,),
) -> Path:
    """Writes a dataset of byte tokens, {split: tokens}, each split in one shard; `starts` are the
    places in a row at which documents start.
    """
    tokenizer = load_tokenizer("bytes")
    tokenizer.save(directory / "tokenizer")
    splits = {}
    for name, stream in tokens.items():
        rows = [stream[i : i + sequence_length] for i in range(0, len(stream), sequence_length)]
        is_start = [np.isin(np.arange(len(row)), starts) for row in rows]
        file = f"{name}-00000.records"
        write_shard(
            directory / file,
            (
                encode_record(
                    row, start, sequence_length=sequence_length, vocab_size=tokenizer.vocab_size
                )
                for row, start in zip(rows, is_start)
            ),
        )
        splits[name] = {
            "num_records": len(rows),
            "num_tokens": len(stream),
            "num_bytes": len(stream),
            "num_documents": len(rows) * (len(starts) - 1) + 1,
            "num_padding": len(rows) * sequence_length - len(stream),
            "shards": [{"file": file, "num_records": len(rows)}],
        }
    ids = {name: getattr(tokenizer, name) for name in ("mask_id", "eos_id", "bos_id", "pad_id")}
    described = {
        "kind": "bytes",
        "fingerprint": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        **ids,
    }
    content = {
        "format": FORMAT,
        "sequence_length": sequence_length,
        "fingerprint": "0" * 32,
        "tokenizer": described,
    }
    write_dataset_json(directory, {**content, "splits": splits, "source": {}})
    return directory


def circle_dataset(directory: Path) -> Path:
    """Letters that mostly go round in a circle, so that there is something to learn."""
    rng = np.random.default_rng(0)
    moves = rng.choice([1, 2, 5], p=[0.7, 0.2, 0.1], size=40_000)
    letters = (97 + np.cumsum(moves) % 26).astype(np.int32)
    directory.mkdir()
    return write_dataset(directory, {"train": letters[:36_000], "heldout": letters[36_000:]})


def lines_dataset(directory: Path, *, num_lines: int, sequence_length: int) -> Path:
    """Prepares documents of one line each, of which a row holds several; half are held out."""
    text = directory / "lines.txt"
    text.write_text("".join(f"line {i * i} of the text\n" for i in range(num_lines)))
    words = ["--input", str(text), "--output", str(directory / "data"), "--documents", "line"]
    words += ["--sequence-length", str(sequence_length), "--tokenizer", "bytes"]
    assert main(["prepare", *words, "--heldout", "0.5"]) == 0
    return directory / "data"


def dialogue_dataset(directory: Path, *, rows: str, tokenizer: str = "bytes") -> Path:
    """Dialogues of two short turns in byte tokens, whose answers repeat a letter of the prompt."""
    records = []
    rng = np.random.default_rng(0)
    for _ in range(400):
        letters = [chr(97 + number) for number in rng.integers(0, 26, 2)]
        turns = [
            {"role": role, "content": content}
            for letter in letters
            for role, content in (
                ("user", f"{letter}?"),
                ("assistant", letter.upper() * int(rng.integers(1, 9))),
            )
        ]
        records.append({"messages": turns})
    return _prepared(directory, records, tokenizer=tokenizer, rows=rows)


def pair_dataset(directory: Path, *, rows: str) -> Path:
    """Pairs in byte tokens: capitals of the prompt's letter are chosen, small ones rejected."""
    rng, records = np.random.default_rng(0), []
    for _ in range(400):
        letter, length = chr(97 + int(rng.integers(0, 26))), int(rng.integers(1, 5))
        answers = {"chosen": letter.upper() * length, "rejected": letter * (5 - length)}
        records.append({"prompt": f"{letter}{rng.integers(100)}?", **answers})
    return _prepared(directory, records, rows=rows, records="pairs")


def _prepared(directory: Path, lines: list[dict], *, tokenizer: str = "bytes", **settings) -> Path:
    directory.mkdir()
    (directory / "template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    (directory / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    prepare(
        [str(directory / "in.jsonl")],
        directory / "data",
        sequence_length=SEQUENCE_LENGTH,
        tokenizer=tokenizer,
        heldout=0.1,
        chat=ChatSettings(template=str(directory / "template.jinja"), **settings),
    )
    return directory / "data"

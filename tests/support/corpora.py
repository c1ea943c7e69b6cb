"""Corpora for `prepare`, and what tests look at in the data sets that it writes."""

import hashlib
import json
import random
from pathlib import Path

from llada_jax.data.preparation import prepare
from llada_jax.data.records import Records, read_dataset
from support.errors import error_of

T = 32


def write_corpus(folder: Path, *, num_files: int, num_documents: int, seed: int = 0) -> list[str]:
    """Writes .jsonl files of random sentences, some of them empty, and returns the texts in the
    order of the files.
    """
    rng = random.Random(seed)
    words = [
        "".join(rng.choice("bdfglmnprst") + rng.choice("aeiou") for _ in range(3))
        for _ in range(300)
    ]
    folder.mkdir(parents=True)
    texts = []
    for i in range(num_files):
        documents = [
            " ".join(rng.choices(words, k=rng.choice([0, 3, 40]))) for _ in range(num_documents)
        ]
        lines = "".join(json.dumps({"text": text}) + "\n" for text in documents)
        (folder / f"part-{i:03d}.jsonl").write_text(lines)
        texts += documents
    return texts


def tree(directory: Path) -> dict[str, str]:
    """Returns {relative path: hash} of a data set, without the receipts."""
    files = [
        path
        for path in sorted(directory.rglob("*"))
        if path.is_file() and "receipts" not in path.parts
    ]
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def stream(directory: Path, split: str) -> list[int]:
    """Returns all tokens of a split without padding, its shards one after the other."""
    return [
        t
        for row in Records(read_dataset(directory), split=split)
        for t in row["tokens"][row["segment_ids"] > 0].tolist()
    ]


def documents_of(tokens: list[int]) -> list[list[int]]:
    """Cuts the tokens of the tokenizer "bytes" at each EOS."""
    documents = [[]]
    for token in tokens:
        if token == 257:
            documents.append([])
        else:
            documents[-1].append(token)
    return documents[:-1]


def refusal(*args, **kwargs) -> str:
    """Returns the error with which `prepare` refuses."""
    return error_of(prepare, *args, **kwargs)

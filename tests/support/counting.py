"""Data sets whose token ids count up, so that every token of them is recognised in a batch."""

import itertools
from pathlib import Path

import numpy as np

from llada_jax.data.loader import train_batches
from llada_jax.data.records import FORMAT, encode_record, write_dataset_json
from llada_jax.data.shards import write_shard

T, V = 8, 200_000


def write_counting_dataset(
    directory: Path, *, first_token: int, train=(11, 6), heldout=(3, 2), fingerprint="beef"
) -> str:
    """Writes a dataset whose token ids count up from `first_token`, so that every token of it can
    be told apart.

    `train` and `heldout` give the records of each shard. A document begins at every 5th token; the
    last record of a shard is short by 3.
    """
    directory.mkdir()
    token, splits = itertools.count(first_token), {}
    for split, num_records_by_shard in {"train": train, "heldout": heldout}.items():
        shards, num_tokens = [], 0
        for i, num_records in enumerate(num_records_by_shard):
            records = []
            for k in range(num_records):
                tokens = list(itertools.islice(token, T - 3 if k == num_records - 1 else T))
                starts = [t % 5 == 0 for t in tokens]
                records.append(encode_record(tokens, starts, sequence_length=T, vocab_size=V))
                num_tokens += len(tokens)
            path = directory / f"{split}-{i:05d}.records"
            write_shard(path, records)
            shards.append({"file": path.name, "num_records": num_records})
        splits[split] = {
            "num_records": sum(num_records_by_shard),
            "num_tokens": num_tokens,
            "num_bytes": 3 * num_tokens,
            "num_documents": num_tokens // 5,
            "num_padding": sum(num_records_by_shard) * T - num_tokens,
            "shards": shards,
        }
    tokenizer = {"kind": "bytes", "fingerprint": fingerprint, "vocab_size": V}
    content = {
        "format": FORMAT,
        "sequence_length": T,
        "fingerprint": "f00d",
        "tokenizer": tokenizer,
        "splits": splits,
    }
    write_dataset_json(directory, content)
    return str(directory)


def batches(sources, *, num_batches: int, **kwargs) -> list[dict]:
    """The first batches; with the caller's thread only unless threads are asked for."""
    defaults = {"batch_size": 8, "sequence_length": T, "seed": 0, "num_threads": 0, "prefetch": 0}
    return list(itertools.islice(train_batches(sources, **{**defaults, **kwargs}), num_batches))


def rows_of(sources, *, num_rows: int, **kwargs) -> np.ndarray:
    """The tokens of the first rows of the global sequence, without random lengths: int32[num_rows,
    T].
    """
    got = batches(sources, num_batches=-(-num_rows // 8), random_length_probability=0.0, **kwargs)
    return np.concatenate([batch["tokens"] for batch in got])[:num_rows]

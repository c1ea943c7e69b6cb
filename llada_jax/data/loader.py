"""The training and held-out batches, read with grain from packed records.

A global batch is a pure function of (seed, step), with `row` the global row:
    record(step, row) = permutation_of_epoch[step * batch_size + row]
Every stage below is a grain MapDataset, that is, a function of an index without any state: shuffle,
repeat and mix map the index, and the random length draws from a generator that is keyed by (seed,
index). A host evaluates the function at the rows its devices own, so a step has the same rows on
1, 2 or 64 hosts, with any number of threads, and before and after a restart. The loader's whole
state is `step`, and starting at a late step replays nothing. It takes about 80 us per row, so that
threads suffice (docs/benchmarks.md). A map reads the records, because a grain source takes 40 us
more, for metrics of each read.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import grain
import numpy as np

from llada_jax.data.batch import FIELDS, PAIR_FIELDS, Field, check_copies
from llada_jax.data.dialogue_rows import (
    BucketCut,
    EosPadded,
    check_dialogues,
    draw_answers,
    split_in_two,
)
from llada_jax.data.records import DatasetInfo, Records, check_shards, read_dataset
from llada_jax.errors import UserError

# Of the answers of held-out dialogues that are scored: the same ones in every evaluation that reads
# as many batches.
_HELDOUT_ANSWERS = 0

# (a dataset, or its directory, whose description is then read; its weight in the mixture)
Source = tuple[str | DatasetInfo, float]
Batch = dict[str, np.ndarray]

# An endless data set has sys.maxsize rows, of which grain's batch divides a float: rounded up, that
# is more than len() can say.
_MOST_ROWS = 2**62

# What a random stream is for; see _stream.
_SHUFFLE, _LENGTH, _ANSWER, _SPLIT = 0, 1, 2, 3


def train_batches(
    sources: Sequence[Source],
    *,
    batch_size: int,
    sequence_length: int,
    seed: int,
    rows: Sequence[int] | None = None,
    start_step: int = 0,
    batch_number: Callable[[int], int] = lambda step: step,
    random_length_probability: float = 0.01,
    attend_across_documents: bool = True,
    split_probability: float = 0.0,
    eos_padding: int = 0,
    padding_cycle: Sequence[int] = (),
    copies: int = 1,
    length_buckets: Sequence[int] = (),
    num_threads: int = 4,
    prefetch: int = 8,
) -> Iterator[Batch]:
    """Returns the endless batches of the mixture from `start_step` on.

    Each dataset is reshuffled in every epoch and repeated; the datasets take turns in the
    proportion of their weights (grain rounds a weight to 1% of the smallest one), so that no record
    of a dataset is seen twice before all are seen once.

    Args:
        sources: (dataset or its directory, weight) of each.
        batch_size: B, the global batch in sequences; one larger than the dataset repeats it within
            a batch.
        sequence_length: T; must be that of the records.
        seed: non-negative; decides the order and the random lengths.
        rows: the global rows in [0, B) that this host reads, in the order of the returned arrays;
            all by default. Hosts may own rows that are not contiguous and, where the mesh
            replicates, rows that others own too.
        start_step: the step of the first batch.
        batch_number: step -> the number of the batch that it reads, both counted from 0; differs
            from the step where a rollback has taken batches out of the order. It is asked at every
            step, because such a stretch may lie anywhere ahead of `start_step`.
        random_length_probability: how often a row keeps only its first U{1..T} tokens and the rest
            becomes padding (1% in LLaDA, arXiv 2502.09992).
        attend_across_documents: True (as LLaDA published) makes all tokens of a row one segment
            with positions 0..T-1; False gives each document its own segment and positions.
        split_probability: how often a row is cut in two; see dialogue_rows.split_in_two.
        eos_padding: of dialogues with a row each: rows are filled up to the longest of each group
            of this many consecutive rows; 0: not at all. padding_cycle: with which tokens, in turn;
            (): with end-of-text. See dialogue_rows.EosPadded.
        copies: how many consecutive rows of a batch hold the same record, for objectives that ask
            for it; batch_size must be a multiple.
        length_buckets: of rows of one dialogue or pair each: ascending lengths below T; a batch is
            trimmed to the shortest that holds all B rows, whichever host reads them.
        num_threads: threads that read ahead; 0 reads in the caller's thread.
        prefetch: batches that are kept ready, R * T * 13 bytes each, and at least num_threads.

    Returns an iterator of {"tokens", "segment_ids", "positions": int32[R,T], "is_maskable":
    bool[R,T]}, R = len(rows), and of pairs also "is_chosen". Padding has token 0, segment 0 and is
    not maskable; of dialogues, only answers are.

    Raises UserError at once for unusable datasets or arguments, and from `next` for a damaged
    record.
    """
    infos = _open(sources, sequence_length=sequence_length)
    if seed < 0:
        raise UserError(f"seed is {seed} and must not be negative: choose 0 or more.")
    check_copies(batch_size, copies)
    check_dialogues(
        infos,
        batch_size=batch_size,
        random_length_probability=random_length_probability,
        attend_across_documents=attend_across_documents,
        eos_padding=eos_padding,
        padding_cycle=padding_cycle,
        split_probability=split_probability,
        length_buckets=length_buckets,
    )
    shuffled = [
        _with_drawn_answers(
            grain.MapDataset.range(info.splits["train"].num_records)
            .shuffle(seed=_stream(seed, _SHUFFLE, number))
            .repeat()
            .map(_records(info, "train", attend_across_documents).__getitem__),
            info,
            seed=_stream(seed, _ANSWER, number),
        )
        for number, info in enumerate(infos)
    ]
    dataset = (
        grain.MapDataset.mix(shuffled, [weight for _, weight in sources])
        .random_map(_random_length(random_length_probability), seed=_stream(seed, _LENGTH, 0))
        .map(_row_for(attend_across_documents))
    )
    if split_probability:
        dataset = dataset.random_map(split_in_two(split_probability), seed=_stream(seed, _SPLIT, 0))
    rows = _check_rows(rows, batch_size=batch_size)
    if eos_padding:
        cycle = tuple(padding_cycle) or (infos[0].tokenizer["eos_id"],)
        dataset = EosPadded(dataset, num_rows=eos_padding, cycle=cycle)
    rows_of = functools.partial(
        _HostRows,
        dataset,
        batch_size=batch_size,
        start_step=start_step,
        batch_number=batch_number,
        copies=copies,
    )
    dataset = rows_of(rows=rows).batch(len(rows))
    if length_buckets:
        once = range(0, batch_size, copies)
        lengths = (*length_buckets, sequence_length)
        dataset = BucketCut(dataset, rows_of(rows=once), num_rows=len(once), lengths=lengths)
    return _iterate(dataset, num_threads=num_threads, prefetch=prefetch)


def heldout_batches(
    dataset: str | DatasetInfo,
    *,
    batch_size: int,
    sequence_length: int,
    split: str = "heldout",
    rows: Sequence[int] | None = None,
    attend_across_documents: bool = True,
    max_batches: int | None = None,
    subset_seed: int | None = None,
    num_threads: int = 4,
    prefetch: int = 8,
) -> Iterator[Batch]:
    """Returns the batches of a split in file order: every token exactly once, whole rows, no random
    length.

    The last batch is filled with empty rows (segment 0, not maskable), so that all hosts see the
    same number of batches of the same shape. `train_batches` explains the other arguments.

    Args:
        max_batches: how many are read; None: all.
        subset_seed: chooses a random subset where the split has more rows, the same in every call.
            None takes the first rows, which `prepare` may all have written from one source.
    """
    (info,) = _open([(dataset, 1.0)], sequence_length=sequence_length, split=split)
    rows = _check_rows(rows, batch_size=batch_size)
    records = _records(info, split, attend_across_documents)
    num_rows = batch_size * (max_batches or 0)
    if subset_seed is not None and 0 < num_rows < len(records):
        chosen = np.random.default_rng(subset_seed).permutation(len(records))[:num_rows]
        # in file order, which reads fastest
        records = _Chosen(records, np.sort(chosen))  # type: ignore[assignment]
    check_dialogues([info], attend_across_documents=attend_across_documents)
    fields = fields_of(info)
    source = _Padded(records, fields, multiple=batch_size, sequence_length=sequence_length)
    scored = grain.MapDataset.range(len(source)).map(source.__getitem__)
    scored = _with_drawn_answers(scored, info, seed=_HELDOUT_ANSWERS)
    scored = scored.map(_row_for(attend_across_documents))
    batches = _HostRows(scored, batch_size=batch_size, rows=rows, start_step=0).batch(len(rows))
    return islice(_iterate(batches, num_threads=num_threads, prefetch=prefetch), max_batches)


@dataclass(frozen=True, kw_only=True)
class SourceSummary:
    """What a run prints about one dataset of its mixture."""

    info: DatasetInfo
    share: float  # of the rows that training reads, between 0 and 1
    num_records: int  # in the train split, as are the next two
    num_tokens: int
    num_padding: int
    bytes_per_token: dict[str, float]  # by split: bits/byte = nats/token / ln 2 / bytes_per_token
    fields: Mapping[str, Field]  # of its batches

    @property
    def directory(self) -> str:
        """Where the dataset is."""
        return self.info.directory

    @property
    def fingerprint(self) -> str:
        """Of all its records."""
        return self.info.fingerprint

    def num_epochs(self, num_rows: float) -> float:
        """Returns how often `num_rows` rows of the mixture go through this dataset."""
        return num_rows * self.share / self.num_records


def describe(sources: Sequence[Source], *, sequence_length: int) -> tuple[SourceSummary, ...]:
    """Returns a summary of each dataset, after the same checks as `train_batches` and a look at the
    sizes of all shards, which a run takes once.
    """
    infos = _open(sources, sequence_length=sequence_length)
    for info in infos:
        check_shards(info)
    total_weight = sum(weight for _, weight in sources)
    return tuple(
        SourceSummary(
            info=info,
            share=weight / total_weight,
            num_records=info.splits["train"].num_records,
            num_tokens=info.splits["train"].num_tokens,
            num_padding=info.splits["train"].num_padding,
            bytes_per_token={
                name: split.num_scored_bytes / split.num_scored_tokens
                for name, split in info.splits.items()
                if split.num_scored_tokens
            },
            fields=fields_of(info),
        )
        for info, (_, weight) in zip(infos, sources, strict=True)
    )


def fields_of(info: DatasetInfo) -> Mapping[str, Field]:
    """Returns the fields of the batches that a data set gives."""
    return PAIR_FIELDS if info.dialogues and info.dialogues.are_pairs else FIELDS


class _HostRows(grain.MapDataset):
    """Maps a host's n-th row, which is a step and a place in `rows`, to the parent's row
    (batch_number(step) * B + rows[place]) // copies.
    """

    def __init__(
        self,
        parent: grain.MapDataset,
        *,
        batch_size: int,
        rows: Sequence[int],
        start_step: int,
        batch_number: Callable[[int], int] = lambda step: step,
        copies: int = 1,
    ):
        super().__init__(parent)
        self._batch_size, self._rows, self._start_step = batch_size, tuple(rows), start_step
        self._batch_number, self._copies = batch_number, copies

    def __len__(self) -> int:
        num_rows = min(len(self._parent) * self._copies, _MOST_ROWS)
        num_steps = num_rows // self._batch_size - self._start_step
        return min(num_steps * len(self._rows), _MOST_ROWS)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.slice(index)
        step, place = divmod(index, len(self._rows))
        batch = self._batch_number(self._start_step + step)
        return self._parent[(batch * self._batch_size + self._rows[place]) // self._copies]


class _Chosen:
    """Some rows of a source."""

    def __init__(self, records: Records, indices: np.ndarray):
        self._records, self._indices = records, indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return self._records[int(self._indices[index])]


class _Padded:
    """A source followed by empty rows, up to a multiple of the batch size."""

    def __init__(
        self,
        records: Records | _Chosen,
        fields: Mapping[str, Field],
        *,
        multiple: int,
        sequence_length: int,
    ):
        self._records, self._fields = records, fields
        self._sequence_length = sequence_length
        self._length = -(-len(records) // multiple) * multiple

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if index < len(self._records):
            return self._records[index]
        return {
            name: np.zeros(self._sequence_length, field.dtype)
            for name, field in self._fields.items()
        }


def _open(
    sources: Sequence[Source], *, sequence_length: int, split: str = "train"
) -> list[DatasetInfo]:
    """Reads every dataset of a mixture; UserError when they cannot be trained on together."""
    if not sources:
        raise UserError(
            "No dataset is given: name at least one directory that llada-jax prepare wrote."
        )
    infos = []
    for dataset, weight in sources:
        info = dataset if isinstance(dataset, DatasetInfo) else read_dataset(dataset)
        directory = info.directory
        # Their sum and their ratio, a hundredfold, must be floats.
        if not 1e-100 <= weight <= 1e100:
            raise UserError(
                f"{directory} has weight {weight}: give a number from 1e-100 to 1e100, or leave "
                "the dataset out."
            )
        if info.sequence_length != sequence_length:
            raise UserError(
                f"{directory} holds records of sequence_length {info.sequence_length} and "
                f"{sequence_length} is asked for: set sequence_length to {info.sequence_length}, "
                f"or prepare the text again with --sequence-length {sequence_length}."
            )
        info.filled_split(split)
        if infos and info.tokenizer["fingerprint"] != infos[0].tokenizer["fingerprint"]:
            raise UserError(
                f"{infos[0].directory} and {directory} were written with different tokenizers "
                f"({infos[0].tokenizer['fingerprint'][:12]} and "
                f"{info.tokenizer['fingerprint'][:12]}): prepare both with "
                f"--tokenizer {infos[0].directory}/tokenizer."
            )
        if infos and fields_of(info) != fields_of(infos[0]):
            raise UserError(
                f"One of {infos[0].directory} and {directory} holds pairs of answers and the other "
                "does not; mix data sets of one kind only."
            )
        infos.append(info)
    return infos


def _with_drawn_answers(dataset: grain.MapDataset, info: DatasetInfo, *, seed: int):
    """Draws an answer of each dialogue where the data set asks for that, by the index."""
    if info.dialogues is None or info.dialogues.turns != "one":
        return dataset
    return dataset.random_map(draw_answers(info.tokenizer["eos_id"]), seed=seed)


def _records(info: DatasetInfo, split: str, attend_across_documents: bool) -> Records:
    return Records(info, split=split, with_documents=not attend_across_documents)


def _check_rows(rows: Sequence[int] | None, *, batch_size: int) -> Sequence[int]:
    """Returns the rows to read, all of them for None.

    Raises UserError for a batch without rows, and ValueError for a row outside the batch, which is
    a mistake in the calling code.
    """
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size} and must be at least 1.")
    rows = range(batch_size) if rows is None else [int(row) for row in rows]
    if not rows or min(rows) < 0 or max(rows) >= batch_size:
        raise ValueError(f"{rows=} must be some of the global rows 0..{batch_size - 1}")
    return rows


def _stream(seed: int, purpose: int, number: int) -> int:
    """Returns a 32-bit seed for one random stream.

    The three numbers are hashed, because grain shuffles epoch e with seed + e: with plain seeds,
    epoch 1 of a run with seed 0 would be epoch 0 of the run with seed 1.
    """
    return int(np.random.SeedSequence([seed, purpose, number]).generate_state(1)[0])


def _random_length(probability: float):
    """Returns the map that keeps, with this probability, only the first U{1..T} tokens of a row."""
    if not 0 <= probability <= 1:
        raise UserError(f"random_length_probability is {probability} and must lie between 0 and 1.")

    def random_length(row: dict, rng: np.random.Generator) -> dict:
        if rng.random() >= probability:
            return row
        num_kept = int(rng.integers(1, len(row["tokens"]), endpoint=True))
        is_kept_T = np.arange(len(row["tokens"])) < num_kept
        return {name: values_T * is_kept_T for name, values_T in row.items()}

    return random_length


def _row_for(attend_across_documents: bool):
    """Returns the map from a decoded record to a row of a batch."""

    def one_segment(row: dict) -> dict:
        is_real_T = row["segment_ids"] > 0
        positions_T = np.arange(len(is_real_T), dtype=np.int32)
        return {
            "is_maskable": is_real_T,
            **row,
            "segment_ids": is_real_T.astype(np.int32),
            "positions": positions_T,
        }

    def segment_per_document(row: dict) -> dict:
        return {"is_maskable": row["segment_ids"] > 0, **row}

    return one_segment if attend_across_documents else segment_per_document


def _iterate(dataset: grain.MapDataset, *, num_threads: int, prefetch: int) -> Iterator[Batch]:
    """Yields the elements; threads read ahead, and end with the iteration."""
    iterator = iter(
        dataset.to_iter_dataset(
            # a thread without a place for its batch in the buffer would have nothing to do
            grain.ReadOptions(
                num_threads=num_threads, prefetch_buffer_size=max(prefetch, num_threads)
            )
        )
    )
    try:
        yield from iterator
    finally:
        iterator.close()

"""The loader: a global batch is a pure function of (seed, step), and every token is seen once per
epoch.
"""

import ast
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.counting import T, batches, rows_of, write_counting_dataset

from llada_jax.data import loader
from llada_jax.data.loader import describe, heldout_batches, train_batches
from llada_jax.storage import files

KEYS = ("tokens", "segment_ids", "positions", "is_maskable")


def assert_equal(batch: dict, expected: dict) -> None:
    assert set(batch) == set(expected) == set(KEYS)
    for key in KEYS:
        assert batch[key].dtype == (bool if key == "is_maskable" else np.int32)
        np.testing.assert_array_equal(batch[key], expected[key])


def take_rows(batch: dict, rows) -> dict:
    return {key: values_BT[list(rows)] for key, values_BT in batch.items()}


@pytest.mark.parametrize("num_hosts", [1, 2, 4, 8])
@pytest.mark.parametrize("layout", ["contiguous", "interleaved"])
@pytest.mark.parametrize("attend_across_documents", [True, False])
def test_any_number_of_hosts_assembles_the_same_global_batches(
    small, large, num_hosts, layout, attend_across_documents
):
    kwargs = {
        "num_batches": 7,
        "random_length_probability": 0.3,
        "attend_across_documents": attend_across_documents,
    }
    sources = [(small, 1.0), (large, 2.0)]
    expected = batches(sources, **kwargs)
    per_host = 8 // num_hosts
    for host in range(num_hosts):
        contiguous = range(host * per_host, (host + 1) * per_host)
        rows = contiguous if layout == "contiguous" else range(host, 8, num_hosts)
        for batch, whole in zip(batches(sources, rows=rows, **kwargs), expected, strict=True):
            assert_equal(batch, take_rows(whole, rows))


@pytest.mark.parametrize(("num_threads", "prefetch"), [(1, 1), (3, 2), (16, 40)])
def test_threads_and_prefetch_change_nothing(small, num_threads, prefetch):
    kwargs = {"num_batches": 12, "random_length_probability": 0.3}
    expected = batches([(small, 1.0)], **kwargs)
    for batch, whole in zip(
        batches([(small, 1.0)], num_threads=num_threads, prefetch=prefetch, **kwargs),
        expected,
        strict=True,
    ):
        assert_equal(batch, whole)


def test_a_start_in_the_middle_continues_the_batches_of_a_whole_run(small, large):
    sources = [(small, 1.0), (large, 2.0)]
    kwargs = {"random_length_probability": 0.3, "num_batches": 4}
    whole = batches(sources, **{**kwargs, "num_batches": 11})
    for batch, expected in zip(batches(sources, start_step=7, **kwargs), whole[7:], strict=True):
        assert_equal(batch, expected)
    left_out = batches(sources, start_step=3, batch_number=lambda step: step + 4, **kwargs)
    for batch, expected in zip(left_out, whole[7:], strict=True):
        assert_equal(batch, expected)


def test_a_batch_may_be_a_single_row(small):
    (whole,) = batches([(small, 1.0)], num_batches=1, batch_size=3)
    for row, batch in enumerate(batches([(small, 1.0)], num_batches=3, batch_size=1)):
        assert_equal(batch, take_rows(whole, [row]))


@pytest.mark.slow
@given(
    step=st.integers(0, 19),
    rows=st.lists(st.integers(0, 4), min_size=1, max_size=6),
    num_threads=st.integers(0, 3),
    seed=st.sampled_from([0, 2**40]),
)
@settings(max_examples=25)
def test_any_rows_of_any_step_are_those_of_the_global_batch(
    small, large, step, rows, num_threads, seed
):
    kwargs = {"batch_size": 5, "seed": seed, "random_length_probability": 0.3}
    sources = [(large, 0.6), (small, 0.4)]
    expected = batches(sources, num_batches=20, **kwargs)[step]
    (batch,) = batches(
        sources,
        num_batches=1,
        start_step=step,
        rows=rows,
        num_threads=num_threads,
        prefetch=num_threads,
        **kwargs,
    )
    assert_equal(batch, take_rows(expected, rows))


def test_a_start_at_a_late_step_reads_no_record_of_the_steps_before(small, monkeypatch):
    # The thread of each read, because threads of other tests may still be reading ahead.
    readers = []
    read = loader.Records.__getitem__

    def counted(self, index):
        readers.append(threading.get_ident())
        return read(self, index)

    monkeypatch.setattr(loader.Records, "__getitem__", counted)
    batches([(small, 1.0)], num_batches=2, start_step=10**12)
    assert readers.count(threading.get_ident()) == 2 * 8


@pytest.mark.parametrize("attend_across_documents", [True, False])
def test_every_token_is_seen_exactly_once_an_epoch(small, attend_across_documents):
    got = batches(
        [(small, 1.0)],
        num_batches=17,  # 17 batches of 8 rows are 8 epochs of 17 records.
        random_length_probability=0.0,
        attend_across_documents=attend_across_documents,
    )
    tokens = np.concatenate([batch["tokens"] for batch in got]).reshape(8, 17 * T)
    is_maskable = np.concatenate([batch["is_maskable"] for batch in got]).reshape(8, 17 * T)
    for epoch in range(8):
        assert sorted(tokens[epoch][is_maskable[epoch]]) == list(range(1, 131))
        assert not tokens[epoch][~is_maskable[epoch]].any()


def test_epochs_and_seeds_have_orders_of_their_own(small):
    def orders(seed):
        return [
            tuple(order)
            for order in rows_of([(small, 1.0)], num_rows=5 * 17, seed=seed)[:, 0].reshape(5, 17)
        ]

    assert orders(3) == orders(3)
    # Among them epoch 1 of seed 0 and epoch 0 of seed 1, which grain's own rule (seed + epoch)
    # would make the same.
    assert len({*orders(0), *orders(1), *orders(2)}) == 15


@pytest.mark.slow
def test_the_shuffle_moves_records_everywhere(large):
    first = rows_of([(large, 1.0)], num_rows=50 * 100)[:, 0].reshape(50, 100) - 10_000
    # Mean place of each record over 50 epochs: 49.5 with a standard error of 28.9 / sqrt(50) =
    # 4.09.
    places = np.argsort(first, axis=1)
    assert abs(places.mean(axis=0) - 49.5).max() < 5 * 4.09
    # How often a record follows its neighbour in the corpus: 1 in 100 by chance.
    follows = (np.diff(first, axis=1) == T).mean()
    assert follows < 0.02


def test_a_dataset_smaller_than_the_batch_repeats_within_it(tmp_path):
    one = write_counting_dataset(tmp_path / "one", first_token=1, train=(1,), heldout=())
    (batch,) = batches([(one, 1.0)], num_batches=1, random_length_probability=0.0)
    np.testing.assert_array_equal(batch["tokens"], [[1, 2, 3, 4, 5, 0, 0, 0]] * 8)
    three = write_counting_dataset(tmp_path / "three", first_token=1, train=(3,), heldout=())
    first = rows_of([(three, 1.0)], num_rows=9)[:, 0].reshape(3, 3)
    assert [sorted(epoch) for epoch in first] == [[1, 9, 17]] * 3


def lengths_of_full_rows(
    large: str, *, num_batches: int, random_length_probability: float
) -> np.ndarray:
    """The lengths of rows, 64 per batch, without those of the one record of `large` that is short
    anyway.
    """
    kwargs = {"batch_size": 64, "random_length_probability": random_length_probability}
    got = batches([(large, 1.0)], num_batches=num_batches, **kwargs)
    lengths = np.concatenate([batch["is_maskable"].sum(axis=1) for batch in got])
    return lengths[np.concatenate([batch["tokens"][:, 0] for batch in got]) != 10_000 + 99 * T]


@pytest.mark.slow
@pytest.mark.parametrize(("probability", "num_batches"), [(0.01, 150), (0.3, 50)])
def test_the_rate_of_random_lengths_is_the_probability(large, probability, num_batches):
    lengths = lengths_of_full_rows(
        large, num_batches=num_batches, random_length_probability=probability
    )
    # A draw of U{1..T} that gives T cuts nothing, so a full row is seen to be cut with probability
    # p (T - 1) / T.
    rate = probability * (T - 1) / T
    assert abs((lengths < T).sum() - len(lengths) * rate) < 4 * np.sqrt(
        len(lengths) * rate * (1 - rate)
    )


@pytest.mark.slow
def test_random_lengths_are_uniform_from_1_to_the_sequence_length(large):
    lengths = lengths_of_full_rows(large, num_batches=50, random_length_probability=1.0)
    observed, expected = np.bincount(lengths, minlength=T + 1), len(lengths) / T
    assert observed[0] == 0
    assert (
        (observed[1:] - expected) ** 2 / expected
    ).sum() < 29.9  # chi-square, 7 degrees of freedom, p = 1e-4


@pytest.mark.parametrize("attend_across_documents", [True, False])
def test_a_shortened_row_is_the_beginning_of_the_whole_row(large, attend_across_documents):
    kwargs = {"num_batches": 20, "attend_across_documents": attend_across_documents}
    got = batches([(large, 1.0)], random_length_probability=1.0, **kwargs)
    whole = batches([(large, 1.0)], random_length_probability=0.0, **kwargs)
    for batch, expected in zip(got, whole, strict=True):
        kept_BT = np.arange(T) < batch["is_maskable"].sum(axis=1, keepdims=True)
        np.testing.assert_array_equal(batch["is_maskable"], kept_BT)
        np.testing.assert_array_equal(batch["tokens"], np.where(kept_BT, expected["tokens"], 0))
        np.testing.assert_array_equal(
            batch["segment_ids"], np.where(kept_BT, expected["segment_ids"], 0)
        )
        assert (kept_BT <= expected["is_maskable"]).all()


def test_attention_across_documents_makes_one_segment_of_a_row(small):
    for batch in batches([(small, 1.0)], num_batches=9, random_length_probability=0.2):
        np.testing.assert_array_equal(batch["segment_ids"], batch["is_maskable"].astype(np.int32))
        np.testing.assert_array_equal(batch["positions"], np.tile(np.arange(T), (8, 1)))


def test_without_attention_across_documents_each_has_its_segment_and_positions(small):
    got = batches(
        [(small, 1.0)], num_batches=9, random_length_probability=0.2, attend_across_documents=False
    )
    for batch in got:
        for tokens, segments, positions, is_maskable in zip(
            *(batch[key] for key in KEYS), strict=True
        ):
            segment, position = 0, 0
            for i in range(T):
                if not is_maskable[i]:
                    assert tokens[i] == segments[i] == positions[i] == 0
                    continue
                is_start = i == 0 or tokens[i] % 5 == 0
                segment, position = (segment + 1, 0) if is_start else (segment, position + 1)
                assert (segments[i], positions[i]) == (segment, position)


@pytest.mark.slow
@pytest.mark.parametrize("weights", [(1.0, 3.0), (0.7, 0.3), (5.0, 5.0), (0.02, 0.98)])
def test_a_mixture_keeps_its_weights_and_the_epochs_of_its_datasets(small, large, weights):
    sources = [(small, weights[0]), (large, weights[1])]
    tokens = rows_of(sources, num_rows=600)
    is_small = tokens[:, 0] < 10_000
    share = weights[0] / sum(weights)
    # Within a row at every length, next to grain's rounding of the larger weight to 1% of the
    # smaller one.
    counts = np.cumsum(is_small)
    assert (abs(counts - share * np.arange(1, 601)) < 1 + 0.01 * counts).all()
    for first, num_records in ((tokens[is_small][:, 0], 17), (tokens[~is_small][:, 0], 100)):
        for epoch in range(len(first) // num_records):
            assert (
                max(Counter(first[epoch * num_records : (epoch + 1) * num_records]).values()) == 1
            )
    np.testing.assert_array_equal(tokens, rows_of(sources, num_rows=600))


def test_the_same_dataset_twice_in_a_mixture_is_shuffled_independently(large):
    first = rows_of([(large, 1.0), (large, 1.0)], num_rows=200)[:, 0]
    assert (first[0::2] == first[1::2]).sum() < 10


@pytest.mark.parametrize(
    ("batch_size", "num_hosts"), [(1, 1), (2, 1), (4, 2), (5, 1), (8, 2), (8, 4)]
)
def test_heldout_batches_hold_every_token_exactly_once(small, batch_size, num_hosts):
    hosts = [range(host, batch_size, num_hosts) for host in range(num_hosts)]
    seen = []
    for rows in hosts:
        got = list(heldout_batches(small, batch_size=batch_size, sequence_length=T, rows=rows))
        assert len(got) == -(-5 // batch_size)
        for batch in got:
            assert batch["tokens"].shape == (len(rows), T)
            np.testing.assert_array_equal(batch["segment_ids"] > 0, batch["is_maskable"])
            seen += batch["tokens"][batch["is_maskable"]].tolist()
    assert sorted(seen) == list(range(131, 131 + 34))


def test_heldout_batches_are_in_file_order_and_end_with_empty_rows(small):
    first, last = heldout_batches(
        small, batch_size=4, sequence_length=T, attend_across_documents=False
    )
    assert first["tokens"][:, 0].tolist() == [131, 139, 147, 152]
    assert last["tokens"][:, 0].tolist() == [160, 0, 0, 0]
    assert not last["segment_ids"][1:].any()
    assert not last["is_maskable"][1:].any()


def test_heldout_batches_can_be_limited_and_take_another_split(small):
    kwargs = {"batch_size": 2, "sequence_length": T}
    assert len(list(heldout_batches(small, max_batches=2, **kwargs))) == 2
    got = heldout_batches(small, split="train", **kwargs)
    assert sum(batch["is_maskable"].sum() for batch in got) == 130


def test_a_limited_number_of_heldout_batches_is_a_random_subset_that_never_changes(small):
    def rows_of(seed, max_batches=1):
        (batch,) = heldout_batches(
            small, batch_size=2, sequence_length=T, max_batches=max_batches, subset_seed=seed
        )
        return batch["tokens"][:, 0].tolist()

    first = list(heldout_batches(small, batch_size=8, sequence_length=T))[0]["tokens"][:5, 0]
    chosen = [rows_of(seed) for seed in range(60)]
    assert chosen == [rows_of(seed) for seed in range(60)]
    assert all(a < b for a, b in chosen)  # two different rows, in file order
    counts = [sum(row in pair for pair in chosen) for row in first.tolist()]
    assert sum(counts) == 120  # and none that is not of the split
    assert min(counts) > 12  # 24 are expected of each of the five rows, with a deviation of 3.8


def test_a_split_that_is_no_larger_than_the_limit_is_read_whole(small):
    kwargs = {"batch_size": 2, "sequence_length": T}
    limited = list(heldout_batches(small, max_batches=3, subset_seed=0, **kwargs))
    for got, expected in zip(limited, heldout_batches(small, **kwargs), strict=True):
        np.testing.assert_array_equal(got["tokens"], expected["tokens"])


def test_describe_counts_what_a_run_prints(small, large):
    first, second = describe([(small, 1.0), (large, 3.0)], sequence_length=T)
    assert (first.share, second.share) == (0.25, 0.75)
    assert (first.num_records, first.num_tokens, first.num_padding) == (17, 130, 6)
    assert (second.num_records, second.num_tokens, second.num_padding) == (100, 797, 3)
    assert first.bytes_per_token == {"train": 3.0, "heldout": 3.0}
    assert second.bytes_per_token == {"train": 3.0}
    assert first.fingerprint == "f00d"
    assert first.num_epochs(680) == 10.0
    assert second.num_epochs(400) == 3.0


def test_the_sizes_of_shards_are_looked_at_once_and_not_at_each_evaluation(
    small, large, monkeypatch
):
    looked_at = []

    def sizes_in(folder, really=files.sizes_in):
        looked_at.append(str(folder).rstrip("/"))
        return really(folder)

    monkeypatch.setattr(files, "sizes_in", sizes_in)
    summaries = describe([(small, 1.0), (large, 1.0)], sequence_length=T)
    assert looked_at == [small, large]
    sources = [(summary.info, 1.0) for summary in summaries]
    batches(sources, num_batches=3)
    for _ in range(2):
        assert list(heldout_batches(summaries[0].info, batch_size=8, sequence_length=T))
    assert looked_at == [small, large]


def test_closing_the_iterator_ends_its_threads(small):
    before = set(threading.enumerate())
    iterator = train_batches(
        [(small, 1.0)], batch_size=2, sequence_length=T, seed=0, num_threads=3, prefetch=3
    )
    next(iterator)
    started = set(threading.enumerate()) - before
    assert started
    iterator.close()
    for thread in started:
        thread.join(timeout=10)
    assert not any(thread.is_alive() for thread in started)


def test_the_loader_imports_neither_jax_nor_the_model():
    tree = ast.parse(Path(loader.__file__).read_text())
    modules = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    modules |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not {name for name in modules if name.split(".")[0] in ("jax", "flax")}
    assert {name for name in modules if name.startswith("llada_jax")} == {
        "llada_jax.data.batch",
        "llada_jax.data.dialogue_rows",
        "llada_jax.data.records",
        "llada_jax.errors",
    }

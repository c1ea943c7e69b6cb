"""Frequent copies of the state on each host's own disk: the fast tier in front of the checkpoints
in the workdir.

    DIRECTORY/RUN/STEP.I-of-N/data        the slices that process I of N holds, one after the other,
                                          raw
                              index.json  where each lies, its checksum, the record of the run, and
                                          which attempt of the run wrote it

No host sees another's disk, so a step counts only when every process finds all of its slices,
written by one attempt; then each reads its own and nothing travels. For the same reason the copies
serve only the mesh that wrote them, and are lost with a host; the workdir's checkpoints serve any.
Files are not synced to the disk, since waiting for it would cost the time that this tier is there
to save: a process that is killed loses nothing that it had written, and what a machine that crashes
tears, the checksums show.
"""

import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from llada_jax.checkpoints.checksums import path_text
from llada_jax.checkpoints.record import RunRecord, sealed
from llada_jax.storage import files
from llada_jax.training.state import TrainState

# Kept next to the copy that is being written. No process waits for a write until the next save, so
# when this process writes copy k, another may still be writing k - 1 and have only k - 2 whole.
KEEP = 2
# How many steps each process reports to the others: KEEP, and what a killed save or an older
# attempt left. A fixed number, because processes exchange arrays of one shape.
MAX_FOUND = 8


class LocalCheckpoints:
    """The copies of one run on this host's disk.

    Args:
        directory: on a disk of this host: an SSD, or memory such as /dev/shm. Several runs and
            processes may share it.
        workdir: of the run, which names its folder.

    Raises:
        UserError: the directory cannot be written.
    """

    def __init__(self, directory, workdir):
        self._process, self._num_processes = jax.process_index(), jax.process_count()
        name = str(workdir).rstrip("/")
        # Of the whole path: runs of a sweep have workdirs with the same last name.
        digest = hashlib.sha256(name.encode()).hexdigest()[:12]
        self.directory = Path(directory).resolve() / f"{name.rpartition('/')[2]}-{digest}"
        with self._writing():
            self.directory.mkdir(parents=True, exist_ok=True)
            # Of a killed attempt. No process saves before all of them have come past here, so this
            # cannot be what another is writing.
            for leftover in (*self.directory.glob("*.partial"), *self.directory.glob("*.replaced")):
                shutil.rmtree(leftover, ignore_errors=True)
        # One number for all processes: parts of two attempts at the same step must not be mixed.
        # Random and not counted, because a disk that was replaced has no memory of earlier
        # attempts; of 32 bits, because JAX would cut a longer number on its way to the others.
        attempt = np.frombuffer(os.urandom(4), np.uint32)[0]
        self._attempt = int(multihost_utils.broadcast_one_to_all(attempt))
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="local-checkpoint")
        self._pending: Future | None = None

    # ---- saving

    def save(self, state: TrainState, record: RunRecord) -> None:
        """Begins to save; returns once the arrays have been copied and may be donated.

        Raises:
            UserError: an earlier save has failed.
        """
        self.wait()
        slices = {path: unique_slices(leaf) for path, leaf in paths_of(state)}
        # All copies are begun before the first is waited for.
        for data in jax.tree.leaves(slices):
            data.copy_to_host_async()
        # np.array copies: on the CPU np.asarray would be a view of a buffer that is donated soon.
        slices = jax.tree.map(np.array, slices)
        # int() here and not in the thread, before which the state may have been donated.
        self._pending = self._writer.submit(self._write, int(state.step), slices, record)

    def _write(self, step: int, slices: dict, record: RunRecord) -> None:
        """Writes the part of this process, which takes its name once it is whole."""
        who = f".{self._process}-of-{self._num_processes}"
        ours = sorted(
            before for before, name in self._parts() if name.endswith(who) and before < step
        )
        # Before the new copy is written and not after it, so that the disk needs room for KEEP + 1.
        self._remove(lambda other: other < min(ours[-KEEP:], default=0))
        index = {"attempt": self._attempt, "run": sealed(record), "arrays": {}}
        with files.whole_directory(self.directory / f"{step}{who}", durable=False) as partial:
            with open(partial / "data", "wb") as file:
                for path, parts in slices.items():
                    index["arrays"][path] = {
                        where: write_slice(file, array) for where, array in parts.items()
                    }
            (partial / "index.json").write_text(json.dumps(index))

    def wait(self) -> None:
        """Waits until the save under way is on the disk; raises UserError when it failed, for
        example on a full disk.
        """
        if self._pending is None:
            return
        # Forgotten before it is asked, so that a failure is reported once.
        pending, self._pending = self._pending, None
        with self._writing():
            pending.result()

    def close(self) -> None:
        """Waits for the save under way."""
        self.wait()
        self._writer.shutdown()

    def _writing(self):
        """Turns what the disk refuses into a UserError."""
        return files.writing(
            f"The local copy in {self.directory}",
            remedy="free space there, or give another config.checkpoint.local_directory",
        )

    def _parts(self) -> list[tuple[int, str]]:
        """Returns (step, name) of every whole part on this disk, of any process."""
        names = [path.name for path in self.directory.iterdir()]
        steps = [(name.partition(".")[0], name) for name in names]
        # Not those in the middle of a write, nor those that another process is removing.
        return [
            (int(step), name)
            for step, name in steps
            if step.isdigit() and not name.endswith((".partial", ".replaced"))
        ]

    def _remove(self, is_unwanted: Callable[[int], bool]) -> None:
        for step, name in self._parts():
            if is_unwanted(step):
                # Errors are ignored: another process of this host may be removing the same.
                shutil.rmtree(self.directory / name, ignore_errors=True)

    def drop_after(self, step: int) -> None:
        """Removes the copies of later steps when the run goes on from `step`: the run will come to
        those steps again, in another way.
        """
        self._remove(lambda other: other > step)

    # ---- restoring

    def restore(
        self, abstract: TrainState, *, newer_than: int
    ) -> tuple[TrainState | None, RunRecord | None, str]:
        """Returns (state, record, note) of the newest step that every process can read whole.

        All processes call it and get the same answer. Without such a step after `newer_than`, state
        and record are None. The note says in half a sentence why newer copies, if there were any,
        are not used; "" otherwise.
        """
        note = ""
        found = {pair: parts for pair, parts in self._found().items() if pair[0] > newer_than}
        everywhere = self._tell_all(sorted(found, reverse=True)[:MAX_FOUND])
        # The order is the same in every process, and so is the number of collective calls below: a
        # process that skipped one would leave the others waiting forever.
        for pair in sorted(set().union(*everywhere), reverse=True):
            lacking = [i for i, pairs in enumerate(everywhere) if pair not in pairs]
            why = "has no copy"
            if not lacking:
                # Reading is the check: only then does it show that a listed copy is whole and fits
                # this mesh. What has been read is kept, so that nothing is read twice.
                slices, record = self._read(found[pair], abstract)
                lacking = np.flatnonzero(
                    multihost_utils.process_allgather(np.int32(slices is None))
                ).tolist()
                why = "does not have all of its slices, undamaged and for this mesh"
            if not lacking:
                return assemble(abstract, slices), record, note  # type: ignore[arg-type]
            note = note or f"not the local copy of step {pair[0]}: process {lacking[0]} {why}"
        return None, None, note

    def _found(self) -> dict[tuple[int, int], list[dict]]:
        """Returns {(step, attempt): indexes of its parts on this disk}; what cannot be read is not
        there.
        """
        found = {}
        for step, name in self._parts():
            try:
                index = files.decode_json((self.directory / name / "index.json").read_text())
                pair = (step, int(index["attempt"]))
                if max(pair) > np.iinfo(np.uint32).max or min(pair) < 0:
                    # Processes tell each other such pairs in 32 bits.
                    continue
                # All parts on this disk together: after a restart a process may have another
                # number, and its slices may lie in the part of another process of this host.
                found.setdefault(pair, []).append({**index, "data": self.directory / name / "data"})
            except (OSError, ValueError, KeyError, TypeError, OverflowError):
                continue
        return found

    def _tell_all(self, pairs: list[tuple[int, int]]) -> list[set[tuple[int, int]]]:
        """Returns the (step, attempt) pairs of every process."""
        table = np.zeros((MAX_FOUND, 3), np.uint32)
        for row, pair in zip(table, pairs):
            # The 1 marks the row as used, since 0 is a possible number too.
            row[:] = (1, *pair)
        gathered = multihost_utils.process_allgather(table).reshape(
            self._num_processes, MAX_FOUND, 3
        )
        return [
            {(int(step), int(attempt)) for used, step, attempt in rows if used} for rows in gathered
        ]

    def _read(
        self, parts: list[dict], abstract: TrainState
    ) -> tuple[dict | None, RunRecord | None]:
        """Returns ({path: {slice: array}}, record) with all that this process needs; (None, None)
        if anything is missing or damaged.
        """
        slices = {}
        try:
            for path, leaf in paths_of(abstract):
                # Several devices may hold the same slice, which is read once.
                slices[path] = {}
                for index in leaf.sharding.addressable_devices_indices_map(leaf.shape).values():
                    where = range_text(index, leaf.shape)
                    if where not in slices[path]:
                        slices[path][where] = read_slice(parts, path, where, leaf)
            return slices, RunRecord.from_json(parts[0]["run"], file=parts[0]["data"])
        except (OSError, ValueError, KeyError, TypeError):
            # Whatever it is, an older copy or the workdir's checkpoint is as good; only the time
            # since then is lost.
            return None, None


def write_slice(file, array: np.ndarray) -> dict:
    """Appends the bytes of an array to an open file; returns what the index says about it."""
    entry = {"offset": file.tell(), "dtype": array.dtype.name, "shape": array.shape}
    content = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    file.write(content)
    return {**entry, "crc32": zlib.crc32(content)}  # type: ignore[arg-type]


def read_slice(parts: list[dict], path: str, where: str, leaf) -> np.ndarray:
    """Returns one slice of an array from the first part that has it.

    Args:
        parts: indexes of the parts on this disk, each with the path of its "data".
        path: of the array. where: what the slice covers, as of `range_text`.
        leaf: shape, dtype and sharding that it must have.

    Raises:
        KeyError, ValueError: no part has it, or the first one that has it is damaged.
    """
    part = next((part for part in parts if where in part["arrays"].get(path, {})), None)
    if part is None:
        raise KeyError(f"{path}[{where}]")
    entry = part["arrays"][path][where]
    shape = leaf.sharding.shard_shape(leaf.shape)
    # Another mesh or config may have left copies here, whose slices have other shapes.
    if entry["dtype"] != leaf.dtype.name or tuple(entry["shape"]) != shape:
        raise ValueError(
            f"{path} is {entry['dtype']}{entry['shape']} and should be {leaf.dtype.name}{shape}"
        )
    content = np.fromfile(
        part["data"],
        np.uint8,
        count=int(np.prod(shape)) * leaf.dtype.itemsize,
        offset=entry["offset"],
    )
    if zlib.crc32(content) != entry["crc32"]:  # type: ignore[arg-type]
        raise ValueError(f"{path}[{where}] does not match its saved checksum")
    return content.view(leaf.dtype).reshape(shape)


def assemble(abstract: TrainState, slices: dict) -> TrainState:
    """Returns the global state of which this process holds {path: {slice: array}}."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: on_devices(leaf, slices[path_text(path)]), abstract
    )


def on_devices(leaf, slices: dict[str, np.ndarray]) -> jax.Array:
    """Returns the global array of which this process holds `slices`.

    may_alias=False copies: the train step takes its buffers over, and what it must not take over
    is the memory of a numpy array.
    """
    placed = [
        jax.device_put(slices[range_text(index, leaf.shape)], device, may_alias=False)
        for device, index in leaf.sharding.addressable_devices_indices_map(leaf.shape).items()
    ]
    return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, placed)


def unique_slices(array: jax.Array) -> dict[str, jax.Array]:
    """Returns the distinct slices of an array that the devices of this process hold, by what they
    cover: what several devices hold is written once.
    """
    return {range_text(shard.index, array.shape): shard.data for shard in array.addressable_shards}


def range_text(index: tuple[slice, ...], shape: tuple[int, ...]) -> str:
    """Returns what a slice covers, as "0:4,8:16"; "" for a scalar."""
    ranges = (part.indices(size) for part, size in zip(index, shape))
    return ",".join(f"{start}:{stop}" for start, stop, _ in ranges)


def paths_of(tree) -> list[tuple[str, Any]]:
    """Returns (path as text, leaf) of every leaf."""
    return [(path_text(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]

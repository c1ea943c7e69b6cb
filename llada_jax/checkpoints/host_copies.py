"""Frequent copies of the state on each host's own disk: the fast tier in front of the checkpoints
in the workdir.

    DIRECTORY/RUN/STEP.I-of-N/data        the slices that process I of N holds, one after the other,
    raw
                              index.json  where each lies, its checksum, run.json, and which attempt
                              of the run wrote it

No host sees another's disk, so a step counts only when every process finds all of its slices,
written by one attempt; then each reads its own and nothing travels. For the same reason the copies
serve only the mesh that wrote them, and are lost with a host; the workdir's checkpoints serve any.
Files are not synced to the disk: a process that is killed loses nothing that it had written, and
what a crashed machine tears, the checksums tell.
"""

import hashlib
import json
import os
import shutil
import zlib
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from llada_jax.errors import UserError, reason
from llada_jax.training.state import TrainState

# Beside the one being written. Writing is not waited for until the next save, so that when this
# process writes step k another may still be writing k - 1 and has only k - 2 whole.
KEEP = 2
# steps that a process tells the others about: KEEP, and what a killed save or an older attempt left
MAX_FOUND = 8


class LocalCheckpoints:
    """The copies of one run on this host's disk.

    Args:
        directory: on a disk of this host: an SSD, or memory such as /dev/shm. Several runs and
            processes may share it.
        workdir: of the run, which names its folder.
    """

    def __init__(self, directory, workdir):
        self._process, self._num_processes = jax.process_index(), jax.process_count()
        name = str(workdir).rstrip("/")
        digest = hashlib.sha256(name.encode()).hexdigest()[:12]
        self.directory = (
            Path(directory).expanduser().resolve() / f"{name.rpartition('/')[2]}-{digest}"
        )
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            # of a killed attempt; nobody saves before all are here
            for partial in self.directory.glob("*.partial"):
                shutil.rmtree(partial, ignore_errors=True)
        except OSError as error:
            raise self._refused(error) from error
        attempt = np.frombuffer(os.urandom(4), np.uint32)[0]
        self._attempt = int(multihost_utils.broadcast_one_to_all(attempt))
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="local-checkpoint")
        self._pending: Future | None = None

    # ---- saving

    def save(self, state: TrainState, run: dict) -> None:
        """Begins to save; returns when the arrays have been copied and may be donated. A failed
        earlier save raises.
        """
        self.wait()
        slices = {path: unique_slices(leaf) for path, leaf in paths_of(state)}
        for data in jax.tree.leaves(slices):
            data.copy_to_host_async()
        slices = jax.tree.map(np.array, slices)
        self._pending = self._writer.submit(self._write, int(state.step), slices, run)

    def _write(self, step: int, slices: dict, run: dict) -> None:
        """Writes the part of this process: into a partial folder, which then takes its name."""
        who = f".{self._process}-of-{self._num_processes}"
        ours = sorted(
            before for before, name in self._parts() if name.endswith(who) and before < step
        )
        self._remove(lambda other: other < min(ours[-KEEP:], default=0))
        part = self.directory / f"{step}{who}"
        partial = part.with_name(part.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        index = {"attempt": self._attempt, "run": run, "arrays": {}}
        with open(partial / "data", "wb") as file:
            for path, parts in slices.items():
                entries = index["arrays"][path] = {}
                for where, array in parts.items():
                    entries[where] = {
                        "offset": file.tell(),
                        "dtype": array.dtype.name,
                        "shape": array.shape,
                    }
                    content = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
                    entries[where]["crc32"] = zlib.crc32(content)
                    file.write(content)
        (partial / "index.json").write_text(json.dumps(index))
        shutil.rmtree(part, ignore_errors=True)  # of an earlier attempt
        partial.rename(part)

    def wait(self) -> None:
        """Waits until the save under way is on the disk; raises UserError when it failed, for
        example on a full disk.
        """
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        try:
            pending.result()
        except OSError as error:
            raise self._refused(error) from error

    def close(self) -> None:
        """Waits for the save under way."""
        self.wait()
        self._writer.shutdown()

    def _refused(self, error: OSError) -> UserError:
        return UserError(
            f"The local copies in {self.directory} cannot be written ({reason(error)}): free space "
            "there, or give another config.checkpoint.local_directory."
        )

    def _parts(self) -> list[tuple[int, str]]:
        """Returns (step, name) of every whole part on this disk, of any process."""
        names = [
            path.name for path in self.directory.iterdir() if not path.name.endswith(".partial")
        ]
        return [
            (int(name.partition(".")[0]), name)
            for name in names
            if name.partition(".")[0].isdigit()
        ]

    def _remove(self, is_unwanted) -> None:
        for step, name in self._parts():
            if is_unwanted(step):
                # another process may do the same
                shutil.rmtree(self.directory / name, ignore_errors=True)

    def drop_after(self, step: int) -> None:
        """Removes the copies of later steps, when the run goes on from `step`: they are of a past
        that is given up.
        """
        self._remove(lambda other: other > step)

    # ---- restoring

    def restore(
        self, abstract: TrainState, *, newer_than: int
    ) -> tuple[TrainState | None, dict, str]:
        """Returns (state, run.json, note) of the newest step that every process can read whole.

        All processes call it and get the same answer. Without such a step after `newer_than` the
        state is None; the note says in half a sentence why newer copies, if there were any, are not
        used.
        """
        note = ""
        found = {pair: parts for pair, parts in self._found().items() if pair[0] > newer_than}
        everywhere = self._tell_all(sorted(found, reverse=True)[:MAX_FOUND])
        for pair in sorted(set().union(*everywhere), reverse=True):
            lacking = [i for i, pairs in enumerate(everywhere) if pair not in pairs]
            reason = "has no copy"
            if not lacking:
                slices, run = self._read(found[pair], abstract)
                lacking = np.flatnonzero(
                    multihost_utils.process_allgather(np.int32(slices is None))
                ).tolist()
                reason = "has not all of its slices, undamaged and for this mesh"
            if not lacking:
                return assemble(abstract, slices), run, note
            note = note or f"not the local copy of step {pair[0]}: process {lacking[0]} {reason}"
        return None, {}, note

    def _found(self) -> dict[tuple[int, int], list[dict]]:
        """Returns {(step, attempt): indexes of its parts on this disk}; what cannot be read is not
        there.
        """
        found = {}
        for step, name in self._parts():
            try:
                index = json.loads((self.directory / name / "index.json").read_text())
                found.setdefault((step, index["attempt"]), []).append(
                    {**index, "data": self.directory / name / "data"}
                )
            except (OSError, ValueError, KeyError, TypeError):
                continue
        return found

    def _tell_all(self, pairs: list[tuple[int, int]]) -> list[set[tuple[int, int]]]:
        """Returns the (step, attempt) pairs of every process."""
        table = np.zeros((MAX_FOUND, 3), np.uint32)
        for row, pair in zip(table, pairs):
            row[:] = (1, *pair)
        gathered = multihost_utils.process_allgather(table).reshape(
            self._num_processes, MAX_FOUND, 3
        )
        return [
            {(int(step), int(attempt)) for used, step, attempt in rows if used} for rows in gathered
        ]

    def _read(self, parts: list[dict], abstract: TrainState) -> tuple[dict | None, dict]:
        """Returns ({path: {slice: array}}, run.json) with all that this process needs; (None, {})
        if anything is amiss.
        """
        slices = {}
        try:
            for path, leaf in paths_of(abstract):
                slices[path] = {}
                for index in leaf.sharding.addressable_devices_indices_map(leaf.shape).values():
                    where = text_of(index, leaf.shape)
                    if where not in slices[path]:
                        slices[path][where] = read_slice(parts, path, where, leaf)
            return slices, parts[0]["run"]
        except (OSError, ValueError, KeyError, TypeError):
            return None, {}


def read_slice(parts: list[dict], path: str, where: str, leaf) -> np.ndarray:
    """Returns one slice of an array from the first part that has it; KeyError or ValueError when
    none has it whole.
    """
    part = next((part for part in parts if where in part["arrays"].get(path, {})), None)
    if part is None:
        raise KeyError(f"{path}[{where}]")
    entry = part["arrays"][path][where]
    shape = leaf.sharding.shard_shape(leaf.shape)
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
    if zlib.crc32(content) != entry["crc32"]:
        raise ValueError(f"{path}[{where}] has not the checksum with which it was saved")
    return content.view(leaf.dtype).reshape(shape)


def assemble(abstract: TrainState, slices: dict) -> TrainState:
    """Returns the global state of which this process holds {path: {slice: array}}."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: on_devices(leaf, slices[key_of(path)]), abstract
    )


def on_devices(leaf, slices: dict[str, np.ndarray]) -> jax.Array:
    """Returns the global array of which this process holds `slices`, in buffers that the train step
    may take over.
    """
    placed = [
        jax.device_put(slices[text_of(index, leaf.shape)], device, may_alias=False)
        for device, index in leaf.sharding.addressable_devices_indices_map(leaf.shape).items()
    ]
    return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, placed)


def unique_slices(array: jax.Array) -> dict[str, jax.Array]:
    """Returns the distinct slices of an array that this process' devices hold, by what they cover."""
    return {text_of(shard.index, array.shape): shard.data for shard in array.addressable_shards}


def text_of(index: tuple[slice, ...], shape: tuple[int, ...]) -> str:
    """Returns what a slice covers, as "0:4,8:16"; "" for a scalar."""
    ranges = (part.indices(size) for part, size in zip(index, shape))
    return ",".join(f"{start}:{stop}" for start, stop, _ in ranges)


def paths_of(tree) -> list[tuple[str, object]]:
    return [(key_of(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def key_of(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")

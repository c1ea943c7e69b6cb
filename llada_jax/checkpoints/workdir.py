"""Checkpoints in Orbax: what is saved, when it is kept, and how it comes back on any mesh and any
number of hosts.

    WORKDIR/checkpoints/STEP/params                parameters
                             ema                   their moving average, when one is kept
                             frozen                parameters that are not trained, if there are any
                             train                 step, optimizer state, and the metric sums since
                                                   the last log line
                             _CHECKPOINT_METADATA  with the record of the run (record.py)

Saving is asynchronous; a step counts only once Orbax has committed it, so a killed save leaves the
step before. The files hold no checksum of the numbers themselves, so the record carries one of
every array, and one of itself: what a disk damages silently is found when it is read, and not by a
loss that no longer falls.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec
from orbax.checkpoint import v1 as ocp

from llada_jax.checkpoints.checksums import SCHEME, checksum_of_array, checksums, path_text
from llada_jax.checkpoints.orbax_patches import teach_orbax_s3
from llada_jax.checkpoints.record import RunRecord, sealed
from llada_jax.cluster import distributed
from llada_jax.errors import LostPeer, UserError, lacks_memory, one_line, with_limit
from llada_jax.models.adapters import (
    NUM_INPUT_DIMS,
    Lora,
    abstract_stored,
    adapter_shapes,
    merged,
    round_in_place,
)
from llada_jax.paths import split_step
from llada_jax.storage import files, remote
from llada_jax.storage.arrays import kvstore_of, read_chunks
from llada_jax.training.state import TrainState

FOLDER = "checkpoints"
# The file that Orbax writes last into the folder of a step. In a bucket no step counts without it.
MARK = "commit_success.txt"
# Of an array on the disk. A reader holds one chunk next to the array, so this bounds its memory,
# however few devices saved the array. Of larger arrays of stacked layers, a chunk holds one layer.
CHUNK_BYTES = 64 << 20


def parse_checkpoint(checkpoint: str | os.PathLike[str]) -> tuple[epath.Path, int | None]:
    """Returns (workdir, step) of "WORKDIR" or "WORKDIR@STEP"; step None means the latest."""
    workdir, step = split_step(str(checkpoint))
    return remote.path_of(workdir), step


def find_checkpoint(checkpoint: str | os.PathLike[str]) -> tuple["Checkpoints", int]:
    """Returns the checkpoints of "WORKDIR[@STEP]" and the step meant.

    Raises:
        UserError: there is none.
    """
    workdir, step = parse_checkpoint(checkpoint)
    # Asked before Orbax is: it would create the folder.
    if not (workdir / FOLDER).exists():
        files.check_readable(workdir)
        raise UserError(
            f"{workdir} holds no checkpoints; give a workdir in which `llada-jax train` has saved."
        )
    checkpoints = Checkpoints(workdir, owned=False)
    steps = checkpoints.steps
    if not steps:
        raise UserError(
            f"{checkpoints.directory} holds no finished checkpoint; train until the first save."
        )
    if step is not None and step not in steps:
        raise UserError(
            f"{workdir} has no checkpoint of step {step}; it has {', '.join(map(str, steps))}."
        )
    return checkpoints, steps[-1] if step is None else step


def identity(saved, steps: Sequence[int]) -> str:
    """Returns what distinguishes a checkpoint from one of the same step elsewhere, "none" where
    there is none.

    One that is damaged is refused when it is read, and local copies may stand in for it.

    Args:
        saved: Checkpoints. steps: its step, or nothing.
    """
    for step in steps:
        try:
            return identity_of(saved.record(step), step)
        except UserError:
            return f"step {step} (damaged)"
    return "none"


def identity_of(record: RunRecord, step: int) -> str:
    """Returns a step with the digest of the record of its checkpoint, which holds checksums of all
    arrays.
    """
    # A Hugging Face directory has no record, and gets one at this moment.
    text = json.dumps(dataclasses.replace(record, started="").to_json(), sort_keys=True)
    return f"step {step} ({hashlib.sha256(text.encode()).hexdigest()[:12]})"


class Checkpoints:
    """The checkpoints of one workdir.

    Args:
        workdir: the run's directory, local or remote.
        keep: how many of the newest are kept.
        keep_every_steps: steps at multiples of this are kept forever; 0: none.
        owned: this is the run itself, which may remove the half-written step of an attempt that was
            killed. Readers must not: the run may be writing it at this moment.
    """

    def __init__(self, workdir, *, keep: int = 1, keep_every_steps: int = 0, owned: bool = True):
        policies = ocp.training.preservation_policies
        kept = [policies.LatestN(keep)]
        if keep_every_steps:
            kept.append(policies.EveryNSteps(keep_every_steps))
        self._is_remote, self._owned = remote.is_remote(workdir), owned
        if self._is_remote:
            # Not resolved: epath would make a URL a folder of the current directory.
            self.directory = remote.path_of(workdir) / FOLDER
            teach_orbax_s3()
        else:
            self.directory = epath.Path(workdir).resolve() / FOLDER
        # One process claims for the whole run: of several claims only the last one would hold.
        is_writer = self._is_remote and owned and jax.process_index() == 0
        self._claim = remote.Claim(self.directory.parent) if is_writer else None
        context = ocp.Context()
        # Orbax's default is one chunk per shard: of an array that one device has saved, a reader
        # would hold the only chunk next to the array, twice its size.
        context.array.saving.storage_options.chunk_byte_size = CHUNK_BYTES
        context.array.saving.scoped_storage_options_creator = _storage_of
        # In the background, a folder that the disk refuses would cost 20 minutes at Python's exit.
        context.async_options.create_directories_asynchronously = False
        if self._is_remote:
            # Orbax commits a step by renaming its folder, which a bucket cannot do at once; there
            # the file that is written last marks the step as committed.
            context.atomicity.mode = ocp.options.AtomicityMode.COMMIT_FILE
        self._checkpointer = ocp.training.Checkpointer(
            self.directory,
            # Every step that is handed in is saved: when, the training loop decides, which also
            # knows about signals and about the last step.
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            # A step stays if either policy keeps it.
            preservation_policy=policies.AnyPreservationPolicy(kept),
            cleanup_tmp_directories=owned,
            context=context,
        )
        self._pending: tuple[int, Any] | None = None  # (step, response) of the save under way
        # Seconds and GiB of the last save that was committed, for the group "speed" of the metrics.
        self.measured = {}

    @property
    def steps(self) -> list[int]:
        """The committed steps, oldest first."""
        return sorted(checkpoint.step for checkpoint in self._checkpointer.checkpoints)

    def save(self, state: TrainState, record: RunRecord) -> None:
        """Begins to save; returns once the arrays have been copied and may be donated.

        Args:
            record: of the run at this step; the checksums are added here.

        Raises:
            UserError: an earlier save has failed, or another `train` has taken the workdir over.
        """
        began = time.monotonic()
        # One save at a time: a second one would hold another copy of the state in host memory. The
        # claim is asked after the wait, during which another `train` may have started.
        self.wait()
        self._check_claim()
        step = int(state.step)
        items = items_of(state)
        # Summed on the devices, before Orbax copies, so that a fault of the copy shows as well.
        record = dataclasses.replace(record, checksums=checksums(items), checksum_scheme=SCHEME)
        try:
            # A step that is saved again, after a rollback, replaces the one of the same number.
            response = self._checkpointer.save_checkpointables_async(
                step, items, custom_metadata=sealed(record), overwrite=True
            )
        except Exception as error:
            raise self._failed(step, error) from error
        # Training has waited until here; the rest of the save happens while it goes on.
        blocked = time.monotonic() - began
        gib = sum(leaf.nbytes for leaf in jax.tree.leaves(items)) / 2**30

        def measure(_):
            seconds = time.monotonic() - began
            self.measured = {
                "checkpoint_s": seconds,
                "checkpoint_blocked_s": blocked,
                "checkpoint_gib": gib,
            }

        response.on_complete(measure)
        self._pending = (step, response)

    def wait(self) -> None:
        """Waits until the save under way is committed; raises UserError when it failed, for example
        on a full disk.
        """
        if self._pending is None:
            return
        step, response = self._pending
        # Forgotten before it is asked, so that a failure is reported once and not by close() again.
        self._pending = None
        try:
            response.result()
            self._checkpointer.wait()
        except Exception as error:
            raise self._failed(step, error) from error

    def close(self) -> None:
        """Waits for the save under way and gives the directory back."""
        self.wait()
        self._checkpointer.close()

    def _check_claim(self) -> None:
        """Raises UserError, in every process of the run, when a newer `train` has taken the remote
        workdir over.
        """
        if not self._is_remote:
            return
        # All processes get one answer: one that raised alone would leave the others waiting in the
        # next collective call.
        is_ours = np.array(self._claim.is_ours() if self._claim else True)
        if not multihost_utils.broadcast_one_to_all(is_ours):
            raise UserError(
                f"Another train has started in {self.directory.parent} since, and continues this "
                "run, or it was rolled back; give another --workdir to train next to it."
            )

    def _failed(self, step: int, error: Exception) -> UserError | LostPeer:
        # A process that is gone looks like a failed write, and is not the fault of the disk.
        if distributed.is_lost_peer(_root(error)):
            return LostPeer(
                f"Another process of this run is gone, and step {step} is not saved "
                f"({_reason(error)}); the same command continues."
            )
        good = [s for s in self.steps if s != step]
        return UserError(
            f"Step {step} could not be saved in {self.directory} ({_reason(error)}); the last good "
            f"step is {good[-1] if good else 'none'}: free space or permit writing there, then "
            "start the same command again."
        )

    def restore(self, step: int, abstract: TrainState) -> TrainState:
        """Returns the state of a step with the shapes, dtypes and shardings of `abstract`.

        Raises:
            UserError: the step cannot be read, or holds other parameters than `abstract`.
        """
        network = abstract.frozen if self.record(step).lora.rank else abstract.params
        leaves = jax.tree_util.tree_leaves_with_path(network)
        self.check_parameters(step, {path_text(path) for path, _ in leaves}, ema=False)
        loaded = self._load(step, items_of(abstract))
        # An empty item has no folder, see items_of.
        optional = {name: loaded.get(name, {}) for name in ("ema", "frozen")}
        state = TrainState(params=loaded["params"], **optional, **loaded["train"])
        # Restored buffers cannot be donated to the train step (jax#18617), which would keep the
        # restored state in memory next to the trained one; a pass through jit makes buffers that
        # can be.
        del loaded, optional
        return _copy_leaf_by_leaf(state)

    def restore_params(
        self, step: int, abstract_params: dict, *, ema: bool, lora: Lora | None = None
    ) -> dict:
        """Returns only the network's parameters, or their moving average, of a step, with the
        adapters added where the run trained some; UserError when they cannot be read.

        Args:
            lora: of a run that will freeze them: the matrices of the layers are rounded as it keeps
                them, one by one.
        """
        params = self._restore_params(step, abstract_params, ema=ema)
        if lora is not None:
            # One by one: rounding all of them together would hold the network in both dtypes.
            for path in NUM_INPUT_DIMS:
                round_in_place(params, path, lora)
        return params

    def _restore_params(self, step: int, abstract_params: dict, *, ema: bool) -> dict:
        name = "ema" if ema else "params"
        leaves = jax.tree_util.tree_leaves_with_path(abstract_params)
        # Before Orbax reads: from the record, the error can list all names that differ.
        self.check_parameters(step, {path_text(path) for path, _ in leaves}, ema=ema)
        lora = self.record(step).lora
        if not lora.rank:
            return self._load(step, {name: abstract_params})[name]
        shapes = adapter_shapes(abstract_params, lora)
        # Adapters are small, so that every device holds all of them.
        everywhere = NamedSharding(
            jax.tree.leaves(abstract_params)[0].sharding.mesh, PartitionSpec()
        )
        adapters = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere), shapes
        )
        frozen = abstract_stored(abstract_params, lora)
        loaded = self._load(step, {name: adapters, "frozen": frozen})
        return jax.jit(
            lambda network, adapters: merged(network, adapters, lora),
            out_shardings=jax.tree.map(lambda leaf: leaf.sharding, abstract_params),
            # buffers of another dtype would not do for the result
            donate_argnums=0 if lora.frozen_dtype == "float32" else (),
        )(loaded["frozen"], loaded[name])

    def check_parameters(self, step: int, paths: set[str], *, ema: bool) -> None:
        """Raises UserError that names the parameters of a step which a network does not have, and
        those of the network which the step does not hold.

        Args:
            paths: of the network's parameters, such as "blocks/q".
        """
        record = self.record(step)
        if record.lora.rank:
            paths = paths | {f"scales/{path}" for path in record.lora.int8_paths}
        # under adapters, which are what is trained, the network itself is frozen
        item = "frozen" if record.lora.rank else "ema" if ema else "params"
        # Every array that was saved has a checksum, so that nothing needs to be listed on the disk.
        saved = set((record.checksums or {}).get(item, {}))
        for names, verb in ((saved - paths, "holds"), (paths - saved, "lacks")):
            if names:
                first = sorted(names)
                more = f" and {len(first) - 4} more" if len(first) > 4 else ""
                raise UserError(
                    f"The checkpoint {self.directory / str(step)} {verb} "
                    f"{', '.join(first[:4])}{more}, which the network of its record "
                    f"{'does not have' if verb == 'holds' else 'has'}; use the version or the "
                    "fork of llada_jax that wrote it."
                )

    def read_array(self, step: int, path: str, shape: tuple[int, ...]) -> np.ndarray:
        """Returns one array of a step in the memory of this host, as float32, checked against its
        checksum; see open_array.
        """
        store = self.open_array(step, path, shape)
        with self.reading(step):
            array = read_chunks(store)
        scheme = self.record(step).checksum_scheme
        self.check_sums(step, {path: checksum_of_array(array, scheme=scheme)})
        # Only now, because the checksum is of the bits that were saved.
        return array.astype(np.float32, copy=False)

    def open_array(self, step: int, path: str, shape: tuple[int, ...]) -> tensorstore.TensorStore:
        """Returns one array of a step, of which nothing is read yet; it is float32, but for the
        matrices of some frozen networks (Lora.dtype_of).

        Opened in Orbax's files with tensorstore, and not by Orbax: it would hold all chunks of an
        array at once next to the array itself, and would wait at each call for the other
        processes, each of which exports different arrays.

        Args:
            path: as in the checksums of the record, such as "params/blocks/q" or "ema/embed".

        Raises:
            UserError: it cannot be opened, or does not have this shape.
        """
        item, _, key = path.partition("/")
        base = self.directory / str(step) / item
        # How Orbax lays out an item: one OCDBT store, in which a key is the path joined by dots.
        kvstore = {
            "driver": "ocdbt",
            "base": kvstore_of(str(base)),
            "path": key.replace("/", ".") + "/",
        }
        with self.reading(step):
            # Opened and never created: a reader must not add an empty array to a damaged step.
            store = tensorstore.open({"driver": "zarr3", "kvstore": kvstore}, open=True).result()
        dtype = store.dtype.numpy_dtype
        expected = self.record(step).lora.dtype_of(key) if item == "frozen" else np.dtype("float32")
        if store.shape != tuple(shape) or dtype != expected:
            found = f"{dtype}{list(store.shape)}"
            raise self._damaged(step, f"{path} is {found} and not {expected}{list(shape)}")
        return store

    @contextlib.contextmanager
    def reading(self, step: int) -> Iterator[None]:
        """Makes one UserError of whatever is raised while arrays of a step are read.

        Which errors Orbax and tensorstore raise on damaged files is not documented and changes with
        their versions: each but a lack of memory means that this checkpoint cannot be read.
        """
        try:
            yield
        except Exception as error:
            if lacks_memory(root := _root(error)):
                raise root from None
            files.check_readable(self.directory / str(step), whole=True)
            raise self._damaged(step, _reason(error)) from error

    def _load(self, step: int, items: dict) -> dict:
        """Returns the items of a step, each of which has the checksum with which it was saved."""
        with self.reading(step):
            loaded = self._checkpointer.load_checkpointables(step, items)
        # Once the arrays are on their devices: what is compared is what will be used.
        for item, sums in checksums(loaded, scheme=self.record(step).checksum_scheme).items():
            self.check_sums(step, {f"{item}/{path}": number for path, number in sums.items()})
        return loaded

    def check_sums(self, step: int, sums: dict[str, int]) -> None:
        """Raises UserError unless all arrays match the checksums in the record.

        Args:
            sums: {path such as "params/blocks/q": checksum}.
        """
        saved = self.record(step).checksums or {}
        for path, number in sums.items():
            item, _, key = path.partition("/")
            if number != saved.get(item, {}).get(key):
                raise self._damaged(step, f"{path} does not match its saved checksum")

    def record(self, step: int) -> RunRecord:
        """Returns the record of the run at a step, with the checksums of its arrays.

        Raises:
            UserError: it cannot be read, or is not one of ours.
        """
        with self.reading(step):
            content = dict(self._checkpointer.checkpointables_metadata(step).custom_metadata or {})
        if not content:
            raise self._damaged(step, "it has no record")
        record = RunRecord.from_json(
            content,
            file=f"The record of the checkpoint {self.directory / str(step)}",
            remedy=self._remedy(step),
        )
        # Refused rather than read unchecked: every version has written checksums.
        if record.checksums is None:
            raise self._damaged(step, "its record has no checksums")
        return record

    def _damaged(self, step: int, reason: str) -> UserError:
        folder, remedy = self.directory / str(step), self._remedy(step)
        if not self._owned and files.is_going(folder):
            gone = "its run has removed it since (config.checkpoint.keep, or a rollback)"
            remedy = f"{gone}: repeat the command with a step that is still there"
        return UserError(f"The checkpoint {folder} cannot be read ({reason}); {remedy}.")

    def _remedy(self, step: int) -> str:
        others = [s for s in self.steps if s != step]
        then = f"continue from step {others[-1]}" if others else "train again"
        return f"move that folder away to {then}"


def _storage_of(path, leaf) -> ocp.options.ArrayOptions.Saving.StorageOptions | None:
    """Returns how a leaf of an item is cut into chunks, None for the usual way.

    Layers apart, so that a reader of one layer reads no other. Small arrays are read whole without
    harm, and those of the optimizer are never read by layer.
    """
    if path_text(path).startswith("blocks/") and leaf.nbytes > CHUNK_BYTES:
        return ocp.options.ArrayOptions.Saving.StorageOptions(shard_axes=(0,))
    return None


def _copy_leaf_by_leaf(tree):
    """Returns a tree of the same arrays in new buffers, and deletes the old ones on the way, so
    that the whole is never held twice.
    """

    def copy(leaf):
        new = jax.jit(jnp.copy, out_shardings=leaf.sharding)(leaf)
        # Dispatch is asynchronous, and all copies would be allocated before the first is made.
        new.block_until_ready()
        leaf.delete()
        return new

    return jax.tree.map(copy, tree)


def items_of(state: TrainState) -> dict:
    """Returns what is saved of a state, or of an abstract one, by the name of its folder."""
    items = {
        "params": state.params,
        "train": {"step": state.step, "opt_state": state.opt_state, "metrics": state.metrics},
    }
    # What is empty has no folder, so that a checkpoint is the same with and without the feature
    return items | {name: tree for name in ("ema", "frozen") if (tree := getattr(state, name))}


def _root(error: BaseException) -> BaseException:
    """Returns the first of a chain of errors."""
    # `raise ... from None` hides the errors before it on purpose.
    while below := error.__cause__ or (None if error.__suppress_context__ else error.__context__):
        error = below
    return error


def _reason(error: BaseException) -> str:
    """Returns the root of a chain of errors in one line, without tensorstore's pages of JSON."""
    root = _root(error)
    text = str(root) or type(root).__name__
    pages = r"\s\[(tensorstore_spec|source locations)=[\s\S]*"
    return with_limit(one_line(re.sub(pages, "", text)))

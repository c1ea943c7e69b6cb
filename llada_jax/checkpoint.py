"""Checkpoints in Orbax: what is saved, when it is kept, and how it comes back on any mesh and any number of hosts.

    WORKDIR/checkpoints/STEP/params   parameters
                             ema      their moving average, when one is kept
                             train    step, optimizer state, and the metric sums since the last log line
                             _CHECKPOINT_METADATA  with run.json: config, architecture, tokenizer, data, versions

Saving is asynchronous; a step counts only once Orbax has committed it, so a killed save leaves the step before.
The files hold no checksum of the numbers themselves, so run.json carries one of every array.
"""

import functools
import itertools
import json
import logging
import math
import os
import re
import sys
import time
import traceback
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from llada_jax import distributed, remote
from llada_jax.errors import LostPeer, UserError, one_line
from llada_jax.state import TrainState

FOLDER = "checkpoints"
CHUNK_BYTES = 64 << 20  # of an array on the disk: what a reader holds beside the array, however few devices saved it
RUN_KEYS = ("config", "architecture", "tokenizer", "checksums")  # run.json without them is none of ours


def parse(checkpoint: str) -> tuple[epath.Path, int | None]:
    """Returns (workdir, step) of "WORKDIR" or "WORKDIR@STEP"; step None means the latest."""
    workdir, at, step = str(checkpoint).rpartition("@")
    if not at:
        return remote.path_of(checkpoint), None
    if not step.isdigit():
        raise UserError(f"{checkpoint!r}: the part after @ must be a step number, as in {workdir}@1000.")
    return remote.path_of(workdir), int(step)


class Checkpoints:
    """The checkpoints of one workdir.

    Args:
        workdir: the run's directory, local or remote.
        keep: how many of the newest are kept.
        keep_every_steps: steps at multiples of this are kept for ever; 0: none.
        owned: this is the run itself, which may remove the half-written step of an attempt that was killed. Readers must
            not: what they see half-written may be on its way.
    """

    def __init__(self, workdir, *, keep: int = 1, keep_every_steps: int = 0, owned: bool = True):
        policies = ocp.training.preservation_policies
        kept = [policies.LatestN(keep)]
        if keep_every_steps:
            kept.append(policies.EveryNSteps(keep_every_steps))
        self._is_remote = remote.is_remote(workdir)
        if self._is_remote:  # the workdir itself: epath would resolve a URL to a folder of the current directory
            self.directory = remote.path_of(workdir) / FOLDER
            teach_orbax_s3()
        else:
            self.directory = epath.Path(workdir).expanduser().resolve() / FOLDER
        is_writer = self._is_remote and owned and jax.process_index() == 0
        self._claim = remote.Claim(self.directory.parent) if is_writer else None
        context = ocp.Context()
        context.array.saving.storage_options.chunk_byte_size = CHUNK_BYTES
        if self._is_remote:  # a folder of objects cannot be renamed at once: a last file marks a step as committed
            context.atomicity.mode = ocp.options.AtomicityMode.COMMIT_FILE
        self._checkpointer = ocp.training.Checkpointer(
            self.directory,
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),  # train.py decides when
            preservation_policy=policies.AnyPreservationPolicy(kept),
            cleanup_tmp_directories=owned,
            context=context,
        )
        self._pending = None  # the response of the save under way, and its step
        self.measured = {}  # of the last save that was committed: numbers for the group "speed" of the metrics

    @property
    def steps(self) -> list[int]:
        """The committed steps, oldest first."""
        return sorted(checkpoint.step for checkpoint in self._checkpointer.checkpoints)

    def save(self, state: TrainState, run: dict) -> None:
        """Begins to save; returns when the arrays have been copied and may be donated. A failed earlier save raises."""
        began = time.monotonic()
        self.wait()
        self._check_claim()
        step = int(state.step)
        items = items_of(state)
        run = {**run, "checksums": checksums(items)}
        try:
            response = self._checkpointer.save_checkpointables_async(step, items, custom_metadata=run, overwrite=True)
        except Exception as error:
            raise self._failed(step, error) from error
        blocked = time.monotonic() - began
        gib = sum(leaf.nbytes for leaf in jax.tree.leaves(items)) / 2**30

        def measure(_):
            seconds = time.monotonic() - began
            self.measured = {"checkpoint_s": seconds, "checkpoint_blocked_s": blocked, "checkpoint_gib": gib}

        response.on_complete(measure)
        self._pending = (step, response)

    def wait(self) -> None:
        """Waits until the save under way is committed; raises UserError when it failed, for example on a full disk."""
        if self._pending is None:
            return
        step, response = self._pending
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
        """Raises UserError, in every process of the run, when a newer `train` has taken the remote workdir over."""
        if not self._is_remote:
            return
        is_ours = np.array(self._claim.is_ours() if self._claim else True)
        if not multihost_utils.broadcast_one_to_all(is_ours):
            raise UserError(
                f"Another train has started in {self.directory.parent} since, and continues this run; give another "
                "--workdir to train beside it."
            )

    def _failed(self, step: int, error: Exception) -> UserError | LostPeer:
        if distributed.is_lost_peer(_root(error)):  # no fault of the disk
            return LostPeer(
                f"Another process of this run is gone, and step {step} is not saved ({_reason(error)}); the same command "
                "continues."
            )
        good = [s for s in self.steps if s != step]
        return UserError(
            f"Step {step} could not be saved in {self.directory} ({_reason(error)}); the last good step is "
            f"{good[-1] if good else 'none'}: free space or permit writing there, then start the same command again."
        )

    def restore(self, step: int, abstract: TrainState) -> TrainState:
        """Returns the state of a step with the shapes, dtypes and shardings of `abstract`.

        Raises:
            UserError: the step cannot be read.
        """
        loaded = self._load(step, items_of(abstract))
        state = TrainState(params=loaded["params"], ema=loaded.get("ema", {}), **loaded["train"])
        # restored buffers cannot be donated to the train step (jax#18617): copy them once into ones that can
        shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
        return jax.jit(lambda state: state, out_shardings=shardings, donate_argnums=0)(state)

    def restore_params(self, step: int, abstract_params: dict, *, ema: bool) -> dict:
        """Returns only the parameters, or their moving average, of a step; UserError when they cannot be read."""
        name = "ema" if ema else "params"
        return self._load(step, {name: abstract_params})[name]

    def read_array(self, step: int, path: str, shape: tuple[int, ...]) -> np.ndarray:
        """Returns one float32 array of a step in the memory of this host, checked against its checksum.

        Read from Orbax's files with tensorstore: Orbax would hold all chunks of an array at once beside the array itself,
        and waits for the other processes of a run at each call.

        Args:
            path: as in the checksums of run.json, such as "params/blocks/q" or "ema/embed".

        Raises:
            UserError: it cannot be read, or is not what was saved.
        """
        item, _, key = path.partition("/")
        base = self.directory / str(step) / item
        kvstore = {"driver": "ocdbt", "base": kvstore_of(str(base)), "path": key.replace("/", ".") + "/"}
        try:
            store = tensorstore.open({"driver": "zarr3", "kvstore": kvstore}, open=True).result()
            array = read_chunks(store)
        except Exception as error:  # as in _load
            raise self._damaged(step, _reason(error)) from error
        if array.shape != tuple(shape) or array.dtype != np.float32:
            raise self._damaged(step, f"{path} is {array.dtype}{list(array.shape)} and not float32{list(shape)}")
        number = int(array.view(np.uint32).sum(dtype=np.uint64)) % 2**32
        if number != self.run(step)["checksums"][item].get(key):
            raise self._damaged(step, f"{path} has not the checksum with which it was saved")
        return array

    def _load(self, step: int, items: dict) -> dict:
        """Returns the items of a step, each of which has the checksum with which it was saved."""
        saved = self.run(step)["checksums"]
        try:
            loaded = self._checkpointer.load_checkpointables(step, items)
        except Exception as error:  # whatever Orbax or tensorstore raises on damaged files is a damaged checkpoint
            raise self._damaged(step, _reason(error)) from error
        for name, sums in checksums(loaded).items():
            differ = [path for path, number in sums.items() if number != saved[name].get(path)]
            if differ:
                raise self._damaged(step, f"{name}/{differ[0]} has not the checksum with which it was saved")
        return loaded

    def run(self, step: int) -> dict:
        """Returns run.json of a step."""
        try:
            run = self._checkpointer.checkpointables_metadata(step).custom_metadata or {}
        except Exception as error:
            raise self._damaged(step, _reason(error)) from error
        missing = [key for key in RUN_KEYS if key not in run]
        if missing:
            raise self._damaged(step, f"its metadata has no {missing[0]!r}")
        return dict(run)

    def _damaged(self, step: int, reason: str) -> UserError:
        others = [s for s in self.steps if s != step]
        remedy = f"continue from step {others[-1]}" if others else "train again"
        return UserError(
            f"The checkpoint {self.directory / str(step)} cannot be read ({reason}); move that folder away to {remedy}."
        )


def items_of(state: TrainState) -> dict:
    """Returns what is saved of a state, or of an abstract one, by the name of its folder."""
    items = {
        "params": state.params,
        "train": {"step": state.step, "opt_state": state.opt_state, "metrics": state.metrics},
    }
    return {**items, "ema": state.ema} if state.ema else items


def checksums(items: dict) -> dict[str, dict[str, int]]:
    """Returns {item: {path of an array: the sum of its bits read as unsigned integers, modulo 2**32}}.

    A sum, so that it is the same on every mesh and every number of hosts; any single flipped bit changes it.
    """
    sums = jax.device_get(_sums_of_bits(items))
    return {
        item: {
            jax.tree_util.keystr(path, simple=True, separator="/"): int(number)
            for path, number in jax.tree_util.tree_leaves_with_path(tree)
        }
        for item, tree in sums.items()
    }


@jax.jit
def _sums_of_bits(tree):
    def sum_of_bits(leaf):
        unsigned = jnp.dtype(f"uint{8 * leaf.dtype.itemsize}")
        bits = jax.lax.bitcast_convert_type(leaf, unsigned)
        return jnp.sum(bits.astype(jnp.uint32), dtype=jnp.uint32)

    return jax.tree.map(sum_of_bits, tree)


def _root(error: BaseException) -> BaseException:
    """Returns the first of a chain of errors."""
    while below := error.__cause__ or (None if error.__suppress_context__ else error.__context__):
        error = below
    return error


def _reason(error: BaseException) -> str:
    """Returns the root of a chain of errors in one line, without tensorstore's pages of JSON."""
    root = _root(error)
    return one_line(re.sub(r"\s\[(tensorstore_spec|source locations)=[\s\S]*", "", str(root) or type(root).__name__))


def kvstore_of(directory: str) -> dict:
    """Returns tensorstore's description of a directory; local, gs:// or s3://."""
    scheme, colon, rest = directory.partition("://")
    if not colon:
        return {"driver": "file", "path": f"{directory}/"}
    if scheme == "s3":
        return s3_spec(f"{directory}/")
    bucket, _, path = rest.partition("/")
    return {"driver": "gcs", "bucket": bucket, "path": f"{path}/"}


READ_BYTES = 64 << 20  # of chunks on their way at a time: enough to hide the latency of an object store


def read_chunks(store: tensorstore.TensorStore) -> np.ndarray:
    """Returns all of an array, holding beside it no more than READ_BYTES of its chunks, or one if that is larger."""
    chunk = store.chunk_layout.read_chunk.shape
    starts = list(itertools.product(*(range(0, size, step) for size, step in zip(store.shape, chunk))))
    if len(starts) == 1:
        return np.ascontiguousarray(store.read().result())
    array = np.empty(store.shape, store.dtype.numpy_dtype)
    at_once = max(1, READ_BYTES // (math.prod(chunk) * array.itemsize))
    for i in range(0, len(starts), at_once):
        boxes = [
            tuple(slice(first, min(first + step, size)) for first, step, size in zip(start, chunk, store.shape))
            for start in starts[i : i + at_once]
        ]
        for box, reading in [(box, store[box].read()) for box in boxes]:
            array[box] = reading.result()
    return array


@functools.cache
def teach_orbax_s3() -> None:
    """Lets Orbax hand s3:// to tensorstore, which can write it; Orbax 0.12 itself passes on gs:// and local paths only.

    The two functions replaced are where Orbax chooses the driver (google/orbax#2739 proposes the same to its authors).
    """
    from orbax.checkpoint._src.path import gcs_utils
    from orbax.checkpoint._src.serialization import tensorstore_utils

    is_gcs, gcs_spec = tensorstore_utils._use_gcs_driver, gcs_utils.get_kvstore_for_gcs
    is_s3 = lambda directory: directory.startswith("s3:/")  # noqa: E731 (normalised by Orbax: s3:/bucket/...)
    tensorstore_utils._use_gcs_driver = lambda directory: is_gcs(directory) or is_s3(directory)
    gcs_utils.get_kvstore_for_gcs = lambda directory: (s3_spec if is_s3(directory) else gcs_spec)(directory)


def s3_spec(url: str) -> dict:
    """Returns tensorstore's description of s3://bucket/path, with the endpoint that AWS' own tools would use."""
    bucket, _, path = url.removeprefix("s3:").lstrip("/").partition("/")
    spec = {"driver": "s3", "bucket": bucket, "path": path}
    if "AWS_ACCESS_KEY_ID" in os.environ:  # the default looks for files first, and complains when there are none
        spec["aws_credentials"] = {"type": "environment"}
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if endpoint:  # of AWS itself, tensorstore finds endpoint and region by the bucket's name
        spec["endpoint"] = endpoint
        spec["aws_region"] = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
    return spec


def find(checkpoint: str) -> tuple[Checkpoints, int]:
    """Returns the checkpoints of "WORKDIR[@STEP]" and the step meant; UserError when there is none."""
    workdir, step = parse(checkpoint)
    if not (workdir.expanduser() / FOLDER).exists():
        raise UserError(f"{workdir} holds no checkpoints; give the workdir of a run that `llada-jax train` has saved.")
    checkpoints = Checkpoints(workdir, owned=False)
    steps = checkpoints.steps
    if not steps:
        raise UserError(f"{checkpoints.directory} holds no finished checkpoint; train until the first save.")
    if step is not None and step not in steps:
        raise UserError(f"{workdir} has no checkpoint of step {step}; it has {', '.join(map(str, steps))}.")
    return checkpoints, steps[-1] if step is None else step


def check_same(what: str, ours: dict, theirs: dict, *, remedy: str) -> None:
    """Raises UserError that names each key in which two small dicts differ."""
    keys = [key for key in {**theirs, **ours} if _plain(ours.get(key)) != _plain(theirs.get(key))]
    if keys:
        differ = ", ".join(f"{key} is {ours.get(key)!r} here and {theirs.get(key)!r} there" for key in keys)
        raise UserError(f"{what}: {differ}; {remedy}.")


def _plain(value):
    return json.loads(json.dumps(value))  # a tuple saved as JSON comes back as a list


def drop_echoes() -> None:
    """Keeps off the screen what Orbax and its event loop say about a failed read or save, late, in many tracebacks and from
    threads of their own; the one sentence of the UserError says it.
    """
    logging.getLogger("absl").addFilter(lambda record: "/orbax/" not in record.pathname)
    logging.getLogger("asyncio").addFilter(lambda record: "never retrieved" not in record.getMessage())
    warnings.filterwarnings("ignore", message="coroutine 'PyTreeHandler", category=RuntimeWarning)
    report = sys.unraisablehook

    def hook(unraisable):  # reads that end, or are dropped, after the first of them has failed
        frames = traceback.extract_tb(unraisable.exc_traceback)
        is_echo = any("/orbax/" in frame.filename for frame in frames)
        if not is_echo and "Event loop is closed" not in str(unraisable.exc_value):
            report(unraisable)

    sys.unraisablehook = hook

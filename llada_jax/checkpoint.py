"""Checkpoints in Orbax: what is saved, when it is kept, and how it comes back on any mesh and any number of hosts.

    WORKDIR/checkpoints/STEP/params   parameters
                             ema      their moving average, when one is kept
                             train    step, optimizer state, and the metric sums since the last log line
                             _CHECKPOINT_METADATA  with run.json: config, architecture, tokenizer, data, versions

Saving is asynchronous; a step counts only once Orbax has committed it, so a killed save leaves the step before.
The files hold no checksum of the numbers themselves, so run.json carries one of every array.
"""

import json
import logging
import re
import sys
import traceback
import warnings

import jax
import jax.numpy as jnp
from etils import epath
from orbax.checkpoint import v1 as ocp

from llada_jax.errors import UserError
from llada_jax.state import TrainState

FOLDER = "checkpoints"
RUN_KEYS = ("config", "architecture", "tokenizer", "checksums")  # run.json without them is none of ours


def parse(checkpoint: str) -> tuple[epath.Path, int | None]:
    """Returns (workdir, step) of "WORKDIR" or "WORKDIR@STEP"; step None means the latest."""
    workdir, at, step = str(checkpoint).rpartition("@")
    if not at:
        return epath.Path(checkpoint), None
    if not step.isdigit():
        raise UserError(f"{checkpoint!r}: the part after @ must be a step number, as in {workdir}@1000.")
    return epath.Path(workdir), int(step)


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
        self.directory = epath.Path(workdir).expanduser().resolve() / FOLDER
        self._checkpointer = ocp.training.Checkpointer(
            self.directory,
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),  # train.py decides when
            preservation_policy=policies.AnyPreservationPolicy(kept),
            cleanup_tmp_directories=owned,
        )
        self._pending = None  # the response of the save under way, and its step

    @property
    def steps(self) -> list[int]:
        """The committed steps, oldest first."""
        return sorted(checkpoint.step for checkpoint in self._checkpointer.checkpoints)

    def save(self, state: TrainState, run: dict) -> None:
        """Begins to save; returns when the arrays have been copied and may be donated. A failed earlier save raises."""
        self.wait()
        step = int(state.step)
        items = items_of(state)
        run = {**run, "checksums": checksums(items)}
        try:
            response = self._checkpointer.save_checkpointables_async(step, items, custom_metadata=run, overwrite=True)
        except Exception as error:
            raise self._failed(step, error) from error
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

    def _failed(self, step: int, error: Exception) -> UserError:
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


def _reason(error: BaseException) -> str:
    """Returns the root of a chain of errors, on one line and not longer than anyone reads."""
    while below := error.__cause__ or (None if error.__suppress_context__ else error.__context__):
        error = below
    text = " ".join((str(error) or type(error).__name__).split())
    text = re.sub(r" \[(tensorstore_spec|source locations)=.*", "", text).rstrip(".")  # pages of JSON
    return text if len(text) <= 250 else f"{text[:80]} ... {text[-160:]}"


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

"""Checkpoints in Orbax: what is saved, when it is kept, and how it comes back on any mesh and any number of hosts.

    WORKDIR/checkpoints/STEP/params   parameters
                             ema      their moving average, when one is kept
                             train    step, optimizer state, and the metric sums since the last log line
                             _CHECKPOINT_METADATA  with run.json: config, architecture, tokenizer, data, versions

Saving is asynchronous; a step counts only once Orbax has committed it, so a killed save leaves the step before.
"""

import json

import jax
from etils import epath
from orbax.checkpoint import v1 as ocp

from llada_jax.errors import UserError
from llada_jax.state import TrainState

FOLDER = "checkpoints"


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
    """

    def __init__(self, workdir, *, keep: int = 1, keep_every_steps: int = 0):
        policies = ocp.training.preservation_policies
        kept = [policies.LatestN(keep)]
        if keep_every_steps:
            kept.append(policies.EveryNSteps(keep_every_steps))
        self.directory = epath.Path(workdir).expanduser().resolve() / FOLDER
        self._checkpointer = ocp.training.Checkpointer(
            self.directory,
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),  # train.py decides when
            preservation_policy=policies.AnyPreservationPolicy(kept),
            cleanup_tmp_directories=True,
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
        items = {
            "params": state.params,
            "train": {"step": state.step, "opt_state": state.opt_state, "metrics": state.metrics},
        }
        if state.ema:
            items["ema"] = state.ema
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
            f"Step {step} could not be saved in {self.directory} ({_first_line(error)}); the last good step is "
            f"{good[-1] if good else 'none'}: free space or permit writing there, then start the same command again."
        )

    def restore(self, step: int, abstract: TrainState) -> TrainState:
        """Returns the state of a step with the shapes, dtypes and shardings of `abstract`.

        Raises:
            UserError: the step cannot be read.
        """
        items = {
            "params": abstract.params,
            "train": {"step": abstract.step, "opt_state": abstract.opt_state, "metrics": abstract.metrics},
        }
        if abstract.ema:
            items["ema"] = abstract.ema
        loaded = self._load(step, items)
        state = TrainState(params=loaded["params"], ema=loaded.get("ema", {}), **loaded["train"])
        # restored buffers cannot be donated to the train step (jax#18617): copy them once into ones that can
        shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
        return jax.jit(lambda state: state, out_shardings=shardings, donate_argnums=0)(state)

    def restore_params(self, step: int, abstract_params: dict, *, ema: bool) -> dict:
        """Returns only the parameters, or their moving average, of a step; UserError when they cannot be read."""
        name = "ema" if ema else "params"
        return self._load(step, {name: abstract_params})[name]

    def _load(self, step: int, items: dict) -> dict:
        try:
            return self._checkpointer.load_checkpointables(step, items)
        except Exception as error:  # whatever Orbax or tensorstore raises on damaged files is a damaged checkpoint
            others = [s for s in self.steps if s != step]
            remedy = f"continue from step {others[-1]}" if others else "train again"
            raise UserError(
                f"The checkpoint {self.directory / str(step)} cannot be read ({_first_line(error)}); "
                f"move that folder away to {remedy}."
            ) from error

    def run(self, step: int) -> dict:
        """Returns run.json of a step."""
        try:
            return dict(self._checkpointer.checkpointables_metadata(step).custom_metadata)
        except Exception as error:
            raise UserError(
                f"The checkpoint {self.directory / str(step)} has no readable metadata ({_first_line(error)}); "
                "move that folder away to continue from an earlier step."
            ) from error


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return " ".join(text.split())[:300]


def find(checkpoint: str) -> tuple[Checkpoints, int]:
    """Returns the checkpoints of "WORKDIR[@STEP]" and the step meant; UserError when there is none."""
    workdir, step = parse(checkpoint)
    if not (workdir.expanduser() / FOLDER).exists():
        raise UserError(f"{workdir} holds no checkpoints; give a --workdir that `llada-jax train` has saved to.")
    checkpoints = Checkpoints(workdir)
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

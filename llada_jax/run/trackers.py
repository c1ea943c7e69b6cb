"""Experiment trackers that show a run's metrics elsewhere: Weights & Biases, or Trackio.

Both have the interface of wandb, and both read their settings from the environment (WANDB_MODE,
WANDB_API_KEY, TRACKIO_DIR ...). What they hold is a copy: metrics.jsonl is what a run and a sweep
read.
"""

import hashlib
import os
from pathlib import PurePosixPath

from llada_jax.errors import UserError, look_up, reason, require
from llada_jax.streams import write_line

# Name of the knob, the library and the extra -> the variable that names the project.
TRACKERS = {"wandb": "WANDB_PROJECT", "trackio": "TRACKIO_PROJECT"}
PROJECT = "llada_jax"


class Tracker:
    """One run of a tracker, which a later start in the same workdir continues.

    Args:
        name: of TRACKERS.
        workdir: names the run; another workdir is another run.
        config: what the tracker shows next to the metrics, as nested dicts.

    Raises:
        UserError: the tracker is unknown or not installed, or refuses the run.
    """

    def __init__(self, name: str, *, workdir: str, config: dict):
        variable = look_up(TRACKERS, name, "tracker")
        self._library = require(name, extra=name)
        path = workdir if "://" in workdir else os.path.abspath(workdir)
        digest = hashlib.sha256(path.encode()).hexdigest()[:12]
        called = f"{PurePosixPath(path).name}-{digest}"
        settings = {"project": os.environ.get(variable) or PROJECT, "resume": "allow"}
        # trackio knows a run by its name, and wandb by an id
        settings |= {"name": called} | ({"id": digest} if name == "wandb" else {})
        # The step of a restart goes back to its checkpoint, which wandb's own counter refuses; a
        # metric of that name is what trackio refuses.
        self._has_failed, self._counts_steps = False, name != "wandb"
        try:
            self._library.init(config=config, **settings)
            if not self._counts_steps:
                self._library.define_metric("*", step_metric="step")
        except Exception as error:
            # The libraries share no class of errors.
            raise UserError(
                f"The tracker {name} refuses the run ({reason(error)}); set it up in the "
                "environment, or set config.log.tracker to none."
            ) from error

    def log(self, step: int, groups: dict[str, dict[str, float]]) -> None:
        """Sends one line of metrics, as GROUP/NAME.

        A service that fails after the start must not end the run: that is said once, and nothing
        is sent any more.
        """
        numbers = {
            f"{group}/{name}": float(value)
            for group, values in groups.items()
            for name, value in values.items()
        }
        if self._counts_steps:
            self._call("log", numbers, step=step)
        else:
            self._call("log", {"step": step, **numbers})

    def close(self) -> None:
        self._call("finish")

    def _call(self, name: str, *args, **kwargs) -> None:
        if self._has_failed:
            return
        try:
            getattr(self._library, name)(*args, **kwargs)
        except Exception as error:
            # The libraries share no class of errors.
            self._has_failed = True
            write_line(
                f"tracker     {self._library.__name__} takes no more metrics ({reason(error)}): "
                "the run continues without it, and metrics.jsonl has all of them"
            )

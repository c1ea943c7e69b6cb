"""The held-out bound while a run trains, and what is kept of one that was asked to stop."""

import contextlib
import functools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from llada_jax.cluster import distributed
from llada_jax.cluster.agreement import on_first_process
from llada_jax.data.loader import SourceSummary
from llada_jax.evaluation.splits import bound_of_split
from llada_jax.objectives.objective import Objective
from llada_jax.storage import files, remote

FILE = "evaluation.json"

# What likelihood.bound keeps of each scored batch, by the group of the metrics
Scored = dict[str, list[tuple[float, ...]]]


def evaluate_heldout(
    model,
    params,
    summaries: Sequence[SourceSummary],
    *,
    objective: Objective,
    num_batches: int,
    scored: Scored | None = None,
    **settings,
) -> dict[str, dict[str, float]]:
    """Returns {group: {bound name, standard_error, bits_per_byte}} of each held-out split, and the
    metrics of Objective.heldout.

    A dataset without held-out text is left out. The group is "heldout", or of a mixture
    "heldout_NUMBER_DIRECTORY", because one bound over texts of different kinds says little about
    either.

    Args:
        objective: its bound is computed, and gives the bound's name.
        num_batches: scored of each dataset, the same random rows in every evaluation of every run,
            so that their bounds can be compared; 0: all of the split.
        scored: what an evaluation that was asked to stop had scored. It is added to in place, and
            batches that it holds are not scored again.
        settings: of llada_jax.evaluation.splits.bound_of_split.
    """
    results, scored = {}, {} if scored is None else scored
    for number, summary in enumerate(summaries):
        if "heldout" not in summary.bytes_per_token:
            continue
        is_mixture = len(summaries) > 1
        group = f"heldout_{number}_{Path(summary.directory).name}" if is_mixture else "heldout"
        bound = bound_of_split(
            model,
            params,
            summary.info,
            split="heldout",
            objective=objective,
            bytes_per_token=summary.bytes_per_token["heldout"],
            max_batches=num_batches or None,
            scored=scored.setdefault(group, []),
            **settings,
        )
        # one batch has no spread, and JSON has no number for that: the key is left out
        error = {} if math.isnan(bound.standard_error) else {"standard_error": bound.standard_error}
        results[group] = {
            objective.bound_name: bound.nats_per_token,
            **error,
            "bits_per_byte": bound.bits_per_byte,
            **bound.means,
        }
    return results


def bound_line(bound: dict[str, float], name: str) -> str:
    """Returns one group of evaluate_heldout in words, e.g. "1.234 bits/byte (2.345 nats/token +-
    0.012)", and further metrics after it; name: Objective.bound_name.
    """
    nats = bound[name]
    error = f" +- {bound['standard_error']:.3f}" if "standard_error" in bound else ""
    known = (name, "standard_error", "bits_per_byte")
    others = "".join(f", {k} {value:.3f}" for k, value in bound.items() if k not in known)
    return f"{bound['bits_per_byte']:.3f} bits/byte ({nats:.3f} nats/token{error}){others}"


class AskedToStop(Exception):
    """Raised between two batches of an evaluation when the run is asked to stop."""


class Unfinished:
    """WORKDIR/evaluation.json: the sums of an evaluation that was asked to stop.

    The sums of a batch are float32 numbers that JSON gives back exactly, so an evaluation that
    continues from them ends with the bound of one that was never interrupted.

    Args:
        workdir: local directory or URL.
        settings: what the sums depend on apart from the weights, as JSON. Sums that were computed
            with others are ignored.
    """

    def __init__(self, workdir, settings: dict):
        self._path = remote.path_of(workdir) / FILE
        # through JSON, which has no tuples, so that both sides of a comparison look alike
        self._settings = json.loads(json.dumps(settings))
        self._is_first = jax.process_index() == 0

    def read(self, step: int, num_batches: int) -> Scored | None:
        """Returns what was scored of the weights of this step, in every process; None: nothing.

        Args:
            num_batches: how many the evaluation is to score. Another number draws other rows.
        """
        kept = b""
        if self._is_first:
            # It only saves time: a file that is damaged or of something else costs a repetition.
            with contextlib.suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
                content = files.decode_json(self._path.read_text())
                found = [content[name] for name in ("step", "num_batches", "settings")]
                if found == [step, num_batches, self._settings]:
                    scored = {
                        group: [tuple(map(float, sums)) for sums in batches]
                        for group, batches in content["scored"].items()
                    }
                    kept = json.dumps(scored).encode()
        # Only the first process reads the file: processes that continue from different batches
        # would wait for each other forever.
        size = int(multihost_utils.broadcast_one_to_all(np.int32(len(kept))))
        if not size:
            return None
        padded = np.zeros(size, np.uint8)
        padded[: len(kept)] = np.frombuffer(kept, np.uint8)[:size]
        return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(padded)).tobytes())

    def write(self, step: int, num_batches: int, scored: Scored) -> None:
        """Keeps the sums; a disk that refuses costs the time of scoring the batches again."""
        if self._is_first:
            content = {"step": step, "num_batches": num_batches, "settings": self._settings}
            content["scored"] = scored
            with contextlib.suppress(OSError):
                files.write_whole(self._path, json.dumps(content) + "\n")

    def is_of(self, step: int) -> bool:
        """Returns whether the file is of the weights of this step, in every process."""
        return on_first_process(lambda: self._step() == step)

    def clear_others(self, step: int) -> None:
        """Removes the file unless it is of this step, from which a run starts.

        A run that starts from another one has gone back, to an older checkpoint or by a rollback,
        and may come to the step of the file with other weights.
        """
        if self._is_first and self._step() != step:
            self.clear()

    def _step(self) -> int | None:
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            return files.decode_json(self._path.read_text())["step"]
        return None

    def clear(self) -> None:
        """Removes the file: the evaluation is complete."""
        if self._is_first:
            with contextlib.suppress(OSError):
                self._path.unlink(missing_ok=True)


class HeldoutEvaluations:
    """The held-out evaluations of one run, each of which can be interrupted and continued.

    Args:
        workdir: local directory or URL; keeps what an interrupted evaluation has scored.
        recipe: llada_jax.training.step.Recipe of the run.
        data: llada_jax.run.start.RunData, whose held-out splits are scored.
        start_step: at which this attempt of the run begins.
        batch_size: rows that are scored at once, over all hosts.
        weights: what config.evaluation.weights says, which an interrupted evaluation must share
            with the one that continues it.
        beat: called with a text before each batch, so that the watchdog sees the run alive.
        is_asked_to_stop: asked before each batch; must give every process the same answer.
        timeout_s: how long the processes wait for each other to compile; 0: forever.
    """

    def __init__(
        self,
        workdir,
        recipe,
        data,
        *,
        start_step: int,
        batch_size: int,
        sequence_length: int,
        attend_across_documents: bool,
        weights: str,
        beat: Callable[[str], None],
        is_asked_to_stop: Callable[[], bool],
        timeout_s: int,
    ):
        self._recipe, self._summaries = recipe, data.summaries
        self._beat, self._is_asked_to_stop = beat, is_asked_to_stop
        self._settings = {
            "batch_size": batch_size,
            "sequence_length": sequence_length,
            "attend_across_documents": attend_across_documents,
        }
        depends_on = {"data": data.record(), "weights": weights, **self._settings}
        self._unfinished = Unfinished(workdir, depends_on)
        self._unfinished.clear_others(start_step)
        # once for the run: the compiled program is found again by later evaluations
        self._on_compiled = functools.cache(
            functools.partial(distributed.meet, "evaluation", timeout_s=timeout_s)
        )

    def evaluate(
        self, step: int, params: dict, frozen: dict, num_batches: int
    ) -> dict[str, dict[str, float]]:
        """Returns the bounds of evaluate_heldout for the weights after `step`.

        Raises:
            AskedToStop: between two batches; what was scored is kept for the next call, which may
                be in another process.
        """
        scored = self._unfinished.read(step, num_batches) or {}
        try:
            return evaluate_heldout(
                self._recipe.model,
                params,
                frozen=frozen,
                summaries=self._summaries,
                objective=self._recipe.objective,
                num_batches=num_batches,
                scored=scored,
                batch_sharding=self._recipe.batch_sharding,
                on_batch=self._on_batch,
                on_compiled=self._on_compiled,
                **self._settings,
            )
        except AskedToStop:
            self._unfinished.write(step, num_batches, scored)
            raise

    def is_unfinished(self, step: int) -> bool:
        """Returns whether an evaluation of the weights after `step` was interrupted."""
        return self._unfinished.is_of(step)

    def forget(self) -> None:
        """Removes what was kept: the bounds of the last evaluation are in the metrics."""
        self._unfinished.clear()

    def _on_batch(self) -> None:
        self._beat("a held-out batch")
        if self._is_asked_to_stop():
            raise AskedToStop

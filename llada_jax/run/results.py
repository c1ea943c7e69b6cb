"""What a run has reached, for those who started it from Python."""

from typing import NamedTuple

from llada_jax.run.metrics_file import read_lines


class TrainedRun(NamedTuple):
    """A run after its last step.

    workdir: where it is, for llada_jax.load. step: optimizer steps done. train: the last logged
    training metrics, such as "loss". final: {group: metrics} of the last held-out evaluation, such
    as {"final": {"nelbo": ...}} or, of a mixture, {"final_0_web": ..., "final_1_code": ...}; empty
    where nothing was held out.
    """

    workdir: str
    step: int
    train: dict[str, float]
    final: dict[str, dict[str, float]]


def trained_run(workdir: str, step: int) -> TrainedRun:
    """Returns what metrics.jsonl says about a run that is at its last step.

    Raises:
        UserError: a line of it cannot be read.
    """
    train: dict[str, float] = {}
    final: dict[str, dict[str, float]] = {}
    for line in read_lines(workdir):
        train = line.get("train", train)
        found = {group: line[group] for group in line if group.startswith("final")}
        final = found or final
    return TrainedRun(workdir, step, train, final)

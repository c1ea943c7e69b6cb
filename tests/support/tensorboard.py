"""What a run has written for TensorBoard, as TensorBoard itself reads it."""

from support.required import library


def board_of(workdir):
    """Returns the EventAccumulator of the events of a workdir."""
    module = library("tensorboard.backend.event_processing.event_accumulator")
    board = module.EventAccumulator(str(workdir / "tensorboard"))
    board.Reload()
    return board

"""How a run begins: its workdir, its first state, and the agreement of its processes."""

import contextlib
import hashlib

import jax
import numpy as np
from jax.experimental import multihost_utils

from llada_jax.checkpoints.continuation import check_continues, check_fits
from llada_jax.checkpoints.huggingface import find_weights
from llada_jax.checkpoints.record import RunRecord
from llada_jax.checkpoints.workdir import find_checkpoint
from llada_jax.errors import UserError, reason
from llada_jax.storage import remote


def make_workdir(workdir: str) -> None:
    """Creates the workdir; raises UserError when it cannot be written."""
    path = remote.path_of(workdir)
    with writing(workdir):
        path.mkdir(parents=True, exist_ok=True)
        if jax.process_index() == 0:
            probe = path / ".writable"
            probe.write_text("")
            probe.unlink()


@contextlib.contextmanager
def writing(workdir: str):
    """Turns what the file system refuses into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"The workdir {workdir} cannot be written ({reason(error)}); choose another --workdir, "
            "free space, or "
            "change its permissions."
        ) from error


def first_state(
    config, saved, local, run: RunRecord, num_rollbacks: int, abstract, abstract_params, create
):
    """Returns the state to start from, where it comes from, and the record of the run that it
    continues (None if none).

    `abstract` is the state's, `abstract_params` those of the whole network, of which the state may
    train a part; `create(seed=, params=None)` makes a state of step 0.

    The order: 1. the latest step of this workdir or, where they are newer, of the local copies;
    2. config.checkpoint.restore, the full state of another run; 3. config.checkpoint.init_from, the
    weights of another run or of a Hugging Face directory; 4. the seed.
    """
    note = ""
    if local:
        state, theirs, note = local.restore(
            abstract, newer_than=saved.steps[-1] if saved.steps else 0
        )
        note = note and f" ({note})"
        if state is not None and theirs.num_rollbacks < num_rollbacks:
            state, note = None, " (the local copies are from before the rollback)"
        if state is not None:
            check_continues(theirs, run, local.directory)
            return state, f"step {int(state.step)} of {local.directory}{note}", theirs
    if saved.steps:
        step = saved.steps[-1]
        theirs = saved.record(step)
        check_continues(theirs, run, saved.directory)
        return (
            saved.restore(step, abstract),
            f"step {step} of {saved.directory.parent}{note}",
            theirs,
        )
    if config.checkpoint.restore:
        other, step = find_checkpoint(config.checkpoint.restore)
        theirs = other.record(step)
        check_continues(theirs, run, other.directory)
        origin = f"step {step} of {other.directory.parent} (config.checkpoint.restore)"
        return other.restore(step, abstract), origin, theirs
    if config.checkpoint.init_from:
        other, step = find_weights(config.checkpoint.init_from, causal=run.mask.causal)
        theirs = other.record(step)
        check_fits(theirs, run, other.directory)
        params = other.restore_params(step, abstract_params, ema=theirs.keeps_ema)
        # this passes them through jit, which makes buffers that the train step may take over (see
        # Checkpoints.restore)
        return (
            create(seed=config.seed, params=params),
            f"weights of step {step} of {config.checkpoint.init_from} "
            "(config.checkpoint.init_from)",
            None,
        )
    return create(seed=config.seed), f"initialisation from seed {config.seed}{note}", None


def on_first_process(question) -> bool:
    """Returns the first process' answer in every process: files that it writes may not be seen by
    the others yet.
    """
    answer = question() if jax.process_index() == 0 else False
    return bool(multihost_utils.broadcast_one_to_all(np.array(answer)))


def check_same_everywhere(config) -> None:
    """Raises UserError when the processes of a run were started with different configs, which would
    hang later.
    """
    if jax.process_count() > 1:
        digest = np.frombuffer(hashlib.sha256(repr(config).encode()).digest(), np.uint8)
        try:
            multihost_utils.assert_equal(digest, "config")
        except AssertionError as error:
            raise UserError(
                f"Process {jax.process_index()} of {jax.process_count()} was started with another "
                "config than the first; "
                "start all of them with the same command."
            ) from error

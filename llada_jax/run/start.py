"""How a run begins: its data, its workdir, and its first state."""

import contextlib
import dataclasses
import functools
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from llada_jax.checkpoints.continuation import (
    changed_knobs,
    check_continues,
    check_initialises,
)
from llada_jax.checkpoints.host_copies import LocalCheckpoints
from llada_jax.checkpoints.huggingface import find_weights, tokenizer_of
from llada_jax.checkpoints.record import FILE, RunRecord, read_run, reads_ema, write_run
from llada_jax.checkpoints.workdir import Checkpoints, find_checkpoint, identity
from llada_jax.cluster.agreement import check_same_everywhere
from llada_jax.data.batch import Field
from llada_jax.data.lengths import LENGTHS, described, lengths_json
from llada_jax.data.loader import Source, SourceSummary, describe
from llada_jax.data.tokenizer import SPECIAL_IDS, Tokenizer, load_same
from llada_jax.errors import UserError
from llada_jax.models.model import abstract_parameters
from llada_jax.paths import check_savable
from llada_jax.run.metrics_file import MetricsWriter
from llada_jax.run.rollbacks import Rollbacks, read_rollbacks, rollbacks_of_run
from llada_jax.run.trackers import Tracker
from llada_jax.storage import files, remote
from llada_jax.storage.locks import InUse, only_run_in
from llada_jax.training.state import TrainState, create_state
from llada_jax.training.step import Recipe
from llada_jax.validation import NO_TRACKER

# How long a file system may take to show a new file to the other hosts. A save would fail on one
# that takes longer.
VISIBLE_S = 10.0


class RunData(NamedTuple):
    """The datasets of a run and the tokenizer of them all."""

    sources: Sequence[Source]
    summaries: tuple[SourceSummary, ...]
    tokenizer: Tokenizer

    def bytes_per_token(self, masked: str, eos_padding: int) -> float | None:
        """Returns the UTF-8 bytes per token that the loss of training counts, in the proportions of
        the mixture; None with eos_padding, whose tokens are of no text.

        Args:
            masked: config.objective.masked, by which the loss counts prompts too or answers alone.
            eos_padding: config.data.eos_padding.
        """
        if eos_padding:
            return None
        counted = "num" if masked == "documents" else "num_scored"
        # A source with more tokens in a row has more of the tokens than of the rows.
        bytes_of_row, tokens_of_row = (
            sum(
                s.share * getattr(s.info.splits["train"], f"{counted}_{what}") / s.num_records
                for s in self.summaries
            )
            for what in ("bytes", "tokens")
        )
        return bytes_of_row / tokens_of_row

    @property
    def fields(self) -> Mapping[str, Field]:
        """The fields of the batches, which are those of every dataset."""
        return self.summaries[0].fields

    def facts(self) -> dict[str, str]:
        """Returns what must be the same on every host, by its name for the user."""
        return {
            **{f"the records in {s.directory}": s.fingerprint for s in self.summaries},
            "the tokenizer": self.tokenizer.fingerprint,
        }

    def record(self) -> list[dict]:
        """Returns what run.json says about the datasets."""
        return [
            {"directory": s.directory, "fingerprint": s.fingerprint, "share": s.share}
            for s in self.summaries
        ]

    def lengths(self) -> dict[str, dict[str, int]]:
        """Returns how long the training texts of all datasets are, by kind; see
        llada_jax.data.lengths.described.
        """
        counts = lengths_json([{LENGTHS: s.info.lengths} for s in self.summaries])[LENGTHS]
        return {kind: described(counts[kind]) for kind in counts if counts[kind]}


def open_data(sources: Sequence[Source], *, sequence_length: int) -> RunData:
    """Reads the description of each dataset; raises UserError when they cannot be trained on."""
    summaries = describe(sources, sequence_length=sequence_length)
    # the first dataset speaks for all: describe() refuses a mixture of several tokenizers
    first = summaries[0].info
    tokenizer = load_same(
        epath.Path(first.directory) / "tokenizer", first.tokenizer["fingerprint"], of="the records"
    )
    # what dataset.json says is read once, and holds for the whole run
    opened = [(s.info, weight) for s, (_, weight) in zip(summaries, sources, strict=True)]
    return RunData(opened, summaries, tokenizer)


class OpenWorkdir(NamedTuple):
    """A workdir that a run has opened and may write into.

    saved: its checkpoints. local: copies on the disks of the hosts; None without them. writer: of
    its metrics. record: what this start writes into run.json, and into the record of every
    checkpoint. rollbacks: what was rolled back before. start_step: the step that is already done;
    is_continued: whether this workdir held a checkpoint; origin: where its state comes from, in
    words. changed: a line for each knob whose value differs from that of the run that is continued.
    num_unlogged: steps up to start_step whose metrics are not in a line of the log yet.
    """

    saved: Checkpoints
    local: LocalCheckpoints | None
    writer: MetricsWriter
    record: RunRecord
    rollbacks: Rollbacks
    start_step: int
    is_continued: bool
    origin: str
    changed: list[str]
    num_unlogged: int

    def what_changed(self) -> list[str]:
        """Returns lines for the user about what a continued run does not share with its past: log
        lines that are missing, and knobs with other values.
        """
        # of another workdir (checkpoint.restore) the lines are there, and not here
        gap = self.writer.gap_before(self.start_step, num_unlogged=self.num_unlogged)
        return [
            *self.writer.damage,
            *([gap] if gap and self.is_continued else []),
            *(f"start       {line}" for line in self.changed),
        ]


def open_workdir(
    workdir: str,
    recipe: Recipe,
    mesh: Mesh,
    record: RunRecord,
    *,
    config_text: str,
    tokenizer: Tokenizer,
    until_end: contextlib.ExitStack,
    seed: int,
    keep: int,
    keep_every_steps: int,
    local_directory: str,
    restore: str,
    init_from: str,
    init_from_ema: bool | None,
    tensorboard: bool,
    tracker: str,
) -> tuple[OpenWorkdir, TrainState]:
    """Opens a workdir for training; returns it with the state that training starts from.

    run.json and the metrics are touched last, when nothing can be refused any more: a start that
    fails leaves the run as it was. The state of a local copy or of another run is then saved in the
    workdir, next to what follows.

    Args:
        record: run.json as this start would write it.
        config_text: the config file, of which the workdir keeps a copy; "": none.
        until_end: is given what must be closed after the run, such as the lock of the workdir.
        restore, init_from, init_from_ema: see first_state.
        keep, keep_every_steps: see Checkpoints. local_directory: of LocalCheckpoints; "": none.
        tensorboard: whether events are written next to metrics.jsonl.
        tracker: name of an experiment tracker that gets the metrics too.

    Raises:
        UserError: the workdir cannot be written, is in use, or holds another run.
    """
    is_first = jax.process_index() == 0
    with made_workdir(workdir) as mark:
        if is_first:
            until_end.enter_context(only_run_in(workdir))
        saved = Checkpoints(workdir, keep=keep, keep_every_steps=keep_every_steps)
        local = None
        if local_directory:
            local = LocalCheckpoints(local_directory, saved.directory.parent)
            until_end.callback(local.close)
        rollbacks = read_rollbacks(workdir)
        # Of a workdir that is not shared each process would see a part, and restore another step.
        # Where nothing is saved yet, they would wait for each other at the first save.
        check_same_everywhere(
            {
                "the workdir": seen(mark),
                "the newest checkpoint in the workdir": identity(saved, saved.steps[-1:]),
                "rollbacks.json": rollbacks,
            }
        )
    record = dataclasses.replace(record, run_id=run_id_of(workdir))
    state, origin, continued = first_state(
        saved,
        local,
        run=record,
        abstract=recipe.abstract,
        abstract_params=abstract_parameters(recipe.model, mesh),
        create=functools.partial(
            create_state,
            recipe.model,
            recipe.optimizer,
            recipe.abstract,
            split=recipe.objective.split_parameters,
        ),
        seed=seed,
        restore=restore,
        init_from=init_from,
        init_from_ema=init_from_ema,
        is_causal=recipe.objective.mask.causal,
        tokenizer=tokenizer,
        num_rollbacks=rollbacks.count,
    )
    start_step = int(state.step)
    check_same_everywhere({"the start step": start_step})
    if continued is not None:
        rollbacks = rollbacks_of_run(rollbacks, continued.rollbacks)
    record = dataclasses.replace(record, rollbacks=rollbacks._asdict())
    if local:
        local.drop_after(start_step)
    if start_step > recipe.num_steps:
        raise UserError(
            f"The run in {workdir} is at step {start_step} and the config ends at "
            f"{recipe.num_steps}; raise config.num_steps or num_tokens, or start a new --workdir "
            "from a checkpoint with config.checkpoint.restore=WORKDIR@STEP."
        )
    # the workdir's tokenizer decodes what the run samples: it must be that of the records
    if (epath.Path(workdir) / "tokenizer" / SPECIAL_IDS).exists():
        load_same(epath.Path(workdir) / "tokenizer", tokenizer.fingerprint, of="the records")
    writer = MetricsWriter(
        workdir,
        enabled=is_first,
        resume_step=start_step if start_step else None,
        tensorboard=tensorboard,
        tracker=Tracker(tracker, workdir=workdir, config=record.config)
        if tracker != NO_TRACKER and is_first
        else None,
    )
    if is_first:
        with writing(workdir):
            write_run(workdir, tokenizer, record, config_text=config_text)
    opened = OpenWorkdir(
        saved=saved,
        local=local,
        writer=writer,
        record=record,
        rollbacks=rollbacks,
        start_step=start_step,
        is_continued=bool(saved.steps),
        origin=origin,
        changed=changed_knobs(record.config, continued.config) if continued else [],
        # each step adds one to the count of every metric that it always has
        num_unlogged=int(state.metrics["skipped"][1]),
    )
    # A local copy is lost with its host, and another run can be deleted. What this run reports as
    # saved has to be here: its last step, a permanent one, the one at which it is asked to stop.
    if continued is not None and start_step not in saved.steps:
        here = dataclasses.replace(record, step=start_step, tokens=continued.tokens)
        saved.save(state, here)
    return opened, state


def missing_folders(workdir: str) -> list[Path]:
    """Returns the folders that a start in a local workdir will create, from the deepest on; [] for
    a URL.
    """
    path = Path(workdir)
    if remote.is_remote(workdir):
        return []
    return [folder for folder in (path, *path.parents) if not folder.exists()]


@contextlib.contextmanager
def removed_if_refused(folders: Sequence[Path]):
    """Removes a local workdir that was created in the block when the block ends with a UserError.

    A start that is refused, of a damaged checkpoint say, leaves nothing that looks like a run.

    Args:
        folders: of missing_folders, from before the processes agreed on anything: any of them may
            have come into the block since, and have created the workdir.
    """
    try:
        yield
    except InUse:
        # Two processes that started together have both found no workdir: it is the other's.
        raise
    except UserError:
        if folders and jax.process_index() == 0:
            shutil.rmtree(folders[0], ignore_errors=True)
            # those in which others have put something by now stay
            for folder in folders[1:]:
                with contextlib.suppress(OSError):
                    folder.rmdir()
        raise


@contextlib.contextmanager
def made_workdir(workdir: str) -> Iterator[epath.Path]:
    """Creates the workdir; yields a file in it, which the first process has written and removes
    after the block.

    It is written before anything is compiled: a run that finds out at its first checkpoint that the
    disk is read-only has lost an hour.

    Raises:
        UserError: nothing can be written into the workdir, or removed from it.
    """
    check_savable(workdir)
    path, is_first = remote.path_of(workdir), jax.process_index() == 0
    # The name is new: file systems remember for a while that a file was absent.
    number = multihost_utils.broadcast_one_to_all(np.int32(secrets.randbelow(2**31)))
    mark = path / f".writable-{int(number)}"
    with writing(workdir):
        path.mkdir(parents=True, exist_ok=True)
        if is_first:
            mark.write_text("")
    try:
        # No process looks for the mark earlier: NFS goes on to say for half a minute that a file is
        # absent.
        check_same_everywhere({})
        yield mark
    except BaseException:
        if is_first:
            with contextlib.suppress(OSError):
                mark.unlink()
        raise
    # A run also replaces files, and a bucket may let it create them alone.
    with writing(workdir):
        if is_first:
            mark.unlink()


def seen(mark: epath.Path) -> str:
    """Waits for the file of `made_workdir`; returns whether this process sees it, in words that the
    processes compare.
    """
    deadline = time.monotonic() + VISIBLE_S
    while not (is_seen := mark.exists()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return "one folder" if is_seen else "another"


def run_id_of(workdir: str) -> int:
    """Returns the run_id of the run in a workdir, a new one where none has begun; the same in every
    process.

    Every process reads run.json: if the first alone could not, the others would wait for it.
    """
    number = secrets.randbelow(2**31 - 1) + 1
    if (remote.path_of(workdir) / FILE).exists():
        number = read_run(workdir).run_id
    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def writing(workdir: str) -> contextlib.AbstractContextManager[None]:
    """Turns what the file system refuses in its block into a UserError."""
    return files.writing(
        f"The workdir {workdir}",
        remedy="choose another --workdir, free space, or change its permissions",
    )


class FirstState(NamedTuple):
    """state: where training starts. origin: where the state comes from, as the start-up lines say
    it. continued: the record of the run that is continued; None for a run that begins.
    """

    state: TrainState
    origin: str
    continued: RunRecord | None


def first_state(
    saved,
    local,
    *,
    run: RunRecord,
    abstract: TrainState,
    abstract_params: dict,
    create,
    seed: int,
    restore: str,
    init_from: str,
    init_from_ema: bool | None,
    is_causal: bool,
    tokenizer: Tokenizer,
    num_rollbacks: int,
) -> FirstState:
    """Returns the state from which a run starts.

    The first of these that exists decides:
      1. the latest step of this workdir or, where they are newer, of the local copies;
      2. the full state of another run (`restore`);
      3. the weights of another run or of a Hugging Face directory (`init_from`);
      4. the seed.

    This workdir comes first, because a run is continued by the command that began it: were
    `restore` looked at first, each restart would throw away what the run has learned since.

    Args:
        saved: Checkpoints of this workdir. local: LocalCheckpoints, or None.
        run: run.json as this start would write it; it must fit what is continued.
        abstract: shapes and shardings of the state. abstract_params: of the whole network, of
            which the state may train a part.
        create: create(seed=, params=None) -> the TrainState of step 0.
        restore: WORKDIR or WORKDIR@STEP; "": none.
        init_from: WORKDIR, WORKDIR@STEP or a Hugging Face directory; "": none.
        init_from_ema: see reads_ema.
        is_causal: whether the run trains a causal network, which is all that some Hugging Face
            directories hold.
        tokenizer: of the run.
        num_rollbacks: how often this run went back; local copies from before the last time hold
            what was rolled back.

    Raises:
        UserError: a checkpoint is damaged, or is of another network, tokenizer, data or config; or
            there are local copies and this workdir holds no run.
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
            # run.json is written at a run's first start, before anything is copied
            if not saved.steps and not (saved.directory.parent / FILE).exists():
                raise UserError(
                    f"{local.directory} holds step {int(state.step)} of a run in "
                    f"{saved.directory.parent}, which holds no run; to begin again, remove "
                    f"{local.directory} on all hosts, and to continue, put the workdir back."
                )
            if theirs.run_id != run.run_id:
                state, note = None, " (the local copies are of another run)"
        if state is not None:
            check_continues(theirs, run, local.directory)
            return FirstState(state, f"step {int(state.step)} of {local.directory}{note}", theirs)
    if saved.steps:
        step = saved.steps[-1]
        theirs = saved.record(step)
        check_continues(theirs, run, saved.directory)
        origin = f"step {step} of {saved.directory.parent}{note}"
        return FirstState(saved.restore(step, abstract), origin, theirs)
    if restore:
        other, step = find_checkpoint(restore)
        check_same_everywhere({f"the checkpoint {restore}": identity(other, [step])})
        theirs = other.record(step)
        check_continues(theirs, run, other.directory)
        origin = f"step {step} of {other.directory.parent} (config.checkpoint.restore)"
        return FirstState(other.restore(step, abstract), origin, theirs)
    if init_from:
        other, step = find_weights(init_from, causal=is_causal)
        check_same_everywhere({f"the checkpoint {init_from}": identity(other, [step])})
        theirs = other.record(step)
        check_initialises(
            theirs, run, other.directory, tokenizers=(tokenizer_of(other, theirs), tokenizer)
        )
        params = other.restore_params(
            step,
            abstract_params,
            ema=reads_ema(theirs, init_from_ema, init_from),
            lora=run.lora if run.lora.rank else None,
        )
        # create() passes them through jit, which makes buffers that the train step may take over
        # (see Checkpoints.restore)
        state = create(seed=seed, params=params)
        origin = f"weights of step {step} of {init_from} (config.checkpoint.init_from)"
        return FirstState(state, origin, None)
    return FirstState(create(seed=seed), f"initialisation from seed {seed}{note}", None)

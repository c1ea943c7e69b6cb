"""`llada-jax rollback`: takes a run back to an earlier step and leaves out the data that followed.

The LLaDA authors met a NaN after 1.2T of 2.3T tokens, went back to a checkpoint and lowered the
learning rate (arXiv 2502.09992, section 2.2).
"""

from collections.abc import Sequence

from llada_jax.checkpoints.orbax_patches import drop_echoes
from llada_jax.checkpoints.workdir import FOLDER, MARK, Checkpoints
from llada_jax.errors import UserError
from llada_jax.run.metrics_file import METRICS, SAMPLES, drop_lines_after, read_lines
from llada_jax.run.rollbacks import (
    Rollbacks,
    read_rollbacks,
    rollbacks_of_run,
    skip_after,
    write_rollbacks,
)
from llada_jax.storage import files, remote
from llada_jax.storage.locks import only_run_in
from llada_jax.sweeps.results import EXIT_FILE
from llada_jax.verbs.command_line import Parser

ASIDE = "rolled-back"


def make_parser() -> Parser:
    parser = Parser(
        "rollback",
        "Takes a run back to an earlier checkpoint and leaves out the data that followed it.",
        "llada-jax rollback --workdir runs/8b --to 120000",
    )
    parser.add_argument(
        "--workdir", required=True, metavar="DIR", help="workdir of a run that is not running"
    )
    parser.add_argument(
        "--to", type=int, required=True, metavar="STEP", help="the checkpoint to go back to"
    )
    parser.add_argument(
        "--skip",
        type=int,
        metavar="N",
        help="how many batches to leave out (default: up to the last known step; 0: none)",
    )
    return parser


def main(argv: list[str]) -> None:
    args = make_parser().parse_args(argv)
    drop_echoes()
    holder = "A train, or another rollback, is"
    remedy = "stop it, or wait for its end, and repeat the command"
    with only_run_in(args.workdir, holder=holder, remedy=remedy):
        print(roll_back(args.workdir, to=args.to, num_skipped=args.skip))


def roll_back(workdir: str, *, to: int, num_skipped: int | None = None) -> str:
    """Moves what is later than a step into WORKDIR/rolled-back/N and notes the data to leave out.

    Nothing is deleted. A call that was killed half-way may be repeated in the same way, and moves
    the rest into the next folder.

    Args:
        to: a saved step.
        num_skipped: how many of the batches after it are left out; None: up to the last step that
            was logged or saved.

    Returns:
        One sentence about what was done.

    Raises:
        UserError: the workdir has no checkpoint of that step or cannot be written, or `num_skipped`
            is negative.
    """
    path = remote.path_of(workdir)
    if not (path / FOLDER).exists():
        raise UserError(
            f"{workdir} holds no checkpoints; give the workdir of a run that `llada-jax train` has "
            "saved."
        )
    saved = Checkpoints(workdir, owned=False)
    steps = saved.steps
    if to not in steps:
        raise UserError(
            f"{workdir} has no checkpoint of step {to}; give --to one of the steps that it has: "
            f"{', '.join(map(str, steps)) or 'none'}."
        )
    found, recorded = read_rollbacks(workdir), None
    for step in () if found.count else reversed(steps):
        try:
            recorded = saved.record(step).rollbacks
            break
        except UserError:
            # The newest may be the damaged one that is to be moved away, but without any record it
            # is unknown which batches the run leaves out.
            if step == steps[0]:
                raise
    saved.close()
    count, skipped = rollbacks_of_run(found, recorded)
    number, last = count + 1, last_known_step(path, steps)
    # A call that was killed before it had written the list has left a folder, and may have moved
    # the last known step there.
    while (aside := path / ASIDE / str(number)).exists():
        moved = [int(entry.name) for entry in aside.iterdir() if entry.name.isdigit()]
        number, last = number + 1, max(last, last_known_step(aside, moved))
    num_skipped = last - to if num_skipped is None else num_skipped
    if num_skipped < 0:
        raise UserError(f"--skip {num_skipped} must not be negative; 0 leaves out nothing.")
    if num_skipped:
        skipped = skip_after(to, num_skipped, skipped)

    remedy = "free space there or change the permissions, and repeat the command"
    with files.writing(f"The workdir {workdir}", remedy=remedy):
        # A train that still runs in a bucket would save the next of the steps that are moved away.
        if remote.is_remote(workdir):
            remote.Claim(path)
        aside.mkdir(parents=True)
        for name in (METRICS, SAMPLES):
            if (path / name).exists():
                (aside / name).write_bytes((path / name).read_bytes())
        # Newest first: a kill in between leaves a run that is shorter, but whole.
        for step in sorted((step for step in steps if step > to), reverse=True):
            remote.move(path / FOLDER / str(step), aside / str(step), mark=MARK)
        # A second rollback must not take them for batches that were read.
        drop_lines_after(workdir, to)
        # A sweep would take the end that is undone for that of the run, and not start it again.
        (path / EXIT_FILE).unlink(missing_ok=True)
        # The list comes last. Were it written first, a kill after it would let the run continue
        # from a later step, and skip batches there that were never bad.
        write_rollbacks(workdir, Rollbacks(number, skipped))
    left_out = f"; the {num_skipped} batches after it are left out" if num_skipped else ""
    return (
        f"{workdir} is back at step {to}{left_out}; what was later lies in {aside}, and the same "
        "command continues."
    )


def last_known_step(folder, steps: Sequence[int]) -> int:
    """Returns the last step that was saved or logged, 0 where there is none.

    Metrics go further than checkpoints, and data that was trained on and never saved has been read
    as well.

    Args:
        folder: that holds metrics.jsonl. steps: that were saved.
    """
    return max([0, *steps, *(line["step"] for line in read_lines(folder))])

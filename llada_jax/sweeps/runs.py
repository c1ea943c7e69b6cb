"""The runs of a sweep: which there are, what each changes, and what sweep.json records."""

import contextlib
import json
import math
import runpy
from typing import NamedTuple

from etils import epath
from ml_collections import ConfigDict

from llada_jax.config import AUTO, load_config, neighbours_importable, parse_sources
from llada_jax.data.records import read_dataset
from llada_jax.errors import UserError, reason
from llada_jax.storage.files import check_readable, decode_json, write_whole, writing
from llada_jax.storage.locks import only_sweep_in
from llada_jax.storage.remote import path_of
from llada_jax.sweeps.grid import Knobs, added_by
from llada_jax.sweeps.results import FINISHED, Result, read_result
from llada_jax.validation import knob, knobs, num_steps_of

# Knobs that change how a run is carried out and not what comes out of it. They may differ from one
# start to the next, so that a sweep can continue on other machines.
_MAY_CHANGE = (
    "mesh.",
    "log.",
    "samples.",
    "checkpoint.every",
    "checkpoint.keep",
    "data.num_threads",
    "data.prefetch",
    "model.remat",  # memory and time alone, and its default was another one in version 0.1.0
)


class Run(NamedTuple):
    """One run of a sweep: its number, what it changes, the whole config, and where it lives."""

    index: int  # type: ignore[assignment]
    changes: Knobs
    config: ConfigDict
    workdir: str

    @property
    def name(self) -> str:
        return f"{self.index:03d}"

    @property
    def num_steps(self) -> int:
        return num_steps_of(self.config)

    def scored_on(self) -> dict[str, object]:
        """Returns what the final held-out bound of the run is taken with, by its name for the user:
        bounds that differ in it cannot be compared.
        """
        config, rows = self.config, []
        # as large as a microbatch of training (HeldoutEvaluations)
        size = config.data.batch_size // config.optimizer.gradient_accumulation
        wanted = config.evaluation.final_num_batches * size or math.inf
        for directory, _ in parse_sources(config.data.path):
            # of data that is not here what was asked for
            with contextlib.suppress(UserError, OSError):
                there = read_dataset(directory).splits["heldout"].num_records
                rows.append(min(there, wanted))
        averaged = config.evaluation.weights == "ema" or (
            config.evaluation.weights == AUTO and config.optimizer.ema_decay > 0
        )
        return {
            "rows": rows or wanted,
            "tokens per row": config.data.sequence_length,
            "weights": "ema" if averaged else "raw",
            "data": config.data.path,
        }

    def result(self) -> Result:
        """Returns what the run has left in its workdir by now."""
        return read_result(
            self.workdir, index=self.index, knobs=self.changes, num_steps=self.num_steps
        )


class Sweep(NamedTuple):
    """All runs of one config file.

    file: the config file. overrides: knobs of the command line that all runs share, as in "seed=1".
    workdir: DIR. base: the config with the overrides. runs: appended to while Optuna adds trials.
    suggest: suggest(trial) of the file, None where it has sweep(add).
    """

    file: str
    overrides: list[str]
    workdir: str
    base: ConfigDict
    runs: list[Run]
    suggest: object


def load_sweep(file: str, overrides: list[str], workdir: str) -> Sweep:
    """Returns the sweep of a config file.

    Every run is checked before any is started: a mistake in the last one would otherwise show after
    days. Runs that DIR was begun with must be unchanged, because the table compares them. They are
    known by their knobs and keep their numbers, and new ones get the numbers that follow, wherever
    the file adds them.

    Raises:
        UserError: the file, a knob or a combination of them is wrong, runs repeat, or DIR holds the
            runs of another sweep.
    """
    base = load_config(file, overrides)
    with neighbours_importable(file):
        defined = runpy.run_path(file)
    functions = {name: value for name, value in defined.items() if name in ("sweep", "suggest")}
    if len(functions) != 1:
        raise UserError(
            f"{file} defines {'both' if functions else 'neither'} of sweep(add) and "
            "suggest(trial); define one of them."
        )
    recorded = read_sweep_json(workdir)
    begun = recorded["runs"] if recorded else []
    sweep = Sweep(file, overrides, workdir, base, [], functions.get("suggest"))
    # With suggest(trial) the runs are those that were suggested so far.
    if sweep.suggest:
        runs = begun
    else:
        with user_code(f"sweep(add) of {file}"):
            runs = added_by(functions["sweep"])
        if not runs:
            raise UserError(f"sweep(add) of {file} adds no run; call add(...) once for each.")
        runs = numbered(sweep, runs, begun)
    for changes in runs:
        sweep.runs.append(next_run(sweep, changes))
    check_distinct(sweep)
    if recorded:
        check_base_unchanged(sweep, recorded)
    return sweep


def numbered(sweep: Sweep, added: list[Knobs], begun: list[Knobs]) -> list[Knobs]:
    """Returns what sweep(add) adds by number: first the runs that DIR was begun with, in their old
    order, and then the new ones.

    Two runs are the same when they agree in every knob that any run sets; where one does not set
    it, it has the value of the config. So a knob may be added to all runs with the value that it
    had.

    Raises:
        UserError: a run that DIR was begun with is no longer added.
    """
    names = sorted({name for changes in (*added, *begun) for name in changes})
    defaults = {}
    for name in names:
        # a name that the config does not have is refused when the run is made
        with contextlib.suppress(KeyError, TypeError, AttributeError):
            defaults[name] = knob(sweep.base, name)

    def identity(changes: Knobs):
        return tuple(hashable(as_json({**defaults, **changes}.get(name))) for name in names)

    new = {}
    for changes in added:
        new.setdefault(identity(changes), []).append(changes)
    kept = []
    for index, changes in enumerate(begun):
        same = new.get(identity(changes))
        if not same:
            raise UserError(
                f"Run {index:03d} in {sweep.workdir} was begun with {describe(changes)}, which "
                f"{sweep.file} no longer adds; undo the change, or give a new --workdir (runs may "
                "be added, and not changed or removed)."
            )
        kept.append(same.pop(0))
    # what is left of a list is a run that is added twice, which check_distinct refuses
    left = {id(changes) for same in new.values() for changes in same}
    return kept + [changes for changes in added if id(changes) in left]


def add_recorded(sweep: Sweep) -> None:
    """Appends the runs that sweep.json has got since the sweep was loaded, as Optuna adds them."""
    recorded = read_sweep_json(sweep.workdir) or {"runs": []}
    for changes in recorded["runs"][len(sweep.runs) :]:
        sweep.runs.append(next_run(sweep, changes))


@contextlib.contextmanager
def user_code(what: str):
    """Turns whatever the user's function raises within it into a UserError that names `what`."""
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise UserError(f"{what} fails with {type(error).__name__}: {error}; fix it.") from error


def next_run(sweep: Sweep, changes: Knobs) -> Run:
    """Returns the next run of a sweep; UserError when its config is impossible."""
    given = {word.partition("=")[0] for word in sweep.overrides}
    if both := sorted(given & set(changes)):
        raise UserError(
            f"--config.{both[0]} is given here and set by the sweep as well; remove one of them."
        )
    index = len(sweep.runs)
    try:
        config = load_config(sweep.file, [*sweep.overrides, *as_overrides(changes)])
    except UserError as error:
        raise UserError(
            f"Run {index:03d} of the sweep ({describe(changes)}) is impossible: {error}"
        ) from error
    return Run(index, changes, config, f"{sweep.workdir.rstrip('/')}/{index:03d}")


def as_overrides(changes: Knobs) -> list[str]:
    """Returns knobs as the command line spells them: ["optimizer.b2=0.98"]."""
    return [
        f"{name}={value if isinstance(value, str) else repr(value)}"
        for name, value in changes.items()
    ]


def describe(changes: Knobs) -> str:
    return " ".join(as_overrides(changes)) or "(the config as it is)"


def check_distinct(sweep: Sweep) -> None:
    seen = {}
    for run in sweep.runs:
        first = seen.setdefault(repr(run.config), run)
        if first is not run:
            raise UserError(
                f"Runs {first.name} and {run.name} of {sweep.file} are the same "
                f"({describe(run.changes)}); add it once, or give them different seeds."
            )


def read_sweep_json(workdir: str) -> dict | None:
    """Returns sweep.json, None where no run was ever started.

    Raises:
        UserError: it is damaged, this user may not read it, or its bucket does not answer.
    """
    path = path_of(workdir) / "sweep.json"
    try:
        if not path.exists():
            check_readable(path)
            return None
        recorded = decode_json(path.read_text())
        if not isinstance(recorded["base"], dict) or any(
            not isinstance(changes, dict) for changes in recorded["runs"]
        ):
            raise ValueError("its base or its runs are not objects")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is not the record of a sweep ({reason(error)}); move it away when the config "
            "is still that of the runs, or choose another --workdir."
        ) from error
    return recorded


def sweep_json_of(sweep: Sweep) -> dict:
    """Returns what sweep.json holds."""
    base = {
        name: knob(sweep.base, name)
        for name in knobs(sweep.base)
        if not name.startswith(_MAY_CHANGE)
    }
    return as_json(
        {"config": sweep.file, "base": base, "runs": [run.changes for run in sweep.runs]}
    )


@contextlib.contextmanager
def only_sweep(sweep: Sweep, *, shared: bool = False):
    """Holds the lock on DIR, which is created, while its block starts runs (only_sweep_in)."""
    path = epath.Path(sweep.workdir)
    with writing(path, remedy="choose another --workdir"):
        path.mkdir(parents=True, exist_ok=True)
    with only_sweep_in(sweep.workdir, shared=shared) as held:
        yield held


def write_sweep_json(sweep: Sweep) -> None:
    path = epath.Path(sweep.workdir) / "sweep.json"
    with writing(path, remedy="choose another --workdir"):
        # The tasks of a SLURM array write it at the same time.
        text = json.dumps(sweep_json_of(sweep), indent=1) + "\n"
        write_whole(path, text, concurrent=True)


def check_base_unchanged(sweep: Sweep, recorded: dict) -> None:
    """Raises UserError when DIR was begun with another base config."""
    now = sweep_json_of(sweep)
    for name, value in now["base"].items():
        # A knob that did not exist when DIR was begun had what is now its default.
        old = recorded["base"].get(name, value)
        if old != value:
            raise UserError(
                f"The runs in {sweep.workdir} have {name}={old!r}, the config has {value!r}; undo "
                "the change (where the config sets no value, another version had another "
                "default: set that of the runs), or give a new --workdir."
            )


def unfinished(sweep: Sweep) -> list[Run]:
    return [run for run in sweep.runs if run.result().state not in FINISHED]


def hashable(value):
    """Returns a value as sets and keys need it: tuples instead of lists, and the text of what no
    knob holds.
    """
    if isinstance(value, list | tuple):
        return tuple(map(hashable, value))
    try:
        hash(value)
    except TypeError:
        # a group of knobs as a dict, for example, which is refused by name later
        return repr(value)
    return value


def as_json(value):
    """Returns a value as JSON holds it: named tuples as dicts, tuples as lists, nan and inf as
    None.

    Python would write NaN, which is not JSON.
    """
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, dict):
        return {name: as_json(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

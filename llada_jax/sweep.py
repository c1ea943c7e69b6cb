"""`llada-jax sweep`: numbered runs from one config file, each in a workdir of its own; their table, curves and scaling law.

DIR/sweep.json          the base config and what each run changes: a changed file is refused, not mixed in
    000/  001/ ...      workdirs of `llada-jax train`, with train.log and exit.json beside its own files
    optuna.journal      the trials, where Optuna drives
"""

import contextlib
import json
import math
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from etils import epath
from ml_collections import ConfigDict

from llada_jax.command_line import Parser
from llada_jax.config import knob, knobs, load_config
from llada_jax.errors import Preempted, UserError, reason, require
from llada_jax.metrics import format_seconds
from llada_jax.sweep_results import (
    EXIT_FILE,
    FINISHED,
    INTERRUPTED,
    Result,
    effects,
    plot_curves,
    progress_of,
    ranked,
    read_result,
    table_lines,
    write_exit,
)  # fmt: skip
from llada_jax.sweeps import Knobs, added_by

POLL_SECONDS = 0.2
ACTIONS = ("list", "index", "run", "optuna", "table", "fit")
LAUNCHERS = Path(__file__).parent.parent / "launch"
# knobs that change how a run is carried out and not what comes out: they may differ from one start to the next
CARRIED_OUT = ("mesh.", "log.", "samples.", "checkpoint.every", "checkpoint.keep", "data.num_threads", "data.prefetch")


class Planned(NamedTuple):
    """One run of a sweep: its number, what it changes, the whole config, and where it lives."""

    index: int
    changes: Knobs
    config: ConfigDict
    workdir: str

    @property
    def name(self) -> str:
        return f"{self.index:03d}"

    @property
    def num_steps(self) -> int:
        data = self.config.data
        return self.config.num_steps or max(1, self.config.num_tokens // (data.batch_size * data.sequence_length))

    def result(self) -> Result:
        """Returns what the run has left in its workdir by now."""
        return read_result(self.workdir, index=self.index, knobs=self.changes, num_steps=self.num_steps)


class Sweep(NamedTuple):
    """file: the config file; words: knobs of the command line that all runs share, "seed=1"; workdir: DIR; base: the config
    with the words; suggest: suggest(trial) of the file, None where it has sweep(add)."""

    file: str
    words: list[str]
    workdir: str
    base: ConfigDict
    runs: list[Planned]
    suggest: object


def main(argv: list[str]) -> None:
    parser = Parser(
        "sweep",
        "Runs what sweep(add) of a config file adds, each run in DIR/000, DIR/001 ...; compares results.",
        "llada-jax sweep --config configs/ladder_tiny.py --workdir runs/ladder --run local",
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="Python file: get_config() and sweep(add)")
    parser.add_argument("--workdir", required=True, metavar="DIR", help="where all runs live; local or a URL")
    parser.add_argument("--list", action="store_true", help="the runs, what each changes, how far each is")
    parser.add_argument("--index", type=int, metavar="I", help="run or continue run I, here")
    parser.add_argument("--run", metavar="TARGET", help="what is not finished: local; slurm or gke [-- LAUNCHER FLAGS]")
    parser.add_argument("--optuna", type=int, metavar="N", help="run N trials of suggest(trial), here")
    parser.add_argument("--table", action="store_true", help="rank the runs; tell which knob moved what")
    parser.add_argument("--fit", action="store_true", help="scaling law of the runs (docs/scaling.md)")
    parser.add_argument("--parallel", type=int, metavar="N", help="runs at a time (local: 1, slurm: all)")
    parser.add_argument("--plot", metavar="FILE", help="with --table: curves as .png, .svg or .pdf")
    parser.add_argument("--dry-run", action="store_true", help="with --run: print what would be started")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout (list, table, fit)")
    parser.add_argument("--config.KEY", metavar="VALUE", dest="_", help="changes one knob of all runs")
    cut = argv.index("--") if "--" in argv else len(argv)
    ours, launcher_words = argv[:cut], argv[cut + 1 :]
    words = [word.removeprefix("--config.") for word in ours if word.startswith("--config.")]
    args = parser.parse_args([word for word in ours if not word.startswith("--config.")])
    action = check_flags(args, launcher_words)
    sweep = read_sweep(args.config, words, args.workdir)
    if action == "list":
        show_list(sweep, in_json=args.json)
    elif action == "table":
        show_table(sweep, in_json=args.json, plot=args.plot)
    elif action == "fit":
        show_fit(sweep, in_json=args.json)
    elif action == "index":
        run_index(sweep, args.index)
    elif action == "optuna":
        run_optuna(sweep, args.optuna)
    elif args.run == "local":
        run_local(sweep, num_parallel=args.parallel or 1, dry_run=args.dry_run)
    else:
        launch(sweep, args.run, launcher_words, num_parallel=args.parallel, dry_run=args.dry_run)


def check_flags(args, launcher_words: list[str]) -> str:
    """Returns the one action that is asked for; raises UserError for flags that say nothing or contradict each other."""
    chosen = [action for action in ACTIONS if getattr(args, action) is not None and getattr(args, action) is not False]
    if len(chosen) != 1:
        raise UserError(
            f"llada-jax sweep got {' and '.join(f'--{action}' for action in chosen) or 'nothing to do'}; give exactly one of "
            f"{', '.join(f'--{action}' for action in ACTIONS)}."
        )
    (action,) = chosen
    if not args.workdir:
        raise UserError("--workdir is empty; give the directory where the runs are to live.")
    if args.run not in (None, "local", "slurm", "gke"):
        raise UserError(f"--run {args.run} is unknown; write --run local, --run slurm or --run gke.")
    for flag, applies, where in (
        ("json", action in ("list", "table", "fit"), "--list, --table or --fit"),
        ("plot", action == "table", "--table"),
        ("dry_run", action == "run", "--run"),
        ("parallel", args.run in ("local", "slurm"), "--run local or --run slurm"),
    ):
        if getattr(args, flag) and not applies:
            raise UserError(f"--{flag.replace('_', '-')} goes with {where} and not with --{action}.")
    for flag in ("parallel", "optuna"):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            raise UserError(f"--{flag} {getattr(args, flag)} must be at least 1.")
    if launcher_words and args.run not in ("slurm", "gke"):
        raise UserError(
            f"The words after -- ({launcher_words[0]} ...) are for --run slurm and --run gke; leave them out."
        )
    return action


# --------------------------------------------------------------------------------------------------- the list of runs


def read_sweep(file: str, words: list[str], workdir: str) -> Sweep:
    """Returns the sweep of a config file, each run a valid config, and none other than those DIR was begun with.

    Raises:
        UserError: the file, a knob or a combination of them is wrong, runs repeat, or DIR holds the runs of another sweep.
    """
    base = load_config(file, words)
    functions = {name: value for name, value in runpy.run_path(file).items() if name in ("sweep", "suggest")}
    if len(functions) != 1:
        raise UserError(
            f"{file} defines {'both' if functions else 'neither'} of sweep(add) and suggest(trial); define one of them."
        )
    recorded = read_record(workdir)
    sweep = Sweep(file, words, workdir, base, [], functions.get("suggest"))
    if sweep.suggest:  # the runs are those that were suggested so far
        runs = recorded["runs"] if recorded else []
    else:
        with blaming(f"sweep(add) of {file}"):
            runs = added_by(functions["sweep"])
        if not runs:
            raise UserError(f"sweep(add) of {file} adds no run; call add(...) once for each.")
    for changes in runs:
        sweep.runs.append(planned(sweep, changes))
    check_distinct(sweep)
    if recorded:
        check_unchanged(sweep, recorded)
    return sweep


@contextlib.contextmanager
def blaming(what: str):
    """Turns whatever the user's function raises into a UserError that names it."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{what} fails with {type(error).__name__}: {error}; mend it.") from error


def planned(sweep: Sweep, changes: Knobs) -> Planned:
    """Returns the next run of a sweep; UserError when its config is impossible."""
    given = {word.partition("=")[0] for word in sweep.words}
    if both := sorted(given & set(changes)):
        raise UserError(f"--config.{both[0]} is given here and set by the sweep as well; remove it from one of them.")
    index = len(sweep.runs)
    try:
        config = load_config(sweep.file, [*sweep.words, *words_of(changes)])
    except UserError as error:
        raise UserError(f"Run {index:03d} of the sweep ({describe(changes)}) is impossible: {error}") from error
    return Planned(index, changes, config, f"{sweep.workdir.rstrip('/')}/{index:03d}")


def words_of(changes: Knobs) -> list[str]:
    """Returns knobs as the command line spells them: ["optimizer.b2=0.98"]."""
    return [f"{name}={value if isinstance(value, str) else repr(value)}" for name, value in changes.items()]


def describe(changes: Knobs) -> str:
    return " ".join(words_of(changes)) or "(the config as it is)"


def check_distinct(sweep: Sweep) -> None:
    seen = {}
    for run in sweep.runs:
        first = seen.setdefault(repr(run.config), run)
        if first is not run:
            raise UserError(
                f"Runs {first.name} and {run.name} of {sweep.file} are the same ({describe(run.changes)}); add it once, or "
                "give them different seeds."
            )


def read_record(workdir: str) -> dict | None:
    """Returns sweep.json, None where no run was ever started."""
    path = epath.Path(workdir) / "sweep.json"
    try:
        return json.loads(path.read_text()) if path.exists() else None
    except ValueError as error:
        raise UserError(f"{path} is no JSON ({error}); choose another --workdir.") from error


def record_of(sweep: Sweep) -> dict:
    """Returns what sweep.json holds."""
    base = {name: knob(sweep.base, name) for name in knobs(sweep.base) if not name.startswith(CARRIED_OUT)}
    return as_json({"config": sweep.file, "base": base, "runs": [run.changes for run in sweep.runs]})


def write_record(sweep: Sweep) -> None:
    path = epath.Path(sweep.workdir) / "sweep.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.parent / f"sweep.json.{os.getpid()}.partial"  # the tasks of an array write at the same time
        partial.write_text(json.dumps(record_of(sweep), indent=1) + "\n")
        partial.replace(path)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({reason(error)}); choose another --workdir.") from error


def check_unchanged(sweep: Sweep, recorded: dict) -> None:
    """Raises UserError when DIR holds runs of another sweep; runs added at the end are welcome."""
    now, remedy = record_of(sweep), "undo the change, or give a new --workdir"
    for name, value in now["base"].items():
        old = recorded["base"].get(name, value)  # a knob that did not exist when DIR was begun had its default
        if old != value:
            raise UserError(f"The runs in {sweep.workdir} have {name}={old!r}, the config has {value!r}; {remedy}.")
    for index, old in enumerate(recorded["runs"]):
        new = describe(now["runs"][index]) if index < len(now["runs"]) else "gone"
        if describe(old) != new:
            raise UserError(
                f"Run {index:03d} in {sweep.workdir} was begun as {describe(old)} and is now {new}; {remedy} "
                "(new runs go to the end)."
            )


def unfinished(sweep: Sweep) -> list[Planned]:
    return [run for run in sweep.runs if run.result().state not in FINISHED]


# ------------------------------------------------------------------------------------------------------ running them


class Attempt(NamedTuple):
    """One process of `llada-jax train`."""

    run: Planned
    process: subprocess.Popen
    began: float


class Attempts:
    """The processes under way. Within its `with` block SIGTERM and Ctrl-C are passed on to all of them.

    `must_stop` tells that one came. The processes are sessions of their own, so that the terminal's Ctrl-C reaches them once.
    """

    def __init__(self, sweep: Sweep):
        self._sweep, self._previous = sweep, {}
        self.under_way: list[Attempt] = []
        self.must_stop = False

    def __enter__(self):
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._pass_on)
        return self

    def __exit__(self, *exception):
        for attempt in self.under_way:  # only after an exception: nobody would look after them
            if attempt.process.poll() is None:
                attempt.process.terminate()
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _pass_on(self, number, frame):
        self.must_stop = True
        for attempt in self.under_way:
            if attempt.process.poll() is None:
                attempt.process.send_signal(number)

    def start(self, run: Planned, *, to_log: bool) -> None:
        """Starts or continues a run; with to_log it writes to its train.log, otherwise to our own stderr."""
        path = epath.Path(run.workdir)
        path.mkdir(parents=True, exist_ok=True)
        (path / EXIT_FILE).unlink(missing_ok=True)
        to_log = to_log and "://" not in run.workdir  # a bucket has no files that grow
        with open(path / "train.log", "ab") if to_log else contextlib.nullcontext() as log:
            process = subprocess.Popen(train_command(self._sweep, run), stdout=log, stderr=log, start_new_session=True)
        self.under_way.append(Attempt(run, process, time.monotonic()))
        if self.must_stop:  # the signal came before the process was there to hear of it
            process.terminate()

    def take_ended(self) -> list[Attempt]:
        """Returns the attempts that are over since the last call."""
        over = [attempt for attempt in self.under_way if attempt.process.poll() is not None]
        for attempt in over:
            self.under_way.remove(attempt)
        return over


def train_command(sweep: Sweep, run: Planned) -> list[str]:
    words = [f"--config.{word}" for word in (*sweep.words, *words_of(run.changes))]
    return [
        sys.executable, "-m", "llada_jax", "train", "--config", sweep.file, "--workdir", run.workdir, *words
    ]  # fmt: skip


def record_end(attempt: Attempt, *, pruned: bool = False) -> int:
    """Writes and returns the exit status of an attempt that is over, as shells count it."""
    code = attempt.process.returncode
    status = code if code >= 0 else 128 - code
    write_exit(attempt.run.workdir, status=status, pruned=pruned)
    return status


def run_index(sweep: Sweep, index: int) -> None:
    """Runs one run in the foreground; ends this process with the exit status of `train`."""
    if not 0 <= index < len(sweep.runs):
        raise UserError(f"--index {index}: {sweep.file} has the runs 0 to {len(sweep.runs) - 1}.")
    write_record(sweep)
    with Attempts(sweep) as attempts:
        attempts.start(sweep.runs[index], to_log=False)
        attempts.under_way[0].process.wait()
    if status := record_end(attempts.under_way[0]):
        sys.exit(status)


def run_local(sweep: Sweep, *, num_parallel: int, dry_run: bool) -> None:
    """Runs what is not finished, `num_parallel` at a time; a run that fails does not stop the others."""
    waiting = unfinished(sweep)
    if dry_run:
        for run in waiting:
            print(shlex.join(train_command(sweep, run)))
        return
    write_record(sweep)
    say(f"{len(waiting)} of {len(sweep.runs)} runs are to be done")
    statuses = {}
    with Attempts(sweep) as attempts:
        while attempts.under_way or (waiting and not attempts.must_stop):
            while waiting and len(attempts.under_way) < num_parallel and not attempts.must_stop:
                run = waiting.pop(0)
                say(f"{run.name} starts: {describe(run.changes)}")
                attempts.start(run, to_log=True)
            time.sleep(POLL_SECONDS)
            for attempt in attempts.take_ended():
                statuses[attempt.run.index] = record_end(attempt)
                say(outcome(attempt))
    failed = [index for index, status in statuses.items() if status not in (0, 3, *INTERRUPTED)]
    if failed:
        status = statuses[failed[0]]
        log = f"{sweep.runs[failed[0]].workdir}/train.log"
        say(f"{len(failed)} failed, the first with status {status}; {log} tells why")
        sys.exit(status)
    if attempts.must_stop or set(INTERRUPTED) & set(statuses.values()):
        left = len(unfinished(sweep))
        raise Preempted(f"asked to stop with {left} of {len(sweep.runs)} runs left; the same command continues.")


def say(message: str) -> None:
    print(f"sweep: {message}", file=sys.stderr, flush=True)


def outcome(attempt: Attempt) -> str:
    """Returns e.g. "003 complete: 2.104 bits/byte, step 500/500, 1m10s"."""
    result = attempt.run.result()
    bits = "" if math.isnan(result.bits_per_byte) else f" {result.bits_per_byte:.3f} bits/byte,"
    seconds = format_seconds(time.monotonic() - attempt.began)
    return f"{attempt.run.name} {result.state}:{bits} step {result.step}/{result.num_steps}, {seconds}"


def launch(sweep: Sweep, target: str, launcher_words: list[str], *, num_parallel: int | None, dry_run: bool) -> None:
    """Hands what is not finished to launch/slurm.py as one array, or to launch/gke.py as one JobSet a run."""
    script = LAUNCHERS / f"{target}.py"
    if not script.is_file():
        raise UserError(f"--run {target} needs {script}, which is part of the repository; run it from a clone.")
    waiting = unfinished(sweep)
    if not waiting:
        say(f"all {len(sweep.runs)} runs are finished")
        return
    if not dry_run:
        write_record(sweep)
    launcher = [sys.executable, str(script), *(["--dry-run"] if dry_run else []), *launcher_words]
    ours = ["llada-jax", "sweep", "--config", sweep.file, "--workdir", sweep.workdir]
    ours += [f"--config.{word}" for word in sweep.words]
    if target == "slurm":
        indices = ",".join(str(run.index) for run in waiting) + (f"%{num_parallel}" if num_parallel else "")
        commands = [[*launcher, "--array", indices, "--", *ours, "--index", "$SLURM_ARRAY_TASK_ID"]]
    else:
        stem = re.sub(r"[^a-z0-9]+", "-", sweep.workdir.rstrip("/").rpartition("/")[2].lower()).strip("-")
        commands = [
            [*launcher, "--name", f"{stem}-{run.name}", "--", *ours, "--index", str(run.index)] for run in waiting
        ]
    for command in commands:
        if status := subprocess.run(command, check=False).returncode:
            sys.exit(status)


# ------------------------------------------------------------------------------------------------------------- Optuna


def run_optuna(sweep: Sweep, num_trials: int) -> None:
    """Runs trials of suggest(trial) one after another until `num_trials` are over; continues where it was stopped.

    A trial's value is the held-out bits per byte. After each held-out evaluation Optuna's pruner may end the run.
    """
    if not sweep.suggest:
        raise UserError(f"--optuna needs suggest(trial) in {sweep.file}, which has sweep(add); use --run local.")
    if "://" in sweep.workdir:
        raise UserError(f"--optuna keeps a journal in --workdir {sweep.workdir}, which must be a local directory.")
    optuna = require("optuna", extra="optuna")
    write_record(sweep)
    study, states = open_study(optuna, sweep), optuna.trial.TrialState
    for stopped in study.get_trials(deepcopy=False, states=(states.RUNNING,)):
        if "run" in stopped.user_attrs:
            run_trial(optuna, study, optuna.trial.Trial(study, stopped._trial_id), sweep)
        else:  # stopped before its run had a number
            study.tell(stopped.number, state=states.FAIL)
    over = (states.COMPLETE, states.PRUNED)
    while len(study.get_trials(deepcopy=False, states=over)) < num_trials:
        trial = study.ask()
        with blaming(f"suggest(trial) of {sweep.file}"):
            changes = suggested(sweep, trial)
        same = [run for run in sweep.runs if run.changes == changes]
        if not same:
            sweep.runs.append(planned(sweep, changes))
            write_record(sweep)
        trial.set_user_attr("run", same[0].index if same else sweep.runs[-1].index)
        run_trial(optuna, study, trial, sweep)
    best = study.best_trial
    run = sweep.runs[best.user_attrs["run"]]
    say(f"best of {num_trials} trials: {run.name}, {best.value:.3f} bits/byte: {describe(run.changes)}")


def suggested(sweep: Sweep, trial) -> Knobs:
    """Returns what suggest(trial) wants changed, as sweep.json will give it back."""
    (changes,) = added_by(lambda add: add(sweep.suggest(trial)))
    return as_json(changes)


def open_study(optuna, sweep: Sweep):
    """Returns the study in DIR/optuna.journal, made if there is none."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    backend = optuna.storages.journal.JournalFileBackend(f"{sweep.workdir.rstrip('/')}/optuna.journal")
    study = optuna.create_study(
        storage=optuna.storages.JournalStorage(backend), study_name="sweep", direction="minimize", load_if_exists=True
    )
    # a sampler starts anew with every process: with the same seed it would suggest the first trials once more
    study.sampler = optuna.samplers.TPESampler(seed=sweep.base.seed + len(study.get_trials(deepcopy=False)))
    return study


def run_trial(optuna, study, trial, sweep: Sweep) -> None:
    """Runs one trial to its end, or until it is pruned, and tells the study."""
    states, run = optuna.trial.TrialState, sweep.runs[trial.user_attrs["run"]]
    reported, is_pruned = set(study.get_trials(deepcopy=False)[trial.number].intermediate_values), False
    say(f"{run.name} starts: {describe(run.changes)}")
    with Attempts(sweep) as attempts:
        attempts.start(run, to_log=True)
        attempt, pause = attempts.under_way[0], POLL_SECONDS
        while attempt.process.poll() is None:
            time.sleep(pause)
            began = time.monotonic()
            news = [(step, bits) for step, bits in run.result().curve if step < run.num_steps and step not in reported]
            pause = max(POLL_SECONDS, 20 * (time.monotonic() - began))  # long files are read less often
            for step, bits in news:
                reported.add(step)
                trial.report(bits, step)
            if news and not is_pruned and trial.should_prune():
                is_pruned = True
                attempt.process.terminate()
    is_pruned = is_pruned and attempt.process.returncode != 0  # it may have been over before it was told
    status = record_end(attempt, pruned=is_pruned)
    say(outcome(attempt))
    if attempts.must_stop or (status in INTERRUPTED and not is_pruned):
        raise Preempted(f"asked to stop in trial {trial.number}; the same command continues it.")
    result = run.result()
    if is_pruned:
        study.tell(trial, state=states.PRUNED)
    elif status == 0 and not math.isnan(result.bits_per_byte):
        study.tell(trial, result.bits_per_byte)
    else:
        study.tell(trial, state=states.FAIL)
        if status == 0:
            raise UserError(f"{run.workdir} has no held-out bits per byte to tell Optuna; prepare data with --heldout.")
        if status != 3:  # a loss that is not finite only says: not here
            say(f"trial {trial.number} failed with status {status}; {run.workdir}/train.log tells why")
            sys.exit(status)


# ---------------------------------------------------------------------------------------------------------- reporting


def as_json(value):
    """Returns a value as JSON holds it: named tuples as dicts, tuples as lists, nan and inf as None."""
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, dict):
        return {name: as_json(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def show_list(sweep: Sweep, *, in_json: bool) -> None:
    results = [run.result() for run in sweep.runs]
    if in_json:
        print_json({"runs": [without_curves(result) for result in results]})
        return
    for result in results:
        print(f"{result.index:03d}  {progress_of(result):<18}{describe(result.knobs)}")


def without_curves(result: Result) -> dict:
    return {name: value for name, value in result._asdict().items() if not name.endswith("curve")}


def print_json(value) -> None:
    print(json.dumps(as_json(value)))


def show_table(sweep: Sweep, *, in_json: bool, plot: str | None) -> None:
    """Prints the ranking and what each knob did; draws the curves where a file is named."""
    results = [run.result() for run in sweep.runs]
    names = dict.fromkeys(name for run in sweep.runs for name in run.changes)
    found = effects(results, [{name: knob(run.config, name) for name in names} for run in sweep.runs])
    if plot:
        plot_curves(results, plot, label=lambda result: f"{result.index:03d} {describe(result.knobs)}")
    if in_json:
        print_json({"runs": ranked(results), "effects": found})
        return
    for line in table_lines(results, found, label=lambda result: describe(result.knobs)):
        print(line)


def show_fit(sweep: Sweep, *, in_json: bool) -> None:
    """Prints IsoFLOP optima, their power laws and the parametric fit of all complete runs."""
    # imported here: scipy and jax take seconds that --list need not wait for
    from llada_jax.models.transformer import Architecture, num_matmul_parameters
    from llada_jax.scaling import Run, fit_isoflop, fit_lines, fit_parametric

    runs = []
    for result in (run.result() for run in sweep.runs):
        if result.state == "complete" and not math.isnan(result.nats_per_token):
            run_json = json.loads((epath.Path(result.workdir) / "run.json").read_text())
            a = Architecture(**run_json["architecture"])
            runs.append(Run(num_matmul_parameters(a) - a.d_model * a.vocab_size, result.tokens, result.nats_per_token))
    isoflop = fit_isoflop(runs)
    try:
        parametric, reason = fit_parametric(runs), ""
    except UserError as error:  # the parabolas need fewer runs than this
        parametric, reason = None, str(error)
    if in_json:
        print_json({"isoflop": isoflop, "parametric": parametric, "parametric_missing": reason})
        return
    for line in fit_lines(isoflop, parametric, reason):
        print(line)

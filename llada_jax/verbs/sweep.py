"""`llada-jax sweep`: numbered runs from one config file, each in its own workdir, and what they
show.

DIR/sweep.json          the base config and what each run changes; a changed sweep is refused
    000/  001/ ...      workdirs of `llada-jax train`, with train.log and exit.json next to its
    files optuna.journal      the trials, where Optuna suggests them
"""

import math

from llada_jax.errors import UserError
from llada_jax.sweeps.comparison import effects, ranked, unlike
from llada_jax.sweeps.optuna_search import run_optuna
from llada_jax.sweeps.results import Result
from llada_jax.sweeps.runs import Sweep, as_json, describe, load_sweep
from llada_jax.sweeps.table import plot_curves, progress_of, table_lines
from llada_jax.sweeps.targets import run_index, run_local, run_with_launcher
from llada_jax.validation import knob
from llada_jax.verbs.command_line import Parser, json_text

ACTIONS = ("list", "index", "run", "optuna", "table", "fit")


def make_parser() -> Parser:
    parser = Parser(
        "sweep",
        "Runs what sweep(add) of a config file adds, in DIR/000, DIR/001 ...; compares results.",
        "llada-jax sweep --config configs/ladder_tiny.py --workdir runs/ladder --run local",
    )
    parser.add_config_flags(
        file="Python file: get_config() and sweep(add)", knob="changes one knob of all runs"
    )
    parser.add_argument(
        "--workdir", required=True, metavar="DIR", help="where all runs live; local or a URL"
    )
    parser.add_argument(
        "--list", action="store_true", help="list the runs, what each changes and how far it is"
    )
    parser.add_argument("--index", type=int, metavar="I", help="run or continue run I here")
    parser.add_argument(
        "--run",
        metavar="TARGET",
        help="run what is not finished: local; slurm or gke [-- LAUNCHER FLAGS]",
    )
    parser.add_argument(
        "--optuna", type=int, metavar="N", help="run N trials of suggest(trial) here"
    )
    parser.add_argument(
        "--table", action="store_true", help="rank the runs and show which knob moved what"
    )
    parser.add_argument(
        "--fit", action="store_true", help="fit the scaling law of the runs (docs/scaling.md)"
    )
    parser.add_argument(
        "--parallel", type=int, metavar="N", help="runs at a time (local: 1, slurm: all)"
    )
    parser.add_argument("--plot", metavar="FILE", help="with --table: curves as .png, .svg or .pdf")
    parser.add_argument(
        "--dry-run", action="store_true", help="with --run: print what would be started"
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object on stdout (list, table, fit)"
    )
    return parser


def main(argv: list[str]) -> None:
    cut = argv.index("--") if "--" in argv else len(argv)
    ours, launcher_words = argv[:cut], argv[cut + 1 :]
    args, overrides = make_parser().parse_with_overrides(ours)
    action = check_flags(args, launcher_words)
    sweep = load_sweep(args.config, overrides, args.workdir)
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
        run_with_launcher(
            sweep, args.run, launcher_words, num_parallel=args.parallel, dry_run=args.dry_run
        )


def check_flags(args, launcher_words: list[str]) -> str:
    """Returns the one action that is asked for.

    Raises:
        UserError: no action or several, or a flag that has no meaning with this action.
    """
    # By identity, because --index 0 is an action and 0 == False.
    values = {action: getattr(args, action) for action in ACTIONS}
    chosen = [name for name, value in values.items() if value is not None and value is not False]
    if len(chosen) != 1:
        got = " and ".join(f"--{action}" for action in chosen) or "nothing to do"
        known = ", ".join(f"--{action}" for action in ACTIONS)
        raise UserError(f"llada-jax sweep got {got}; give exactly one of {known}.")
    (action,) = chosen
    if not args.workdir:
        raise UserError("--workdir is empty; give the directory that is to hold the runs.")
    if args.run not in (None, "local", "slurm", "gke"):
        raise UserError(
            f"--run {args.run} is unknown; write --run local, --run slurm or --run gke."
        )
    for flag, applies, where in (
        ("json", action in ("list", "table", "fit"), "--list, --table or --fit"),
        ("plot", action == "table", "--table"),
        ("dry_run", action == "run", "--run"),
        ("parallel", args.run in ("local", "slurm"), "--run local or --run slurm"),
    ):
        if getattr(args, flag) and not applies:
            raise UserError(
                f"--{flag.replace('_', '-')} goes with {where} and not with --{action}."
            )
    for flag in ("parallel", "optuna"):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            raise UserError(f"--{flag} {getattr(args, flag)} must be at least 1.")
    if launcher_words and args.run not in ("slurm", "gke"):
        raise UserError(
            f"The words after -- ({launcher_words[0]} ...) are for --run slurm and --run gke; "
            "leave them out."
        )
    return action


# ---- reporting


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
    print(json_text(as_json(value)))


def show_table(sweep: Sweep, *, in_json: bool, plot: str | None) -> None:
    """Prints the ranking and what each knob did, and draws the curves if a file is given."""
    results = [run.result() for run in sweep.runs]
    names = dict.fromkeys(name for run in sweep.runs for name in run.changes)
    found = effects(
        results, [{name: knob(run.config, name) for name in names} for run in sweep.runs]
    )
    if plot:
        plot_curves(
            results, plot, label=lambda result: f"{result.index:03d} {describe(result.knobs)}"
        )
    complete = [run for run, result in zip(sweep.runs, results) if result.state == "complete"]
    notes = unlike([run.scored_on() for run in complete], [run.name for run in complete])
    if in_json:
        print_json({"runs": ranked(results), "effects": found, "notes": notes})
        return
    for line in table_lines(results, found, label=lambda result: describe(result.knobs)):
        print(line)
    if notes:
        print("")
    for note in notes:
        print(f"{note}; the ranking and the effects mix them")


def show_fit(sweep: Sweep, *, in_json: bool) -> None:
    """Prints IsoFLOP optima, their power laws and the parametric fit of all complete runs."""
    # Imported here: scipy and jax take seconds, for which --list need not wait.
    from llada_jax.checkpoints.record import read_run
    from llada_jax.models.flops import flops_per_token
    from llada_jax.models.transformer import num_matmul_parameters
    from llada_jax.sweeps.scaling_law import (
        FinishedRun,
        fit_isoflop,
        fit_lines,
        fit_parametric,
    )

    runs = []
    for result in (run.result() for run in sweep.runs):
        if result.state == "complete" and not math.isnan(result.nats_per_token):
            record = read_run(result.workdir)
            a, num_parameters = record.architecture, num_matmul_parameters(record.architecture)
            flops = flops_per_token(
                num_parameters,
                a.num_layers,
                a.num_heads * a.head_dim,
                record.sequence_length,
                causal=record.mask.causal,
            )
            runs.append(
                FinishedRun(
                    num_parameters - a.d_model * a.vocab_size,
                    result.tokens,
                    result.nats_per_token,
                    flops,
                )
            )
    isoflop = fit_isoflop(runs)
    try:
        parametric, reason = fit_parametric(runs), ""
    # The parabolas need fewer runs than this fit, and are worth printing alone.
    except UserError as error:
        parametric, reason = None, str(error)
    if in_json:
        print_json({"isoflop": isoflop, "parametric": parametric, "parametric_missing": reason})
        return
    for line in fit_lines(isoflop, parametric, reason):
        print(line)

"""`llada-jax evaluate`: the likelihood bound of a checkpoint on records, next to baselines without
a network, and its answers to questions.
"""

import argparse
import os
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
from jax.sharding import Mesh

from llada_jax import pretrained, schemas
from llada_jax.arguments import checked
from llada_jax.checkpoints.orbax_patches import drop_echoes
from llada_jax.checkpoints.workdir import parse_checkpoint
from llada_jax.cluster import sharding
from llada_jax.cluster.agreement import check_same_everywhere
from llada_jax.data.records import read_dataset
from llada_jax.data.tokenizer import load_same
from llada_jax.errors import UserError, look_up
from llada_jax.evaluation import harness
from llada_jax.evaluation.baselines import unigram_bits_per_byte, xz_bits_per_byte
from llada_jax.evaluation.breakdown import breakdown_of_split
from llada_jax.evaluation.conditional import ESTIMATORS
from llada_jax.evaluation.harness_tasks import check_estimator, load_tasks, read_settings
from llada_jax.evaluation.presets import as_arguments, preset
from llada_jax.evaluation.reports import (
    harness_lines,
    report_harness,
    report_split,
    report_tasks,
)
from llada_jax.evaluation.speed import first_tokens, sampling_speed
from llada_jax.evaluation.splits import bound_of_split, rows_at_a_time
from llada_jax.evaluation.tasks import DIRECTIONS, answer, items_of, read_tasks
from llada_jax.objectives.named import make_objective
from llada_jax.paths import user_path
from llada_jax.ranges import DRAWS, SEED, SIZE, STRENGTH, check_number
from llada_jax.run.metrics_file import read_lines, read_samples
from llada_jax.run.report_page import report_page
from llada_jax.storage import remote
from llada_jax.storage.files import write_whole, writing
from llada_jax.streams import write_line
from llada_jax.verbs.command_line import Parser, json_text, placement

# One line each would not fit a screen; docs/evaluation.md explains them.
MORE_FLAGS = """more flags, explained in docs/evaluation.md:
  --gen-length N  --estimator NAME  --preset NAME  --harness KEY=VALUE  --breakdown  --speed
  --ema  --tokenizer PATH  --mesh AXES  --dtype NAME
"""


def make_parser() -> Parser:
    parser = Parser(
        "evaluate",
        "Prints the bound on the likelihood of a split, or how a file of questions is answered.",
        "llada-jax evaluate --checkpoint runs/tiny/run --data runs/tiny/data --mc-samples 4",
    )
    parser.usage = "llada-jax evaluate --checkpoint CKPT {--data DIR | --tasks FILE} [flags]"
    parser.epilog = f"{MORE_FLAGS}\n{parser.epilog}"
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="CKPT",
        help="WORKDIR, WORKDIR@STEP or Hugging Face directory",
    )
    parser.add_argument("--data", metavar="DIR", help="directory written by prepare")
    parser.add_argument(
        "--tasks",
        action="append",
        metavar="FILE",
        help="a .jsonl of questions, or a task of lm-evaluation-harness",
    )
    parser.add_argument(
        "--ask",
        nargs="+",
        choices=DIRECTIONS,
        metavar="HOW",
        help="forwards, backwards, infill (all that fit)",
    )
    parser.add_argument("--split", default="heldout", help="train or heldout (default)")
    parser.add_argument(
        "--mc-samples",
        type=int,
        metavar="N",
        help="corruptions drawn for each row (1) or answer (128)",
    )
    parser.add_argument(
        "--cfg-scale", type=float, default=0.0, metavar="W", help="guidance towards the prompt (0)"
    )
    parser.add_argument(
        "--batch-size", type=int, default=64, metavar="B", help="rows scored at a time (64)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the corruptions (0)")
    parser.add_argument(
        "--baselines", action="store_true", help="also score unigram and xz -9 on the same text"
    )
    parser.add_ema_flag(is_listed=False)
    parser.add_argument(
        "--report", metavar="DIR", help="also write DIR/report.html with the curves of the run"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")

    # Listed in MORE_FLAGS.
    hidden = partial(parser.add_argument, help=argparse.SUPPRESS)
    hidden("--gen-length", type=int, metavar="N")
    hidden("--estimator", default="exact_count", metavar="NAME")
    hidden("--preset", metavar="NAME")
    hidden("--harness", action="append", default=[], metavar="KEY=VALUE")
    hidden("--breakdown", action="store_true")
    hidden("--speed", action="store_true")
    hidden("--tokenizer", default="", metavar="PATH")
    parser.add_placement_flags()
    return parser


def main(argv: list[str]) -> None:
    args = make_parser().parse_args(argv)
    check(args)
    drop_echoes()
    if is_harness(args):
        result, lines = evaluate_harness(args), report_harness
    elif args.tasks:
        names = ("ask", "cfg_scale", "gen_length", "estimator")
        asked = {name: getattr(args, name) for name in names}
        result = evaluate_tasks(args.checkpoint, args.tasks[0], **asked, **shared(args))
        lines = report_tasks
    else:
        asked = {name: getattr(args, name) for name in ("split", "baselines", "breakdown", "speed")}
        result = evaluate(args.checkpoint, args.data, **asked, **shared(args))
        lines = report_split
    # All processes of a run have the result.
    if jax.process_index() > 0:
        return
    # First: where the report cannot be written, the result of hours is not lost.
    print(json_text(result) if args.json else lines(result), flush=True)
    if args.report:
        write_report(args, result)


def shared(args) -> dict:
    """Returns the settings of every evaluation."""
    names = ("mc_samples", "batch_size", "seed", "ema", "tokenizer")
    return {name: getattr(args, name) for name in names} | placement(args)


def write_report(args, result: dict) -> None:
    """Writes DIR/report.html: the result, the curves and the samples of the workdir that it comes
    from, and DIR/frontier.json where there is one.
    """
    workdir, _ = parse_checkpoint(args.checkpoint)
    directory = remote.path_of(args.report)
    frontier, file = None, directory / "frontier.json"
    if file.exists():
        content = schemas.parse_json(file.read_bytes(), file=file)
        frontier = schemas.check(content, schemas.Frontier, file=file)
    lines, samples = read_lines(workdir), read_samples(workdir)
    page = report_page(args.checkpoint, lines, result, frontier, samples)
    with writing(directory / "report.html", remedy="name another --report"):
        directory.mkdir(parents=True, exist_ok=True)
        # two evaluations of one run may have the same directory
        write_whole(directory / "report.html", page, concurrent=True)


def is_harness(args) -> bool:
    """Whether --tasks names tasks of lm-evaluation-harness, and not a file."""
    return bool(args.preset) or bool(args.tasks) and not args.tasks[0].endswith(".jsonl")


def check(args) -> None:
    """Fills in the number of samples; raises UserError for flags that do not fit together."""
    if bool(args.data) == bool(args.tasks or args.preset):
        raise UserError("evaluate takes --data DIR, or --tasks or --preset.")
    if args.tasks and not is_harness(args) and len(args.tasks) > 1:
        raise UserError("--tasks takes one .jsonl file of questions; evaluate several in turn.")
    kind = "--data" if args.data else "harness" if is_harness(args) else "--tasks FILE.jsonl"
    fits = {
        "baselines": ("--data",),
        "breakdown": ("--data",),
        "speed": ("--data",),
        "ask": ("--tasks FILE.jsonl",),
        "gen_length": ("--tasks FILE.jsonl",),
        "estimator": ("--tasks FILE.jsonl", "harness"),
        "harness": ("harness",),
        "cfg_scale": ("--tasks FILE.jsonl", "harness"),
    }
    unset = vars(make_parser().parse_args(["--checkpoint", "-"]))
    for flag, kinds in fits.items():
        if getattr(args, flag) != unset[flag] and kind not in kinds:
            raise UserError(
                f"--{flag.replace('_', '-')} does not fit this evaluation; it is for "
                f"{' and '.join(kinds)}."
            )
    look_up(ESTIMATORS, args.estimator, "estimator")
    is_own = args.cfg_scale or args.mc_samples or args.estimator != unset["estimator"]
    if args.preset and is_own:
        raise UserError(
            f"--preset {args.preset} decides on --mc-samples, --cfg-scale and --estimator; leave "
            "them out, or name the tasks without a preset."
        )
    if args.mc_samples is None:
        args.mc_samples = 1 if args.data else 128
    check_number("--mc-samples ", args.mc_samples, DRAWS)
    check_number("--batch-size ", args.batch_size, SIZE)
    check_number("--seed ", args.seed, SEED)
    check_number("--cfg-scale ", args.cfg_scale, STRENGTH)


def check_sizes(*, mc_samples: int, batch_size: int) -> None:
    check_number("mc_samples=", mc_samples, DRAWS)
    check_number("batch_size=", batch_size, SIZE)


@checked
def evaluate(
    checkpoint: str | os.PathLike[str],
    data: str | os.PathLike[str],
    *,
    split: str = "heldout",
    mc_samples: int = 1,
    batch_size: int = 64,
    seed: int = 0,
    baselines: bool = False,
    breakdown: bool = False,
    speed: bool = False,
    ema: bool | None = None,
    tokenizer: str | os.PathLike[str] = "",
    dtype: str = "auto",
    mesh: Mesh | None = None,
    keep_float32: bool = True,
) -> dict[str, Any]:
    """Returns the bound on the likelihood of a split, as `llada-jax evaluate --json` prints it.

    Args:
        checkpoint: WORKDIR, WORKDIR@STEP, or a Hugging Face directory.
        data: a directory that `llada-jax prepare` wrote.
        split: "heldout" or "train".
        mc_samples: corruptions drawn for each row.
        batch_size: rows at a time, rounded up to what the mesh splits evenly.
        seed: of the corruptions.
        baselines: also score token frequencies and xz on the same text.
        breakdown: also the bound by position and the loss by time.
        speed: also how fast texts are sampled, see llada_jax.evaluation.speed.
        ema, tokenizer, dtype, mesh, keep_float32: see llada_jax.load.

    Raises:
        UserError: checkpoint, data and settings do not fit together.
    """
    check_sizes(mc_samples=mc_samples, batch_size=batch_size)
    data = user_path(data)
    model = pretrained.load(
        checkpoint,
        ema=ema,
        tokenizer=tokenizer,
        dtype=dtype,
        mesh=mesh,
        keep_float32=keep_float32,
        needs_text=True,
    )
    info = read_dataset(data)
    if model.mesh.is_multi_process:
        check_same_everywhere({"the dataset": info.fingerprint})
    if info.tokenizer["fingerprint"] != model.tokenizer.fingerprint and not load_same(
        f"{data}/tokenizer", info.tokenizer["fingerprint"], of="the records"
    ).behaves_like(model.tokenizer):
        raise UserError(
            f"{data} was prepared with another tokenizer "
            f"({info.tokenizer['fingerprint'][:12]}) than the checkpoint's "
            f"({model.tokenizer.fingerprint[:12]}); prepare it with --tokenizer "
            f"{checkpoint}/tokenizer."
        )
    objective = make_objective(model.tokenizer, **model.record.knob("objective"))
    of_split = info.filled_split(split)
    sharding.check_divisible(
        model.mesh, {"--mesh: the length of the rows": ("act_position", info.sequence_length)}
    )
    settings: dict[str, Any] = dict(
        split=split,
        objective=objective,
        batch_size=rows_at_a_time(batch_size, of_split.num_records, model.mesh),
        sequence_length=info.sequence_length,
        batch_sharding=sharding.batch_sharding(model.mesh),
        # as in training: a model that never saw a document end within a row is not asked to. Of
        # dialogues, none may see another.
        attend_across_documents=(
            model.record.knob("data.attend_across_documents") and info.dialogues is None
        ),
        seed=seed,
        num_draws=mc_samples,
    )
    packed = not settings["attend_across_documents"]
    network = pretrained.network_for_rows(model, info.sequence_length, dtype=dtype, packed=packed)
    bound = bound_of_split(
        network,
        model.params,
        data,
        bytes_per_token=of_split.num_scored_bytes / of_split.num_scored_tokens,
        **settings,
    )
    # the keys are what scripts read; they stay
    result = {
        "checkpoint": str(checkpoint),
        "step": model.step,
        "split": split,
        "num_tokens": bound.num_tokens,
        "mc_samples": mc_samples,
        f"{objective.bound_name}_nats_per_token": bound.nats_per_token,
        "standard_error": bound.standard_error,
        "bits_per_byte": bound.bits_per_byte,
        "bits_per_byte_standard_error": bound.bits_per_byte_standard_error,
    }
    if baselines:
        alone, after_train = xz_bits_per_byte(info, model.tokenizer, split=split)
        result["unigram_bits_per_byte"] = unigram_bits_per_byte(info, split=split)
        result["xz_bits_per_byte"] = alone
        result["xz_after_train_bits_per_byte"] = after_train
    if breakdown:
        parts = breakdown_of_split(network, model.params, data, **settings)
        for name, shares in parts._asdict().items():
            if shares is not None:
                result[name] = shares._asdict()
    if speed:
        found = sampling_speed(
            model.model,
            model.params,
            first_tokens(info, split=split),
            mask=model.record.mask,
            ids=model.tokenizer,
            longest=model.record.sequence_length,
        )
        result["speed"] = {name: one._asdict() for name, one in found.items()}
    return result


@checked
def evaluate_tasks(
    checkpoint: str | os.PathLike[str],
    tasks: str | os.PathLike[str],
    *,
    ask: Sequence[str] | None = None,
    mc_samples: int = 128,
    gen_length: int | None = None,
    estimator: str = "exact_count",
    cfg_scale: float = 0.0,
    batch_size: int = 64,
    seed: int = 0,
    ema: bool | None = None,
    tokenizer: str | os.PathLike[str] = "",
    dtype: str = "auto",
    mesh: Mesh | None = None,
    keep_float32: bool = True,
) -> dict[str, Any]:
    """Returns how the questions of a file are answered, as `llada-jax evaluate --tasks FILE --json`
    prints it.

    Args:
        checkpoint: WORKDIR, WORKDIR@STEP, or a Hugging Face directory.
        tasks: a .jsonl file of questions, see docs/evaluation.md.
        ask: of "forwards", "backwards" and "infill"; None: all that fit.
        mc_samples: corruptions drawn for each answer.
        gen_length: the most tokens of a written answer, which ends at EOS or the end of a turn;
            None gives the model the length of each answer.
        estimator: of log-likelihoods, see llada_jax.evaluation.conditional.
        cfg_scale: strength of guidance towards the prompt; 0 switches it off.
        batch_size: rows at a time. seed: of the corruptions.
        ema, tokenizer, dtype, mesh, keep_float32: see llada_jax.load.

    Raises:
        UserError: the file, the checkpoint and the settings do not fit together.
    """
    check_sizes(mc_samples=mc_samples, batch_size=batch_size)
    if gen_length is not None:
        check_number("gen_length=", gen_length, SIZE)
    look_up(ESTIMATORS, estimator, "estimator")
    for direction in ask or ():
        look_up(dict.fromkeys(DIRECTIONS), direction, "direction of a question")
    file = user_path(tasks)
    rows = read_tasks(file)
    model = pretrained.load(
        checkpoint,
        ema=ema,
        tokenizer=tokenizer,
        dtype=dtype,
        mesh=mesh,
        keep_float32=keep_float32,
        needs_text=True,
    )
    if model.mesh.is_multi_process:
        check_same_everywhere({"the file of questions": rows})
    is_causal = model.record.mask.causal
    if is_causal and "infill" in (ask or ()):
        raise UserError(
            f"{checkpoint} is autoregressive and cannot read what comes after a blank; ask it "
            "forwards and backwards."
        )
    result = {
        "checkpoint": str(checkpoint),
        "step": model.step,
        "tasks": str(file),
        "mc_samples": mc_samples,
        "estimator": "exact" if is_causal else estimator,
        "cfg_scale": cfg_scale,
    }
    if gen_length is not None:
        result["gen_length"] = gen_length
    for direction in ask or DIRECTIONS:
        if direction == "infill" and is_causal:
            continue
        items = items_of(rows, direction, model.tokenizer)
        if not items:
            if ask:
                raise UserError(f'No line of {file} has a question "{direction}".')
            continue
        answered = answer(
            model.model,
            model.params,
            items,
            tokenizer=model.tokenizer,
            mask=model.record.mask,
            gen_length=gen_length,
            num_samples=mc_samples,
            estimator=estimator,
            cfg_scale=cfg_scale,
            seed=seed,
            batch_size=batch_size,
            mesh=model.mesh,
        )
        result[direction] = answered._asdict()
    return result


def evaluate_harness(args) -> dict:
    """Returns the metrics of tasks of lm-evaluation-harness, with the error of the Monte Carlo.

    The lines of a task go to stderr as soon as it is done, so that an evaluation of many hours that
    ends early has not been for nothing.
    """
    settings, sampling = read_settings(args.harness)
    source, published = preset(args.preset) if args.preset else ("", {})
    for task in args.tasks or ():
        if args.preset:
            look_up(published, task, f"task of the preset {args.preset}")
    names = list(dict.fromkeys(args.tasks or published))
    about_loading = ("include_path", "confirm_run_unsafe_code")
    loaded = load_tasks(names, **{key: settings[key] for key in about_loading if key in settings})
    for objects in loaded:
        check_estimator(objects, args.estimator)
    model = pretrained.load(
        args.checkpoint,
        ema=args.ema,
        tokenizer=args.tokenizer,
        needs_text=True,
        **placement(args),
    )
    result = {
        "checkpoint": str(args.checkpoint),
        "step": model.step,
        "preset": args.preset,
        "source": source,
        "tasks": {},
    }
    # The settings of every task are checked before the first is asked.
    plans = []
    for task in names:
        mine = {"mc_samples": args.mc_samples, "cfg_scale": args.cfg_scale}
        asked: dict = {}
        if args.preset:
            mine, asked = as_arguments(published[task])
        mine, asked = {**mine, **sampling}, {**asked, **settings}
        if args.estimator != "exact_count":
            mine["estimator"] = args.estimator
        try:
            subject = harness.HarnessModel(
                model, batch_size=args.batch_size, seed=args.seed, **mine
            )
        except UserError as error:
            if not args.preset:
                raise
            raise UserError(
                f"The task {task} of --preset {args.preset}: {error} A setting that is not of the "
                "command line is one of the preset; name the tasks without it with --tasks."
            ) from error
        plans.append((task, mine, asked, subject))
    while plans:
        # the requests of a task, and the errors of its scores, are gone with it
        task, mine, asked, subject = plans.pop(0)
        found = harness.run(subject, loaded.pop(0), **asked)
        answered = {**mine, **asked, "results": found["results"]}
        if args.preset:
            answered["published_percent"] = published[task].score
        result["tasks"][task] = answered
        if jax.process_index() == 0:
            write_line("\n".join(harness_lines(task, answered)))
    return result

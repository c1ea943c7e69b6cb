"""`llada-jax sample`: text from a trained model, with or without prompts, on the terminal or as
JSON.
"""

import argparse
import json
import sys
import time
from contextlib import nullcontext
from functools import partial

import jax

from llada_jax.checkpoints.orbax_patches import drop_echoes
from llada_jax.errors import UserError
from llada_jax.pretrained import load
from llada_jax.ranges import SIZE, check_number
from llada_jax.request_checks import check_can_infill
from llada_jax.samplers.commit import SCHEDULE
from llada_jax.samplers.revise import NONE, WINO, parse_revise
from llada_jax.samplers.settings import (
    check_options,
    check_request,
    check_schedule,
    check_strengths,
)
from llada_jax.samplers.show import make_show
from llada_jax.samplers.text import Completion, continue_text, generate_text, infill_text
from llada_jax.verbs.command_line import Parser, placement

# One line each would not fit a screen; docs/sampling.md explains them.
MORE_FLAGS = """more flags, explained in docs/sampling.md:
  --infill TEXT...  --append  --lookahead N  --num-samples N  --best-of N  --batch-size N  --top-k N
  --remasking NAME  --commit NAME[=X]  --revise NAME[=X]  --cache NAME  --refresh N  --cfg-scale X
  --top-p X  --eos NAME  --ignore-eos  --suppress ID...  --mesh AXES  --dtype NAME  --tokenizer PATH
"""


def make_parser() -> Parser:
    parser = Parser(
        "sample",
        "Generates text by denoising masks; without a prompt, from nothing.",
        'llada-jax sample --checkpoint runs/tiny/run --prompt "It is a truth" --show',
    )
    parser.usage = "llada-jax sample --checkpoint CKPT [flags]"
    parser.epilog = f"{MORE_FLAGS}\n{parser.epilog}"
    add = parser.add_argument
    add(
        "--checkpoint",
        required=True,
        metavar="CKPT",
        help="WORKDIR, WORKDIR@STEP or Hugging Face directory",
    )
    add("--prompt", nargs="+", metavar="P", help="one or more prompts")
    add(
        "--prompt-file",
        metavar="FILE",
        help="file with one prompt per line; - is stdin",
    )
    add(
        "--gen-length",
        type=int,
        default=64,
        metavar="N",
        help="tokens to generate after each prompt (default 64)",
    )
    add(
        "--block-length",
        type=int,
        metavar="N",
        help="tokens denoised together (default: all of them)",
    )
    add(
        "--steps",
        type=int,
        metavar="N",
        help="passes through the model (default: one per token)",
    )
    add(
        "--temperature",
        type=float,
        default=0.0,
        metavar="X",
        help="0 (default): most likely; 1: the model's odds",
    )
    add("--seed", type=int, default=0, metavar="N", help="same seed, same texts (default 0)")
    parser.add_ema_flag()
    add("--show", action="store_true", help="show the masks turning into text, on stderr")
    add("--json", action="store_true", help="one JSON object on stdout")

    # Listed in MORE_FLAGS.
    hidden = partial(add, help=argparse.SUPPRESS)
    hidden("--tokenizer", default="", metavar="PATH")
    hidden("--infill", nargs="+", metavar="TEXT")
    hidden("--append", action="store_true")
    hidden("--lookahead", type=int, metavar="N")
    hidden("--num-samples", type=int, default=1, metavar="N")
    hidden("--best-of", type=int, default=1, metavar="N")
    hidden("--batch-size", type=int, default=16, metavar="N")
    hidden("--remasking", default="low_confidence", metavar="NAME")
    hidden("--commit", default=SCHEDULE, metavar="NAME[=X]")
    hidden("--revise", default=NONE, metavar="NAME[=X]")
    hidden("--cfg-scale", type=float, default=0.0, metavar="X")
    hidden("--top-k", type=int, default=0, metavar="N")
    hidden("--top-p", type=float, default=1.0, metavar="X")
    hidden("--eos", default="free", metavar="NAME")
    hidden("--ignore-eos", action="store_true")
    hidden("--suppress", nargs="+", type=int, default=[], metavar="ID")
    hidden("--cache", default="none", metavar="NAME")
    hidden("--refresh", type=int, default=0, metavar="N")
    parser.add_placement_flags()
    return parser


def read_prompts(prompts: list[str] | None, path: str | None) -> list[str]:
    """Returns the prompts of the command line or the file; [""] when neither is given."""
    if prompts is not None and path is not None:
        raise UserError("--prompt and --prompt-file are both given; keep one.")
    if path is None:
        return _check_unicode(prompts or [""], "--prompt")
    try:
        if path == "-":
            data = sys.stdin.buffer.read()
        else:
            with open(path, "rb") as file:
                data = file.read()
    except OSError as error:
        raise UserError(
            f"--prompt-file {path!r} cannot be read: {error.strerror}; pass a text file, or - for "
            "stdin."
        ) from error
    try:
        # "utf-8-sig" drops a byte order mark, which would become part of the first prompt.
        lines = data.decode("utf-8-sig").replace("\r\n", "\n").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(
            f"--prompt-file {path!r} is not UTF-8 at byte {error.start}; convert it, for example "
            "with iconv -t utf-8."
        ) from error
    lines = [line for line in lines if line]
    if not lines:
        raise UserError(
            f"--prompt-file {path!r} holds no prompt; write one per line, or leave the flag out "
            "to generate from nothing."
        )
    return lines


def _check_unicode(prompts: list[str], flag: str) -> list[str]:
    for prompt in prompts:
        try:
            prompt.encode("utf-8")
        except UnicodeEncodeError as error:
            # Python puts lone surrogates in place of bytes that it cannot decode.
            raise UserError(
                f"{flag} {prompt!a} is not UTF-8; set the terminal to UTF-8 or use --prompt-file."
            ) from error
    return prompts


def warn(message: str) -> None:
    print(f"llada-jax: {message}", file=sys.stderr)


def warn_of_surprises(args, pretrained, prompts: list[str]) -> None:
    """Says on stderr what will work but may disappoint."""
    if args.num_samples > 1 and args.temperature == 0 and args.remasking == "low_confidence":
        warn(
            f"--num-samples {args.num_samples} at --temperature 0 repeats the same text; try "
            "--temperature 0.7."
        )
    longest = (
        max(len(pretrained.tokenizer.encode(prompt)) for prompt in set(prompts)) + args.gen_length
    )
    trained = pretrained.config["data"]["sequence_length"]
    # Not refused: rotary positions extend, and a little beyond the trained length usually still
    # reads well.
    if longest > trained:
        warn(
            f"prompt and --gen-length make {longest} tokens, the model was trained on {trained}; "
            "expect worse text."
        )


def print_texts(completions: list[Completion], *, is_infill: bool) -> None:
    """Prints prompt and continuation of each, or the filled texts, with --- between them; in colour
    on a terminal.
    """
    colour, plain = ("\033[1;36m", "\033[0m") if sys.stdout.isatty() else ("", "")
    for number, completion in enumerate(completions):
        if number:
            print("---")
        prompt = "" if is_infill else f"{colour}{completion.prompt}{plain}"
        print(f"{prompt}{completion.text}")


def print_json(args, step: int, settings: dict, completions: list[Completion]) -> None:
    samples = [
        {"prompt": c.prompt, "completion": c.text, "tokens": c.tokens, "num_steps": c.num_steps}
        for c in completions
    ]
    print(
        json.dumps(
            {"checkpoint": args.checkpoint, "step": step, "settings": settings, "samples": samples}
        )
    )


def read_settings(args) -> dict:
    """Returns the settings that were asked for; what is not about them keeps its default.

    Raises:
        UserError: one is out of range, or two exclude each other.
    """
    check_number("--num-samples ", args.num_samples, SIZE)
    check_number("--best-of ", args.best_of, SIZE)
    check_strengths(temperature=args.temperature, cfg_scale=args.cfg_scale)
    if args.best_of > 1 and args.temperature == 0 and args.remasking != "random":
        raise UserError(
            f"--best-of {args.best_of} at --temperature 0 chooses from {args.best_of} times the "
            "same text; set --temperature 0.7, or leave it out."
        )
    settings = {
        "temperature": args.temperature,
        "cfg_scale": args.cfg_scale,
        "remasking": args.remasking,
        "seed": args.seed,
        "batch_size": args.batch_size,
    }
    # In the record of the samples only where they were asked for.
    options = {
        "commit": args.commit,
        "revise": args.revise,
        "top_k": args.top_k,
        "top_p": args.top_p,
        "eos": args.eos,
        "suppress": args.suppress,
        "append": args.append,
        "lookahead": args.lookahead,
        "cache": args.cache,
        "refresh": args.refresh,
    }
    unset = vars(make_parser().parse_args(["--checkpoint", "-"]))
    check_options(
        remasking=args.remasking,
        temperature=args.temperature,
        **options,
    )
    return settings | {name: value for name, value in options.items() if value != unset[name]}


def read_schedule(args) -> dict:
    """Returns how many tokens are generated, in which blocks and steps, for denoising."""
    schedule = {
        "gen_length": args.gen_length,
        "block_length": args.gen_length if args.block_length is None else args.block_length,
        "steps": args.gen_length if args.steps is None else args.steps,
    }
    check_schedule(**schedule, temperature=args.temperature, cfg_scale=args.cfg_scale)
    return schedule


def check_infill(args) -> None:
    """Raises UserError for flags that mean nothing where gaps are filled."""
    for flag, value in (
        ("--prompt", args.prompt),
        ("--prompt-file", args.prompt_file),
        ("--block-length", args.block_length),
        ("--append", args.append),
        ("--lookahead", args.lookahead is not None),
        ("--cache", args.cache != "none"),
        ("--eos", args.eos != "free"),
        ("--ignore-eos", args.ignore_eos),
        ("--best-of", args.best_of > 1),
        ("--show", args.show),
    ):
        if value:
            raise UserError(f"{flag} is about texts that go on, and --infill fills gaps; keep one.")


def shadow_of(args, pretrained) -> dict:
    """Returns the argument that --revise wino needs."""
    is_needed = parse_revise(args.revise).name == WINO
    return {"shadow_fn": pretrained.model.shadow_fn} if is_needed else {}


def infill(args, pretrained, settings: dict, texts: list[str]) -> list[Completion]:
    return infill_text(
        pretrained.logits_fn,
        pretrained.params,
        pretrained.tokenizer,
        texts,
        **settings,
        **shadow_of(args, pretrained),
    )


def continue_or_denoise(
    args, pretrained, settings: dict, schedule: dict, prompts: list[str]
) -> list[Completion]:
    """Returns the texts; `settings` becomes what was used of them."""
    settings["stop_at_eos"] = not args.ignore_eos
    if pretrained.record.mask.causal:
        if args.show:
            raise UserError(
                f"{args.checkpoint} was trained with objective.name="
                f"{pretrained.record.objective!r} and denoises nothing that --show could show; "
                "leave it out."
            )
        asked = settings | {"block_length": args.block_length, "steps": args.steps}
        settings |= {"gen_length": args.gen_length}
        return continue_text(
            pretrained.model.cache_fns,
            pretrained.params,
            pretrained.tokenizer,
            prompts,
            **(settings | asked),
        )
    settings |= schedule
    listening: dict = {}
    show = nullcontext()
    if args.show:
        # Where stdout is the same terminal, the picture is removed at the end: the texts are
        # printed in its place, whole and selectable.
        show = make_show(
            pretrained.tokenizer,
            prompts,
            gen_length=args.gen_length,
            stream=sys.stderr,
            transient=sys.stdout.isatty(),
        )
        listening["on_step"] = show.on_step
    if args.cache != "none":
        listening["cache_fns"] = pretrained.model.cache_fns
    with show:
        return generate_text(
            pretrained.logits_fn,
            pretrained.params,
            pretrained.tokenizer,
            prompts,
            **settings,
            **listening,
            **shadow_of(args, pretrained),
        )


def main(argv: list[str]) -> None:
    drop_echoes()
    # 1. What is asked for. Every mistake in it is found before the model is loaded, which takes
    # minutes where it is large.
    args = make_parser().parse_args(argv)
    settings = read_settings(args)
    if args.infill:
        check_infill(args)
        prompts = _check_unicode(args.infill, "--infill")
    else:
        schedule = read_schedule(args)
        prompts = read_prompts(args.prompt, args.prompt_file)
    copies = args.num_samples * args.best_of
    num_prompts = len(prompts) * copies
    check_request(num_prompts=num_prompts, batch_size=args.batch_size, seed=args.seed)
    prompts = [prompt for prompt in prompts for _ in range(copies)]

    # 2. The model.
    pretrained = load(
        args.checkpoint,
        ema=args.ema,
        tokenizer=args.tokenizer,
        needs_text=True,
        **placement(args),
    )
    if args.infill:
        check_can_infill(pretrained.record)
        settings |= {"steps": args.steps}
    else:
        warn_of_surprises(args, pretrained, prompts)

    # 3. The texts.
    start = time.perf_counter()
    if args.infill:
        completions = infill(args, pretrained, settings, prompts)
    else:
        completions = continue_or_denoise(args, pretrained, settings, schedule, prompts)
    num_passes = sum(c.num_steps for c in completions)
    if args.best_of > 1:
        settings["best_of"] = args.best_of
        completions = pretrained.best_of(completions, args.best_of, seed=args.seed)
    seconds = time.perf_counter() - start

    # 4. The results, which all processes of a run have.
    if jax.process_index() > 0:
        return
    if args.json:
        print_json(args, pretrained.step, settings, completions)
    else:
        print_texts(completions, is_infill=bool(args.infill))
    num_tokens = sum(len(c.tokens) for c in completions)
    warn(
        f"{len(completions)} texts, {num_tokens} tokens in {num_passes} passes of a row, "
        f"{seconds:.1f} s, compilation included."
    )

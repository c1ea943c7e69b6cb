"""`llada-jax sample`: text from a trained model, with or without prompts, on the terminal or as
JSON.
"""

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import jax

from llada_jax import sampling_flags
from llada_jax.checkpoints.orbax_patches import drop_echoes
from llada_jax.cluster.agreement import check_same_everywhere
from llada_jax.errors import UserError
from llada_jax.pretrained import load
from llada_jax.ranges import SIZE, check_number
from llada_jax.request_checks import check_can_infill, length_hint, surprises
from llada_jax.samplers.batches import ignore_step
from llada_jax.samplers.replay import Recording
from llada_jax.samplers.settings import check_request, may_draw
from llada_jax.samplers.show import Shown, make_show, shown_gaps, shown_generations
from llada_jax.samplers.text import (
    Completion,
    continue_text,
    generate_text,
    infill_text,
    parse_gaps,
)
from llada_jax.sampling_flags import (
    add_checkpoint_flag,
    add_sampling_flags,
    check_unicode,
    functions_of,
    more_flags,
    read_schedule,
)
from llada_jax.storage import files, remote
from llada_jax.streams import warn
from llada_jax.verbs.command_line import Parser, json_text, placement

GEN_LENGTH = 64
UTF8_REMEDY = "set the terminal to UTF-8 or use --prompt-file"


def make_parser() -> Parser:
    parser = Parser(
        "sample",
        "Generates text by denoising masks; without a prompt, from nothing.",
        'llada-jax sample --checkpoint runs/tiny/run --prompt "It is a truth" --show',
    )
    parser.usage = "llada-jax sample --checkpoint CKPT [flags]"
    own = (
        "--infill TEXT...",
        "--html FILE",
        "--num-samples N",
        "--best-of N",
        "--batch-size N",
        "--ignore-eos",
    )
    parser.epilog = f"{more_flags(*own)}\n\n{parser.epilog}"
    add_checkpoint_flag(parser)
    add = parser.add_argument
    add("--prompt", nargs="+", metavar="P", help="one or more prompts")
    add(
        "--prompt-file",
        metavar="FILE",
        help="file with one prompt per line; - is stdin",
    )
    add_sampling_flags(
        parser,
        gen_length_help=f"tokens to generate after each prompt (default {GEN_LENGTH})",
        block_length_help="tokens denoised together (default: all of them)",
    )
    parser.add_ema_flag(is_listed=False)
    add("--show", action="store_true", help="show the masks turning into text, on stderr")
    add("--json", action="store_true", help="one JSON object on stdout")

    # Listed in the epilog.
    hidden = partial(add, help=argparse.SUPPRESS)
    hidden("--infill", nargs="+", metavar="TEXT")
    hidden("--html", metavar="FILE")
    hidden("--num-samples", type=int, default=1, metavar="N")
    hidden("--best-of", type=int, default=1, metavar="N")
    hidden("--batch-size", type=int, default=16, metavar="N")
    hidden("--ignore-eos", action="store_true")
    parser.add_placement_flags()
    return parser


def read_prompts(prompts: list[str] | None, path: str | None) -> list[str]:
    """Returns the prompts of the command line or the file; [""] when neither is given."""
    if prompts is not None and path is not None:
        raise UserError("--prompt and --prompt-file are both given; keep one.")
    if path is None:
        check_unicode(prompts or [], "--prompt", remedy=UTF8_REMEDY)
        return prompts or [""]
    with files.reading(f"--prompt-file {path!r}", remedy="pass a text file, or - for stdin"):
        if path == "-":
            data = sys.stdin.buffer.read()
        else:
            with open(path, "rb") as file:
                data = file.read()
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


def warn_of_surprises(args, pretrained, prompts: list[str]) -> None:
    """Says on stderr what will work but may disappoint."""
    if args.num_samples > 1 and not draws(args):
        warn(
            f"--num-samples {args.num_samples} at --temperature 0 repeats the same text; try "
            "--temperature 0.7."
        )
    lengths = [row_length(args, pretrained.tokenizer, text) for text in set(prompts)]
    found = surprises(
        [] if args.infill else prompts,
        length=max(lengths),
        trained=pretrained.record.sequence_length,
    )
    if not args.infill:
        found += length_hint(
            pretrained.record, gen_length=args.gen_length, shortest_row=min(lengths)
        )
    for sentence in found:
        warn(sentence)


def draws(args) -> bool:
    """Whether several texts of a prompt may differ."""
    return may_draw(temperature=args.temperature, remasking=args.remasking, revise=args.revise)


def row_length(args, tokenizer, text: str) -> int:
    """Returns the tokens of a text, with those that are to be generated."""
    if args.infill:
        return len(parse_gaps(tokenizer, text)[0])
    return len(tokenizer.encode(text)) + args.gen_length


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
        json_text(
            {"checkpoint": args.checkpoint, "step": step, "settings": settings, "samples": samples}
        )
    )


def read_settings(args) -> dict:
    """Returns the settings of the sampler, checked together with the numbers of texts.

    Raises:
        UserError: one is out of range, or two exclude each other.
    """
    check_number("--num-samples ", args.num_samples, SIZE)
    check_number("--best-of ", args.best_of, SIZE)
    settings = sampling_flags.read_settings(args)
    if args.best_of > 1 and not draws(args):
        raise UserError(
            f"--best-of {args.best_of} at --temperature 0 chooses from {args.best_of} times the "
            "same text; set --temperature 0.7, or leave it out."
        )
    return {**settings, "batch_size": args.batch_size}


def check_infill(args) -> None:
    """Raises UserError for flags that mean nothing where gaps are filled."""
    for flag, value in (
        ("--prompt", args.prompt),
        ("--prompt-file", args.prompt_file),
        ("--gen-length", args.gen_length is not None),
        ("--block-length", args.block_length),
        ("--append", args.append),
        ("--lookahead", args.lookahead is not None),
        ("--cache", args.cache != "none"),
        ("--eos", args.eos != "free"),
        ("--ignore-eos", args.ignore_eos),
        ("--best-of", args.best_of > 1),
    ):
        if value:
            raise UserError(f"{flag} is about texts that go on, and --infill fills gaps; keep one.")


@contextmanager
def pictures(args, tokenizer, shown: Sequence[Shown]) -> Iterator[dict[str, Any]]:
    """Shows and records what is denoised inside of the context, as --show and --html ask; yields
    the settings with which the sampler is listened to.
    """
    listeners: list = []
    settings: dict[str, Any] = {}
    # The steps are the same in all processes, and only the first shows them.
    is_first = jax.process_index() == 0
    show = nullcontext()
    if args.show:
        # Where stdout is the same terminal, the picture is removed at the end: the texts are
        # printed in its place, whole and selectable.
        show = make_show(tokenizer, shown, stream=sys.stderr, transient=sys.stdout.isatty())
        listeners.append(show.on_step if is_first else ignore_step)
    if args.html:
        recording = Recording(tokenizer, shown)
        listeners.append(recording.on_step)
        settings["with_confidence"] = True
    if listeners:
        settings["on_step"] = lambda rows, state: [hear(rows, state) for hear in listeners]
    with show if is_first else nullcontext():
        yield settings
    if args.html and is_first:
        with files.writing(f"--html {args.html}", remedy="name another file"):
            files.write_whole(args.html, recording.page(args.checkpoint), concurrent=True)


def infill(args, pretrained, settings: dict, texts: list[str]) -> list[Completion]:
    tokenizer = pretrained.tokenizer
    with pictures(args, tokenizer, shown_gaps(tokenizer, texts)) as listening:
        return infill_text(
            pretrained.model.logits_fn,
            pretrained.params,
            tokenizer,
            texts,
            **settings,
            **listening,
            **functions_of(pretrained, **settings),
        )


def continue_or_denoise(
    args, pretrained, settings: dict, schedule: dict, prompts: list[str]
) -> list[Completion]:
    """Returns the texts; `settings` becomes what was used of them."""
    settings["stop_at_eos"] = not args.ignore_eos
    if pretrained.record.mask.causal:
        if args.show or args.html:
            flag = "--show" if args.show else "--html"
            raise UserError(
                f"{args.checkpoint} was trained with objective.name="
                f"{pretrained.record.objective!r} and denoises nothing that {flag} could show; "
                "leave it out."
            )
        asked = settings | {"block_length": args.block_length, "steps": args.steps}
        settings |= {"gen_length": args.gen_length}
        return continue_text(
            pretrained.model.cached_fn,
            pretrained.params,
            pretrained.tokenizer,
            prompts,
            **(settings | asked),
        )
    settings |= schedule
    tokenizer = pretrained.tokenizer
    shown = shown_generations(prompts, gen_length=args.gen_length, mask_id=tokenizer.mask_id)
    with pictures(args, tokenizer, shown) as listening:
        return generate_text(
            pretrained.model.logits_fn,
            pretrained.params,
            tokenizer,
            prompts,
            **settings,
            **listening,
            **functions_of(pretrained, **settings),
        )


def check_html(path: str) -> None:
    """Raises UserError for a page that could not be written, before minutes are spent on it."""
    file = remote.path_of(path)
    if file.is_dir() or not file.parent.is_dir() and not remote.is_remote(path):
        reason = "is a folder" if file.is_dir() else "is in a folder that does not exist"
        raise UserError(f"--html {path} {reason}; name a file, such as sample.html.")


def main(argv: list[str]) -> None:
    drop_echoes()
    # 1. What is asked for. Every mistake in it is found before the model is loaded, which takes
    # minutes where it is large.
    args = make_parser().parse_args(argv)
    settings = read_settings(args)
    if args.html:
        check_html(args.html)
    if args.infill:
        check_infill(args)
        check_unicode(args.infill, "--infill", remedy=UTF8_REMEDY)
        prompts = args.infill
    else:
        if args.gen_length is None:
            args.gen_length = GEN_LENGTH
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
    check_same_everywhere({"the list of prompts": prompts})
    if args.infill:
        check_can_infill(pretrained.record)
        settings |= {"steps": args.steps}
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
        completions = pretrained.best_of(
            completions, args.best_of, seed=args.seed, batch_size=args.batch_size
        )
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

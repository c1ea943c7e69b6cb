"""`llada-jax sample`: text from a trained model, with or without prompts, on the terminal or as
JSON.
"""

import json
import sys
import time
from contextlib import nullcontext

from llada_jax.checkpoints.orbax_patches import drop_echoes
from llada_jax.checkpoints.record import RunRecord
from llada_jax.errors import UserError
from llada_jax.pretrained import load
from llada_jax.samplers.denoise import check_schedule
from llada_jax.samplers.remasking import commit_rule
from llada_jax.samplers.show import make_show
from llada_jax.samplers.text import Completion, check_request, generate_text
from llada_jax.verbs.command_line import Parser


def make_parser() -> Parser:
    parser = Parser(
        "sample",
        "Generates text by denoising masks; without a prompt, from nothing.",
        'llada-jax sample --checkpoint runs/tiny/run --prompt "It is a truth" --show',
    )
    parser.usage = "llada-jax sample --checkpoint CKPT [flags]"
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
        help="file with one prompt per line, empty lines skipped; - is stdin",
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
    add(
        "--remasking",
        default="low_confidence",
        metavar="NAME",
        help="low_confidence (default), random or module:function",
    )
    add(
        "--cfg-scale",
        type=float,
        default=0.0,
        metavar="X",
        help="guidance towards the prompt; 0 (default): none",
    )
    add("--num-samples", type=int, default=1, metavar="N", help="texts for each prompt")
    add(
        "--batch-size",
        type=int,
        default=16,
        metavar="N",
        help="texts generated at a time (default 16)",
    )
    add("--seed", type=int, default=0, metavar="N", help="same seed, same texts (default 0)")
    add(
        "--ignore-eos",
        action="store_true",
        help="go on after the end-of-text token, as the published sampler does",
    )
    parser.add_ema_flag()
    add("--show", action="store_true", help="show the masks turning into text, on stderr")
    add("--json", action="store_true", help="one JSON object on stdout")
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


def check_objective(checkpoint: str, record: RunRecord) -> None:
    if record.mask.causal:
        raise UserError(
            f"{checkpoint} was trained with objective.name={record.objective!r} and has never seen "
            "a mask, so it cannot denoise; sample a checkpoint of masked_diffusion."
        )


def print_texts(completions: list[Completion]) -> None:
    """Prints prompt and continuation of each, with --- between them; in colour on a terminal."""
    colour, plain = ("\033[1;36m", "\033[0m") if sys.stdout.isatty() else ("", "")
    for number, completion in enumerate(completions):
        if number:
            print("---")
        print(f"{colour}{completion.prompt}{plain}{completion.text}")


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


def main(argv: list[str]) -> None:
    drop_echoes()
    # 1. What is asked for. Every mistake in it is found before the model is loaded, which takes
    # minutes where it is large.
    args = make_parser().parse_args(argv)
    settings = {
        "gen_length": args.gen_length,
        "block_length": args.gen_length if args.block_length is None else args.block_length,
        "steps": args.gen_length if args.steps is None else args.steps,
        "temperature": args.temperature,
        "cfg_scale": args.cfg_scale,
    }
    check_schedule(**settings)
    commit_rule(args.remasking)
    if args.num_samples < 1:
        raise UserError(f"--num-samples {args.num_samples} must be at least 1.")
    settings |= {"remasking": args.remasking, "seed": args.seed, "batch_size": args.batch_size}
    settings["stop_at_eos"] = not args.ignore_eos
    prompts = [
        p for p in read_prompts(args.prompt, args.prompt_file) for _ in range(args.num_samples)
    ]
    check_request(num_prompts=len(prompts), batch_size=args.batch_size, seed=args.seed)

    # 2. The model.
    pretrained = load(args.checkpoint, ema=args.ema)
    check_objective(args.checkpoint, pretrained.record)
    warn_of_surprises(args, pretrained, prompts)

    # 3. The texts.
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
        settings["on_step"] = show.on_step
    start = time.perf_counter()
    with show:
        completions = generate_text(
            pretrained.logits_fn, pretrained.params, pretrained.tokenizer, prompts, **settings
        )
    seconds = time.perf_counter() - start

    # 4. The results.
    settings.pop("on_step", None)
    if args.json:
        print_json(args, pretrained.step, settings, completions)
    else:
        print_texts(completions)
    num_tokens = sum(len(c.tokens) for c in completions)
    warn(f"{len(completions)} texts, {num_tokens} tokens in {seconds:.1f} s, compilation included.")

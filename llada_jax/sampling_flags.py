"""The flags of sampling that several commands share: the settings of the sampler, and their checks
before a model is loaded.
"""

import argparse
import textwrap
from collections.abc import Sequence
from functools import partial
from typing import Any

from llada_jax.errors import UserError
from llada_jax.samplers.commit import SCHEDULE
from llada_jax.samplers.revise import NONE, WINO, parse_revise
from llada_jax.samplers.settings import check_options, check_schedule, check_strengths

# One line each would not fit a screen, so that help names these below its list of flags.
MORE_FLAGS = (
    *("--append", "--lookahead N", "--top-k N", "--top-p X", "--suppress ID...", "--eos NAME"),
    *("--cfg-scale X", "--remasking NAME", "--commit NAME[=X]", "--revise NAME[=X]"),
    *("--cache NAME", "--refresh N", "--mesh AXES", "--dtype NAME", "--tokenizer PATH", "--ema"),
)

# In the record of the samples only where they were asked for.
OPTIONS = (
    "commit",
    "revise",
    "top_k",
    "top_p",
    "eos",
    "suppress",
    "append",
    "lookahead",
    "cache",
    "refresh",
)


def add_checkpoint_flag(parser: argparse.ArgumentParser) -> None:
    """Adds --checkpoint."""
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="CKPT",
        help="WORKDIR, WORKDIR@STEP or Hugging Face directory",
    )


def add_sampling_flags(
    parser: argparse.ArgumentParser,
    *,
    gen_length_help: str,
    block_length_help: str,
    append: bool | None = False,
) -> None:
    """Adds the flags of one text.

    Args:
        append: its default; None where it depends on other flags. That of --gen-length always does,
            or on the model.
    """
    add = parser.add_argument
    add("--gen-length", type=int, metavar="N", help=gen_length_help)
    add("--block-length", type=int, metavar="N", help=block_length_help)
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

    # Listed in MORE_FLAGS.
    hidden = partial(add, help=argparse.SUPPRESS)
    hidden("--tokenizer", default="", metavar="PATH")
    hidden("--append", action=argparse.BooleanOptionalAction, default=append)
    hidden("--lookahead", type=int, metavar="N")
    hidden("--remasking", default="low_confidence", metavar="NAME")
    hidden("--commit", default=SCHEDULE, metavar="NAME[=X]")
    hidden("--revise", default=NONE, metavar="NAME[=X]")
    hidden("--cfg-scale", type=float, default=0.0, metavar="X")
    hidden("--top-k", type=int, default=0, metavar="N")
    hidden("--top-p", type=float, default=1.0, metavar="X")
    hidden("--eos", default="free", metavar="NAME")
    hidden("--suppress", nargs="+", type=int, default=[], metavar="ID")
    hidden("--cache", default="none", metavar="NAME")
    hidden("--refresh", type=int, default=0, metavar="N")


def more_flags(*own: str) -> str:
    """Returns the part of a help that names the flags without a line of their own."""
    text = "  ".join(flag.replace(" ", "\0") for flag in (*own, *MORE_FLAGS))
    lines = textwrap.wrap(text, 98, break_on_hyphens=False)
    return "\n".join(
        ["more flags, explained in docs/sampling.md:", *(f"  {line}" for line in lines)]
    ).replace("\0", " ")


def _defaults() -> dict[str, Any]:
    parser = argparse.ArgumentParser()
    add_sampling_flags(parser, gen_length_help="", block_length_help="")
    return vars(parser.parse_args([]))


def read_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the settings that were asked for; what is not about them keeps its default.

    Raises:
        UserError: one is out of range, or two exclude each other.
    """
    check_strengths(temperature=args.temperature, cfg_scale=args.cfg_scale)
    options = {name: getattr(args, name) for name in OPTIONS}
    check_options(remasking=args.remasking, temperature=args.temperature, **options)
    unset = _defaults()
    return {
        "temperature": args.temperature,
        "cfg_scale": args.cfg_scale,
        "remasking": args.remasking,
        "seed": args.seed,
    } | {name: value for name, value in options.items() if value != unset[name]}


def read_schedule(args: argparse.Namespace) -> dict[str, int]:
    """Returns how many tokens are generated, in which blocks and steps, for denoising.

    Raises:
        UserError: they do not divide.
    """
    schedule = {
        "gen_length": args.gen_length,
        "block_length": args.gen_length if args.block_length is None else args.block_length,
        "steps": args.gen_length if args.steps is None else args.steps,
    }
    check_schedule(**schedule, temperature=args.temperature, cfg_scale=args.cfg_scale)
    return schedule


def functions_of(pretrained: Any, *, revise: str = NONE, cache: str = "none", **_: Any) -> dict:
    """Returns the functions of the network that some settings need."""
    functions = {}
    if parse_revise(revise).name == WINO:
        functions["shadow_fn"] = pretrained.model.shadow_fn
    if cache != "none":
        functions["cached_fn"] = pretrained.model.cached_fn
    return functions


def check_unicode(texts: Sequence[str], flag: str, *, remedy: str) -> None:
    """Raises UserError for a text of the command line that is not UTF-8."""
    for text in texts:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            # Python puts lone surrogates in place of bytes that it cannot decode.
            raise UserError(f"{flag} {text!a} is not UTF-8; {remedy}.") from error

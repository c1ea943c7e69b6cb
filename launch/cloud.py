"""What the launchers for Google Cloud share: common flags, kinds of capacity, and which exit
statuses mean "start again".

Not a launcher: launch/gke.py and launch/tpu_vm.py import it.
"""

import argparse
import re
from dataclasses import dataclass

from llada_jax.cluster.compiler_flags import flags_named
from llada_jax.errors import UserError

# Google's automatic firewall rule for TPUs opens 8476; JAX's own choice since 0.8, 8482, is closed
# on many networks and the processes then wait for each other in vain (jax issue 35905).
COORDINATOR_PORT = 8476

# llada_jax.errors: 42 = saved, start me again. From 127 on a process did not end by itself: 128 + a
# signal (a node that died, out of memory, an abort of the distributed runtime), 255 = ssh lost the
# host. The rest (1 a bug, 2 a mistake, 3 NaN) would only fail again.
RESTART_STATUSES = (42, *range(127, 256))

CAPACITY = {  # kind -> what may follow after a colon
    "on-demand": "",
    "spot": "",
    "reservation": "its name",
    "flex": "how long it may run, as in flex:8h",
}


@dataclass(frozen=True)
class Capacity:
    """How the machines are paid for: a key of CAPACITY, and what was written after the colon."""

    kind: str
    detail: str = ""


def parse_capacity(text: str) -> Capacity:
    """Reads "spot", "reservation:NAME" or "flex:8h"."""
    kind, _, detail = text.partition(":")
    if kind not in CAPACITY or (detail and not CAPACITY[kind]):
        raise argparse.ArgumentTypeError(
            f"{text!r} must be one of "
            f"{', '.join(f'{k}[:...]' if more else k for k, more in CAPACITY.items())}"
        )
    return Capacity(kind, detail)


def parse_pair(text: str) -> tuple[str, str]:
    """Reads "KEY=VALUE"."""
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} must be KEY=VALUE")
    return key, value


def parse_env(text: str) -> tuple[str, str]:
    """Reads "NAME=VALUE", where NAME can be the name of an environment variable."""
    name, value = parse_pair(text)
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise argparse.ArgumentTypeError(f"{name!r} cannot be the name of an environment variable")
    return name, value


def parse_flags(names: str) -> dict[str, str]:
    """Reads "v6e" or "v6e+multislice", names of llada_jax.cluster.compiler_flags.FLAGS."""
    try:
        return flags_named(names)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def make_parser(description: str) -> argparse.ArgumentParser:
    """Returns a parser with the flags of both launchers; the command is what stands after `--`."""
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--name", required=True, metavar="NAME", help="of the run, and of everything made for it"
    )
    parser.add_argument(
        "--topology", metavar="SLICE", help="one slice, as in v5p-128 (see llada-jax plan)"
    )
    parser.add_argument("--slices", type=int, default=1, metavar="N", help="how many of them (1)")
    parser.add_argument(
        "--capacity",
        type=parse_capacity,
        default=Capacity("on-demand"),
        metavar="KIND",
        help="on-demand (the default), spot, reservation[:NAME] or flex[:DURATION]",
    )
    parser.add_argument(
        "--env",
        type=parse_env,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="repeatable",
    )
    parser.add_argument(
        "--flags",
        type=parse_flags,
        default={},
        metavar="PRESET",
        help="compiler flags of llada_jax.cluster.hardware, e.g. v6e",
    )
    parser.add_argument(
        "--max-restarts", type=int, default=10, metavar="N", help="give up after so many (10)"
    )
    parser.add_argument(
        "--grace",
        type=int,
        default=300,
        metavar="S",
        help="seconds to save in when asked to stop (300)",
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would be done")
    parser.add_argument(
        "command", nargs=argparse.REMAINDER, metavar="-- COMMAND", help="what every host runs"
    )
    return parser


def command_of(args: argparse.Namespace) -> list[str]:
    """Returns the words after `--`; raises UserError when there are none, or when a number of the
    request is impossible.
    """
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not command:
        raise UserError(
            "There is no command; write it after --, as in: -- llada-jax train --config FILE "
            "--workdir gs://BUCKET/RUN."
        )
    for flag, least in (("slices", 1), ("max_restarts", 0), ("grace", 0)):
        if getattr(args, flag) < least:
            raise UserError(
                f"--{flag.replace('_', '-')} {getattr(args, flag)} must be at least {least}."
            )
    if not args.topology:
        raise UserError("--topology is missing; give the name of a slice, such as v5p-128.")
    return command


def check_name(name: str, *, longest: str) -> None:
    """Raises UserError unless `name` is a DNS label, as Kubernetes and Compute Engine require.

    Args:
        longest: the longest name that will be derived from it; a label has at most 63 characters.
    """
    if not re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", name):
        raise UserError(
            f"--name {name!r} must consist of lower-case letters, digits and hyphens, begin with a "
            "letter and not end with a "
            "hyphen."
        )
    if len(longest) > 63:
        raise UserError(
            f"--name {name!r} is too long: {longest!r} would have {len(longest)} characters and "
            "may have 63; shorten it by "
            f"{len(longest) - 63}."
        )

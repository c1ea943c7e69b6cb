"""What the launchers for Google Cloud share: flags, capacity, and the statuses worth a restart.

This is not a launcher; launch/gke.py and launch/tpu_vm.py import it.
"""

import argparse
import os
import re
import sys
from dataclasses import dataclass

import preflight

from llada_jax.cluster.compiler_flags import flags_named
from llada_jax.errors import UserError

# Google's automatic firewall rule for TPUs opens 8476. JAX's own choice since 0.8, 8482, is closed
# on many networks, and the processes then wait for each other in vain (jax issue 35905).
COORDINATOR_PORT = 8476

# llada_jax.errors: 42 means "saved, start me again". A status of 127 or more means that the process
# did not end by itself: 128 + a signal (the node died, memory ran out, the distributed runtime
# aborted), or 255 when ssh lost the host. The others (1 a bug, 2 a mistake, 3 NaN) would only
# recur.
RESTART_STATUSES = (42, *range(127, 256))

# Extras of setup.py that every host has, in addition to that of its chips: the image has them
# (launch/Dockerfile), and TPU VMs install them.
HOST_EXTRAS = ("data", "gs", "s3", "hf")

# kind -> what may follow after a colon
CAPACITY = {
    "on-demand": "",
    "spot": "",
    "reservation": "its name",
    "flex": "how long it may run, as in flex:8h",
}


@dataclass(frozen=True)
class Capacity:
    """How the machines are paid for: a key of CAPACITY, and what the user wrote after the colon."""

    kind: str
    detail: str = ""


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """A bucket that every host sees as a directory, through Cloud Storage FUSE."""

    name: str
    path: str
    is_read_only: bool


def parse_buckets(texts: list[str]) -> list[Bucket]:
    """Reads "BUCKET:/path" and "BUCKET:/path:ro"; raises UserError for anything else."""
    buckets = []
    for text in texts:
        match = re.fullmatch(r"([a-z0-9][a-z0-9._-]+[a-z0-9]):(/[^:]+)(:ro)?", text)
        if not match:
            raise UserError(f"--gcs-fuse {text!r} must be BUCKET:/path or BUCKET:/path:ro.")
        name, path, is_read_only = match.groups()
        place = mount_point(f"--gcs-fuse {name}:", path)
        buckets.append(Bucket(name=name, path=place, is_read_only=bool(is_read_only)))
    return buckets


def mount_point(what: str, path: str) -> str:
    """Returns an absolute path without the parts that change nothing, such as a / at its end, so
    that equal places are equal texts.

    Args:
        what: the flag, as the user writes it in front of the path.

    Raises:
        UserError: nothing can be mounted there.
    """
    place = f"/{os.path.normpath(path).lstrip('/')}"
    if not path.startswith("/") or place == "/" or ":" in path:
        raise UserError(
            f"{what}{path} must be an absolute path below / and without a colon, such as "
            f"{what}/local."
        )
    return place


def check_mount_points(paths: list[str]) -> None:
    """Raises UserError when two of the paths at which something is mounted are the same."""
    if len(set(paths)) < len(paths):
        raise UserError(
            f"Two volumes are mounted at the same place ({', '.join(paths)}); give each one its "
            "own path."
        )


def check_command(
    args: argparse.Namespace, command: list[str], place: preflight.Place, *, launcher: str
) -> None:
    """Checks what the hosts are to run, and says on stderr what was found.

    Raises:
        UserError: the command cannot run there.
    """
    found = "not checked, as asked" if args.unchecked else preflight.check(command, place)
    print(f"{launcher}: {found}", file=sys.stderr, flush=True)


def parse_capacity(text: str) -> Capacity:
    """Reads "spot", "reservation:NAME" or "flex:8h"."""
    kind, _, detail = text.partition(":")
    if kind not in CAPACITY or (detail and not CAPACITY[kind]):
        forms = ", ".join(f"{kind}[:...]" if more else kind for kind, more in CAPACITY.items())
        raise argparse.ArgumentTypeError(f"{text!r} must be one of {forms}")
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
    """Reads "v6e" or "v6e+sdc-check", names of llada_jax.cluster.compiler_flags.FLAGS."""
    try:
        return flags_named(names)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def make_parser(description: str) -> argparse.ArgumentParser:
    """Returns a parser with the flags that both launchers have; the command follows after `--`."""
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--name",
        required=True,
        metavar="NAME",
        help="name of the run, and of everything created for it",
    )
    parser.add_argument(
        "--topology", metavar="SLICE", help="one slice, e.g. v5p-128 (see llada-jax plan)"
    )
    parser.add_argument(
        "--slices", type=int, default=1, metavar="N", help="number of slices (default 1)"
    )
    parser.add_argument(
        "--capacity",
        type=parse_capacity,
        default=Capacity("on-demand"),
        metavar="KIND",
        help="on-demand (default), spot, reservation[:NAME] or flex[:DURATION]",
    )
    parser.add_argument(
        "--env",
        type=parse_env,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="environment variable; may be repeated",
    )
    parser.add_argument(
        "--flags",
        type=parse_flags,
        default={},
        metavar="PRESET",
        help="compiler flags for one kind of hardware, e.g. v6e",
    )
    parser.add_argument(
        "--gcs-fuse",
        action="append",
        default=[],
        metavar="BUCKET:/PATH[:ro]",
        help="bucket to mount on every host; may be repeated",
    )
    parser.add_argument(
        "--max-restarts",
        type=int,
        default=10,
        metavar="N",
        help="restarts before giving up (default 10)",
    )
    parser.add_argument(
        "--grace",
        type=int,
        default=300,
        metavar="S",
        help="seconds that a run may take to save when asked to stop (default 300)",
    )
    parser.add_argument(
        "--unchecked",
        action="store_true",
        help="start a command that the check before it would refuse",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print what would be done, and do nothing"
    )
    parser.add_argument(
        "command", nargs=argparse.REMAINDER, metavar="-- COMMAND", help="what every host runs"
    )
    return parser


def command_of(args: argparse.Namespace) -> list[str]:
    """Returns the words after `--`.

    Raises:
        UserError: there are none, a number of the request is too small, or the topology is missing.
    """
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not command:
        raise UserError(
            "There is no command; write it after --, for example: -- llada-jax train --config "
            "FILE --workdir gs://BUCKET/RUN."
        )
    for flag, least in (("slices", 1), ("max_restarts", 0), ("grace", 0)):
        if getattr(args, flag) < least:
            raise UserError(
                f"--{flag.replace('_', '-')} {getattr(args, flag)} must be at least {least}."
            )
    if not args.topology:
        raise UserError("--topology is missing; pass the name of a slice, such as v5p-128.")
    return command


def check_label(name: str, flag: str) -> None:
    """Raises UserError unless the value of a flag is a DNS label; see check_name."""
    if not re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", name):
        raise UserError(
            f"{flag} {name!r} must consist of lower-case letters, digits and hyphens, begin with a "
            "letter and not end with a hyphen."
        )


def check_name(name: str, *, longest: str) -> None:
    """Raises UserError unless `name` is a DNS label, as Kubernetes and Compute Engine require.

    Args:
        longest: the longest name that is derived from `name`; a label has at most 63 characters.
    """
    check_label(name, "--name")
    if len(longest) > 63:
        raise UserError(
            f"--name {name!r} is too long: {longest!r}, which is derived from it, would have "
            f"{len(longest)} characters, and at most 63 are allowed; shorten it by "
            f"{len(longest) - 63}."
        )

"""The argument parser that all verbs share: help that ends with an example, and mistakes that end
the command with one sentence and exit status 2.
"""

import argparse
import json
import math
import re

from llada_jax.errors import UserError, did_you_mean, without_value
from llada_jax.paths import user_path

KNOB = "--config."

# Flags whose help shows one of these as their value take a path (SPEC: the tokenizer of prepare).
PATHS = ("CKPT", "DIR", "FILE", "HF", "PATH", "SPEC", "WORKDIR")


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are UserErrors and whose help closes with an example.

    Args:
        verb: the word after `llada-jax`.
        summary: one sentence above the flags.
        example: one complete command, shown last.
    """

    def __init__(self, verb: str, summary: str, example: str):
        # no abbreviations: a flag added later could make a script's short form ambiguous
        super().__init__(
            prog=f"llada-jax {verb}",
            description=summary,
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            add_help=False,
        )
        # not in its own list: whoever reads it knows the flag, and the help must fit a screen
        super().add_argument("-h", "--help", action="help", help=argparse.SUPPRESS)
        self.known_flags = set()

    def add_argument(self, *names, **kwargs):
        action = super().add_argument(*names, **kwargs)
        self.known_flags.update(n for n in action.option_strings if n.startswith("--"))
        return action

    def add_config_flags(self, *, file: str, knob: str) -> None:
        """Adds --config FILE and --config.KEY VALUE; parse the line with `parse_with_overrides`.

        Args:
            file: the help of --config. knob: the help of --config.KEY.
        """
        self.add_argument("--config", required=True, metavar="FILE", help=file)
        # Stands for all knobs, in the help alone: parse_with_overrides takes them off the line.
        # One argparse flag per knob would fill screens, and would need the config to be loaded.
        self.add_argument(f"{KNOB}KEY", metavar="VALUE", dest="_", help=knob)

    def add_ema_flag(self, *, is_listed: bool = True) -> None:
        """Adds --ema and --no-ema; args.ema is None where neither is given."""
        text = "the moving average of the weights, if kept"
        self.add_argument(
            "--ema",
            action=argparse.BooleanOptionalAction,
            help=text if is_listed else argparse.SUPPRESS,
        )

    def add_placement_flags(self) -> None:
        """Adds --mesh and --dtype, which `placement` reads. They are not in the list of flags: the
        verbs that have them name them below it.
        """
        self.add_argument("--mesh", metavar="AXES", help=argparse.SUPPRESS)
        self.add_argument(
            "--dtype",
            choices=("auto", "float32", "bfloat16"),
            default="auto",
            metavar="NAME",
            help=argparse.SUPPRESS,
        )

    def parse_with_overrides(self, argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
        """Returns the parsed flags, and the knobs as words such as "optimizer.b2=0.98".

        A knob is written --config.KEY=VALUE or --config.KEY VALUE.

        Raises:
            UserError: a knob has no value, or a flag is wrong.
        """
        others, overrides = take_overrides(argv)
        return self.parse_args(others), overrides

    def parse_args(self, args=None, namespace=None):
        parsed = super().parse_args(args, namespace)
        for action in self._actions:
            value = getattr(parsed, action.dest, None)
            if action.metavar not in PATHS:
                continue
            if isinstance(value, str):
                setattr(parsed, action.dest, user_path(value))
            elif isinstance(value, list):
                setattr(parsed, action.dest, [user_path(entry) for entry in value])
        return parsed

    def error(self, message):
        unknown = re.match(r"unrecognized arguments: (\S+)", message)
        if unknown:
            flag = unknown.group(1).split("=")[0]
            raise UserError(
                f"{self.prog}: there is no {flag!r}.{did_you_mean(flag, self.known_flags)}"
            )
        raise UserError(f"{self.prog}: {message}; see {self.prog} --help.")


def json_text(value, **layout) -> str:
    """Returns what --json prints; nan and inf, for which JSON has no numbers, become null.

    layout: how, as for json.dumps.
    """

    def plain(value):
        if isinstance(value, dict):
            return {name: plain(entry) for name, entry in value.items()}
        if isinstance(value, list | tuple):
            return [plain(entry) for entry in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(plain(value), allow_nan=False, **layout)


def take_overrides(argv: list[str]) -> tuple[list[str], list[str]]:
    """Returns the words that are not about knobs, and the knobs as KEY=VALUE."""
    others, overrides = [], []
    words = iter(argv)
    for word in words:
        if not word.startswith(KNOB):
            others.append(word)
            continue
        key, equals, value = word.removeprefix(KNOB).partition("=")
        if not equals:
            # "-1" is a value; "--workdir" is the next flag, and so the value was forgotten
            value = next(words, "--")
            if value.startswith("--"):
                raise without_value(f"{KNOB}{key}")
        overrides.append(f"{key}={value}")
    return others, overrides


def join(args: argparse.Namespace) -> None:
    """Joins the other processes of a verb that saves nothing on the way, so that SIGTERM ends it.

    Args:
        args: all flags of the verb, which must be the same in every process.

    Raises:
        UserError: the processes were started with other flags, code or versions.
        LostPeer: the other processes did not join in time.
    """
    # Imported here, because most verbs parse their flags without jax.
    from llada_jax.cluster import distributed
    from llada_jax.cluster.agreement import check_same_everywhere, program_facts

    distributed.initialize(saves_at_sigterm=False)
    flags = {f"--{name.replace('_', '-')}": value for name, value in vars(args).items()}
    check_same_everywhere({**program_facts(), **flags})


def placement(args: argparse.Namespace) -> dict:
    """Returns the arguments of llada_jax.pretrained.load that say where the model is and in which
    dtype, from the flags of `add_placement_flags`.

    With --mesh, all processes of the run join, each on the devices of its own host.
    """
    from llada_jax.cluster import sharding

    mesh = None
    if args.mesh:
        sizes = sharding.parse_mesh(args.mesh)
        join(args)
        mesh = sharding.make_mesh(sizes)
    return {"mesh": mesh, "dtype": args.dtype, "keep_float32": False}

"""The one argument parser of all verbs: help that ends with an example, mistakes that exit 2 with
one sentence.
"""

import argparse
import re

from llada_jax.errors import UserError, did_you_mean


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are UserErrors and whose help closes with an example.

    Args:
        verb: the word after `llada-jax`.
        summary: one sentence above the flags.
        example: one complete command, shown last.
    """

    def __init__(self, verb: str, summary: str, example: str):
        super().__init__(
            prog=f"llada-jax {verb}",
            description=summary,
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.known_flags = set()

    def add_argument(self, *names, **kwargs):
        action = super().add_argument(*names, **kwargs)
        getattr(self, "known_flags", set()).update(
            n for n in action.option_strings if n.startswith("--")
        )
        return action

    def error(self, message):
        unknown = re.match(r"unrecognized arguments: (\S+)", message)
        if unknown:
            flag = unknown.group(1).split("=")[0]
            raise UserError(
                f"{self.prog}: there is no {flag!r}.{did_you_mean(flag, self.known_flags)}"
            )
        raise UserError(f"{self.prog}: {message}; see {self.prog} --help.")

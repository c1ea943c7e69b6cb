"""The table of verbs: `llada-jax VERB ...` and `python -m llada_jax VERB ...`."""

import importlib
import os
import sys

from llada_jax.errors import NumericsError, Preempted, UserError, look_up

# verb -> what it does. The module llada_jax.VERB is imported only when its verb is called, so that `prepare` starts
# without loading a model and `--help` answers at once.
VERBS = {
    "prepare": "raw text -> tokenizer and packed records",
    "train": "records + config -> a trained, resumable workdir",
    "sample": "workdir + prompt -> text",
    "evaluate": "workdir + records -> held-out likelihood bound",
}


def usage() -> str:
    lines = "\n".join(f"  {verb:<10}{summary}" for verb, summary in VERBS.items())
    return f"usage: llada-jax VERB [flags]\n\n{lines}\n\nllada-jax VERB --help tells the flags of each."


def main(argv: list[str] | None = None) -> int:
    """Runs one verb and returns the exit status (see llada_jax.errors)."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if argv else 2
    if argv[0] == "--version":
        from llada_jax import __version__

        print(__version__)
        return 0
    try:
        look_up(VERBS, argv[0], "verb")
        importlib.import_module(f"llada_jax.{argv[0]}").main(argv[1:])
    except (UserError, NumericsError, Preempted) as error:
        print(f"llada-jax: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        print("llada-jax: interrupted.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our stdout (head, less) has gone: not an error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())

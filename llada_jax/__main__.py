"""The table of verbs: `llada-jax VERB ...` and `python -m llada_jax VERB ...`."""

import importlib
import os
import sys
import traceback

from llada_jax.errors import LostPeer, NumericsError, Preempted, UserError, look_up

# verb -> (module, what it does). A module is imported only when its verb is called, so that
# `prepare` starts without loading a model and `--help` answers at once.
VERBS = {
    "prepare": ("prepare", "raw text -> tokenizer and packed records"),
    "train": ("train", "records + config -> a trained, resumable workdir"),
    "rollback": (
        "rollback",
        "workdir -> the same run at an earlier step, without the data that followed",
    ),
    "sample": ("sample", "workdir + prompt -> text"),
    "evaluate": ("evaluate", "workdir + records -> held-out likelihood bound"),
    "export": ("export", "workdir -> Hugging Face directory"),
    "import": ("import_hf", "Hugging Face directory -> workdir"),
    "plan": ("plan", "config + topology -> memory, speed and cost, before anything is rented"),
    "sweep": ("sweep", "config with sweep(add) -> numbered runs and their table"),
}


def usage() -> str:
    lines = "\n".join(f"  {verb:<10}{summary}" for verb, (_, summary) in VERBS.items())
    return (
        f"usage: llada-jax VERB [flags]\n\n{lines}\n\n"
        "llada-jax VERB --help shows the flags of each."
    )


def main(argv: list[str] | None = None) -> int:
    """Runs one verb and returns the exit status (see llada_jax.errors)."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        if not argv or argv[0] in ("-h", "--help", "help"):
            print(usage(), flush=True)
            return 0 if argv else 2
        if argv[0] == "--version":
            from llada_jax import __version__

            print(__version__)
            return 0
        module, _ = look_up(VERBS, argv[0], "verb")
        importlib.import_module(f"llada_jax.verbs.{module}").main(argv[1:])
    # Not with the errors below: all processes of the run stop at the same step, so that each can
    # take its leave of the others in order.
    except Preempted as error:
        print(f"llada-jax: {error}", file=sys.stderr)
        return error.exit_status
    except (UserError, NumericsError, LostPeer) as error:
        print(f"llada-jax: {error}", file=sys.stderr)
        leave_the_others(error.exit_status)
        return error.exit_status
    except KeyboardInterrupt:
        print("llada-jax: interrupted.", file=sys.stderr)
        return 130
    # The reader of our stdout (head, less) has gone, which is not an error. Python would complain
    # about it once more when it flushes stdout at its exit, and so stdout leads nowhere from here.
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception:
        if is_one_of_several():
            traceback.print_exc()
            leave_the_others(1)
        raise
    return 0


def is_one_of_several() -> bool:
    """Whether this process is part of a run of several; does not import JAX to find out."""
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized()


def leave_the_others(status: int) -> None:
    """Ends a process that fails alone, at once and without exit handlers.

    JAX's exit handler would wait for the other processes, which wait for this one.
    """
    if is_one_of_several():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    sys.exit(main())

"""The table of verbs: `llada-jax VERB ...` and `python -m llada_jax VERB ...`."""

import contextlib
import importlib
import os
import sys
import time
import traceback

from llada_jax.errors import (
    LostPeer,
    NumericsError,
    Preempted,
    Unreachable,
    UserError,
    lacks_memory,
    look_up,
    one_line,
    reason,
)
from llada_jax.streams import (
    Log,
    Result,
    lead_nowhere,
    open_missing,
    reader_of_stdout_is_gone,
    write_line,
)

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
    "chat": ("chat", "workdir + your messages -> a conversation"),
    "evaluate": ("evaluate", "workdir + records -> held-out likelihood bound"),
    "export": ("export", "workdir -> Hugging Face directory"),
    "import": ("import_hf", "Hugging Face directory -> workdir"),
    "plan": ("plan", "config + topology -> memory, speed and cost, before you rent anything"),
    "sweep": ("sweep", "config with sweep(add) -> numbered runs and their table"),
}

# Verbs that write files and no result to stdout: a reader that leaves does not mean success.
WITHOUT_RESULT = ("train",)
# How long the first process of a run outlives its own error.
GRACE_S = 1.0


def usage() -> str:
    lines = "\n".join(f"  {verb:<10}{summary}" for verb, (_, summary) in VERBS.items())
    return (
        f"usage: llada-jax VERB [flags]\n\n{lines}\n\n"
        "llada-jax VERB --help shows the flags of each."
    )


def main(argv: list[str] | None = None) -> int:
    """Runs one verb and returns the exit status (see llada_jax.errors)."""
    if argv is None:
        argv = sys.argv[1:]
        if argv[:1] == ["train"]:
            ask_for_huge_pages()
    open_missing()
    with (
        contextlib.redirect_stdout(Result(sys.stdout)),
        contextlib.redirect_stderr(Log(sys.stderr)),
    ):
        return run_verb(argv)


def ask_for_huge_pages() -> None:
    """Starts this command once more in its place, with glibc's variable for huge pages, unless the
    environment decides about them.

    XLA on CPUs asks for its scratch memory again at every step, and to clear it page by page costs
    an eighth of the training time. glibc reads the variable before Python begins. Elsewhere, and
    in versions before 2.35, it has no effect.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if sys.platform != "linux" or "glibc.malloc.hugetlb" in tunables or not sys.executable:
        return
    wanted = ":".join(filter(None, (tunables, "glibc.malloc.hugetlb=1")))
    # it would train as well without, only more slowly
    with contextlib.suppress(OSError):
        command = [sys.executable, *sys.orig_argv[1:]]
        os.execve(sys.executable, command, {**os.environ, "GLIBC_TUNABLES": wanted})


def run_verb(argv: list[str]) -> int:
    """The rest of `main`, in which what is written to stderr never raises."""
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
        # now, because at Python's exit a failure would be a traceback
        sys.stdout.flush()
    # Not with the errors below: all processes of the run stop at the same step, so that each can
    # take its leave of the others in order.
    except Preempted as error:
        write_line(f"llada-jax: {error}")
        return error.exit_status
    except (UserError, NumericsError, LostPeer, Unreachable) as error:
        write_line(f"llada-jax: {error}")
        leave_the_others(error.exit_status)
        return error.exit_status
    except KeyboardInterrupt:
        write_line("llada-jax: interrupted.")
        leave_the_others(130)
        return 130
    except Exception as error:
        # The reader of our result (head, less) has gone, which is not an error. Python would
        # complain about it once more when it flushes stdout at its exit, and so stdout leads
        # nowhere from here.
        is_of_stdout = isinstance(error, BrokenPipeError) and reader_of_stdout_is_gone()
        if is_of_stdout and argv[0] not in WITHOUT_RESULT:
            lead_nowhere(sys.stdout.fileno())
            return 0
        if sentence := mistake_in_environment(error) or lack_of_memory(error):
            write_line(f"llada-jax: {sentence}")
            leave_the_others(UserError.exit_status)
            return UserError.exit_status
        if is_one_of_several():
            from llada_jax.cluster.distributed import lost_peer

            if lost := lost_peer(error, remedy="start the same command again on all hosts"):
                write_line(f"llada-jax: {lost}")
                leave_the_others(lost.exit_status)
            traceback.print_exc()
            leave_the_others(1)
        raise
    return 0


def mistake_in_environment(error: Exception) -> str:
    """Returns a sentence about a variable that JAX refuses, a current directory that is gone or a
    path of another user, "" for any other error.

    JAX reads some of its variables when it is imported and others when the first device is asked
    for, so that no single place of this package could check them.
    """
    # raised wherever a relative path is made absolute
    if isinstance(error, FileNotFoundError) and current_directory_is_gone():
        return (
            "The current directory has been removed; change to one that exists, and start the "
            "command there."
        )
    if isinstance(error, PermissionError) and isinstance(error.filename, str):
        return (
            f"{error.filename} cannot be used ({reason(error)}); change its permissions, or start "
            "the command as a user who has them."
        )
    variables = ", ".join(f"{n}={v!r}" for n, v in os.environ.items() if n.startswith("JAX_"))
    if isinstance(error, RuntimeError) and "initialize backend" in str(error):
        return (
            f"JAX finds no devices ({one_line(str(error))}); correct JAX_PLATFORMS and the other "
            f"variables of JAX (set: {variables or 'none'}), or install JAX for this hardware."
        )
    files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    # A platform whose plugin is not installed is passed over, and then none is left.
    if isinstance(error, AssertionError) and files[-1].endswith("jax/_src/xla_bridge.py"):
        return (
            f"JAX has nothing for JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')!r}; correct "
            "that variable, or install JAX for this hardware."
        )
    if isinstance(error, ValueError) and any(f.endswith("jax/_src/config.py") for f in files[-3:]):
        return f"JAX cannot use its variables ({one_line(str(error))}); set: {variables or 'none'}."
    return ""


def current_directory_is_gone() -> bool:
    try:
        os.getcwd()
    except FileNotFoundError:
        return True
    return False


def lack_of_memory(error: Exception) -> str:
    """Returns a sentence when the memory does not hold what was asked for, "" for any other error.

    It is a mistake and not a bug: no size is too large in itself, and this machine decides.
    """
    if not lacks_memory(error):
        return ""
    what = one_line(str(error)) or "no memory is left"
    return (
        f"The memory of this machine is not enough ({what}); lower the sizes in the config or on "
        "the command line (batch, microbatch, length, model; --batch-size of evaluate), or use "
        "more devices. `llada-jax plan` says what training needs."
    )


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
        from llada_jax.cluster.distributed import serves_the_others

        if serves_the_others():
            # those that end for the same reason say so before they lose the coordinator
            time.sleep(GRACE_S)
        os._exit(status)


if __name__ == "__main__":
    sys.exit(main())

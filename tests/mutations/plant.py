"""Plants the faults of faults.py one at a time in a copy of the repository, and counts how many the
tests catch.

    python tests/mutations/plant.py                # all of them
    python tests/mutations/plant.py --only noise   # those with this word in name or file
    python tests/mutations/plant.py --results f    # goes on where a run that wrote to f has stopped

Every fault is planted for the tests that its line names, and is caught when one of them fails; at
the end all the tests that failed must pass without a fault. What survives is printed, and the exit
status is 1 when less than nine tenths were caught.

The tests run in forked processes of one that has imported JAX and what else takes seconds, but
nothing of this package.
"""

import argparse
import importlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# As in tests/conftest.py; JAX reads them when it is imported.
os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "JAX_NUM_CPU_DEVICES": "8",
    "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".pytest_cache" / "xla"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    "OPENBLAS_NUM_THREADS": "1",
}
SLOW_IMPORTS = (
    "grain",
    "hypothesis",
    "jax.experimental.multihost_utils",
    "numpy",
    "optax",
    "orbax.checkpoint",
    "pytest",
    "scipy.optimize",
    "tensorstore",
    "tokenizers",
    "flax.nnx",
)
LIMIT_S = 900
NO_TESTS = 5  # pytest's status when it has selected none


def copy_of_repository(target: Path) -> None:
    """Copies the files that git knows, and those that it would not ignore."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, target / name)


def run_tests(tree: Path, words: list[str], log: Path) -> int:
    """Returns the exit status of pytest in a forked process: 0 when all tests pass, 1 when one
    fails; 124 when it takes too long, which counts as a failure.
    """
    sys.stdout.flush()
    if (pid := os.fork()) == 0:
        os.setsid()
        # a shell makes its background jobs ignore Ctrl-C, and the processes of tests inherit that
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number in (1, 2):
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        os.chdir(tree)
        os.environ["PYTHONPATH"] = str(tree)
        sys.path[:] = [str(tree), *(p for p in sys.path if not p.startswith(str(ROOT) + "/tests"))]
        sys.dont_write_bytecode = True
        status = 70
        try:
            import pytest

            status = int(pytest.main([*words, "-x", "-q", "-p", "no:cacheprovider", "-n", "0"]))
        finally:
            sys.stdout.flush()
            os._exit(status)
    deadline = time.monotonic() + LIMIT_S
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.killpg(pid, 9)
            os.waitpid(pid, 0)
            return 124
        time.sleep(0.05)


def plant(fault, tree: Path, log: Path) -> str:
    """Returns the test that catches the fault, or the first file of tests that ends in another way
    than by passing; "" when none does. The copy is as before afterwards.

    Tests that are marked slow run only when the others let the fault pass.
    """
    path = tree / fault.file
    text = path.read_text()
    assert text.count(fault.old) == 1, f"{fault.name}: {fault.file} has changed"
    path.write_text(text.replace(fault.old, fault.new))
    try:
        words, statuses = fault.tests.split(), []
        for marked in ("not slow", "slow"):
            status = run_tests(tree, [*words, "-m", marked], log)
            if status not in (0, NO_TESTS):
                failed = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", log.read_text(), re.M)
                return failed[1] if failed else words[0]
            statuses.append(status)
        assert 0 in statuses, f"{fault.name}: there are no such tests: {fault.tests}"
        return ""
    finally:
        path.write_text(text)


def results_before(path: Path | None) -> dict[tuple[str, str], str]:
    """Returns {(file, name): the test that caught the fault, or ""} of the runs that wrote to
    `path`; the last line of a fault counts.
    """
    if path is None or not path.exists():
        return {}
    lines = [line.split("\t") for line in path.read_text().splitlines()]
    return {(file, name): by for file, name, by in lines}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--only", default="", metavar="WORD", help="faults with this word in their name or file")
    add("--work", type=Path, default=Path("/tmp/llada_jax-faults"), metavar="DIR", help="scratch")
    add("--part", default="0/1", metavar="I/N", help="every N-th of them, from the I-th on")
    add(
        "--results",
        type=Path,
        metavar="FILE",
        help="append a line per fault; skip those that it has",
    )
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT / "tests"))
    from mutations.faults import FAULTS

    part, of = map(int, args.part.split("/"))
    faults = [f for f in FAULTS if args.only in f.name or args.only in f.file][part::of]
    before = results_before(args.results)
    shutil.rmtree(args.work, ignore_errors=True)
    tree, log = args.work / "tree", args.work / "pytest.log"
    copy_of_repository(tree)
    for name in SLOW_IMPORTS:
        importlib.import_module(name)
    survivors, caught_by, num_caught = [], set(), 0
    for fault in faults:
        by = before.get((fault.file, fault.name))
        if by is None:
            began = time.monotonic()
            by = plant(fault, tree, log)
            word = "caught  " if by else "SURVIVED"
            print(
                f"{word} {time.monotonic() - began:4.0f} s  {fault.file}: {fault.name}  {by}",
                flush=True,
            )
            if by:
                caught_by.add(by)
            if args.results:
                with args.results.open("a") as file:
                    file.write(f"{fault.file}\t{fault.name}\t{by}\n")
        num_caught += bool(by)
        if not by:
            survivors.append(fault)
    # A test that fails without a fault as well catches nothing.
    status = run_tests(tree, sorted(caught_by), log) if caught_by else 0
    if status:
        print(f"some of these tests fail without a fault too:\n{log.read_text()[-5000:]}")
        return 1
    print(f"\n{num_caught} of {len(faults)} faults were caught")
    for fault in survivors:
        print(f"survived: {fault.file}: {fault.name}")
    return int(num_caught < 0.9 * len(faults))


if __name__ == "__main__":
    sys.exit(main())

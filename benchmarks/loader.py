"""How many tokens/s does the loader deliver, and how soon is the first batch there?

    python benchmarks/loader.py [--seconds 5] [--repeats 3]

Reads batches of 65,536 tokens from byte records of the shipped corpus, at several sequence lengths
and numbers of reader threads. The consumer does nothing, so this is the most that the loader can
deliver; training consumes the tokens/s that benchmarks/train_step.py prints. The first batch is
timed for a new run and for a resumed one. The fastest of the repeats counts. Prints a Markdown
table.
"""

import argparse
import contextlib
import io
import os
import tempfile
import time
from pathlib import Path

from llada_jax.data.loader import train_batches
from llada_jax.data.preparation import prepare
from llada_jax.data.text import Cut

CORPUS = Path(__file__).resolve().parents[1] / "llada_jax/data/austen6.txt.xz"
TOKENS_PER_BATCH = 65_536


def batches_of(directory: Path, *, sequence_length: int, num_threads: int, start_step: int = 0):
    return train_batches(
        [(str(directory), 1.0)],
        batch_size=TOKENS_PER_BATCH // sequence_length,
        sequence_length=sequence_length,
        seed=0,
        num_threads=num_threads,
        start_step=start_step,
    )


def tokens_per_second(batches, seconds: float) -> float:
    """Returns the rate over about `seconds`, not counting the batches that were read ahead."""
    for _ in range(10):
        next(batches)
    begin, num_batches = time.perf_counter(), 0
    while time.perf_counter() - begin < seconds:
        next(batches)
        num_batches += 1
    return num_batches * TOKENS_PER_BATCH / (time.perf_counter() - begin)


def first_batch_seconds(directory: Path, *, sequence_length: int, start_step: int) -> float:
    begin = time.perf_counter()
    batches = batches_of(
        directory, sequence_length=sequence_length, num_threads=4, start_step=start_step
    )
    next(batches)
    seconds = time.perf_counter() - begin
    batches.close()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=5.0, help="seconds per measurement")
    parser.add_argument("--repeats", type=int, default=3, help="the fastest one counts")
    parser.add_argument("--threads", type=int, nargs="+", default=[0, 1, 4])
    parser.add_argument("--sequence-lengths", type=int, nargs="+", default=[128, 1024, 4096])
    arguments = parser.parse_args()

    with open("/proc/cpuinfo") as file:
        names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
    print(f"Machine: {names[0] if names else 'unknown processor'}, {os.cpu_count()} cores.\n")
    columns = [f"{n} thread{'s' if n != 1 else ''}: tokens/s" for n in arguments.threads]
    print(
        f"| sequence length | {' | '.join(columns)} | first batch | first batch at step 1,000,000 |"
    )
    print("|---" * (len(columns) + 3) + "|")
    with tempfile.TemporaryDirectory() as scratch:
        for sequence_length in arguments.sequence_lengths:
            directory = Path(scratch) / str(sequence_length)
            with contextlib.redirect_stderr(io.StringIO()):
                prepare(
                    [str(CORPUS)],
                    directory,
                    sequence_length=sequence_length,
                    tokenizer="bytes",
                    cut=Cut(documents="", text_field="text", document_start="^(CHAPTER|Chapter) "),
                )
            cells = []
            for num_threads in arguments.threads:
                rates = []
                for _ in range(arguments.repeats):
                    batches = batches_of(
                        directory, sequence_length=sequence_length, num_threads=num_threads
                    )
                    rates.append(tokens_per_second(batches, arguments.seconds))
                    batches.close()
                cells.append(f"{max(rates):,.0f}")
            for start_step in (0, 1_000_000):
                seconds = min(
                    first_batch_seconds(
                        directory, sequence_length=sequence_length, start_step=start_step
                    )
                    for _ in range(arguments.repeats)
                )
                cells.append(f"{1e3 * seconds:.0f} ms")
            print(f"| {sequence_length:,} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()

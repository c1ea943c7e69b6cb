"""How many MB/s of text does `llada-jax prepare` turn into records?

    python benchmarks/prepare.py [--megabytes 130] [--workers 1 2] [--repeats 3]

This is measured for several tokenizers and numbers of processes. The input is the shipped corpus,
repeated as separate files up to the requested size, so that starting the processes, which is
counted, weighs little; 130 MB are two units of work, enough for two processes. The tokenizers are
trained once on the corpus, outside the timed part; the last column has the time that this took. The
fastest of the repeats counts, because other load on the machine can only slow a run down. Prints a
Markdown table.
"""

import argparse
import contextlib
import io
import lzma
import os
import shutil
import tempfile
import time
from pathlib import Path

from llada_jax.data.preparation import prepare
from llada_jax.data.text import Cut
from llada_jax.data.tokenizer_training import train_sentencepiece

CORPUS = Path(__file__).resolve().parents[1] / "llada_jax/data/austen6.txt.xz"
VOCAB_SIZE = 8000


def train_tokenizers(text: str, directory: Path) -> dict[str, tuple[str, float]]:
    """Returns {name: (value for --tokenizer, seconds of training)}."""
    result = {"bytes": ("bytes", 0.0)}
    lines = text.splitlines()
    for model_type in ("unigram", "bpe"):
        begin = time.perf_counter()
        tokenizer = train_sentencepiece(lines, vocab_size=VOCAB_SIZE, model_type=model_type)
        seconds = time.perf_counter() - begin
        tokenizer.save(directory / model_type)
        result[f"SentencePiece {model_type} {VOCAB_SIZE}"] = (str(directory / model_type), seconds)
    begin = time.perf_counter()
    train_hugging_face(lines, directory / "hf")
    result[f"Hugging Face byte-level BPE {VOCAB_SIZE}"] = (
        str(directory / "hf"),
        time.perf_counter() - begin,
    )
    return result


def train_hugging_face(lines: list[str], directory: Path) -> None:
    """Writes a tokenizer.json of the kind that GPT-2, Llama 3 and LLaDA use."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines, trainer)
    directory.mkdir()
    tokenizer.save(str(directory / "tokenizer.json"))
    special = (
        '{"eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}'
    )
    (directory / "tokenizer_config.json").write_text(special)


def measure(
    inputs: Path, tokenizer: str, *, workers: int, repeats: int, scratch: Path
) -> tuple[float, dict]:
    """Returns the seconds of the fastest repeat, and the content of dataset.json."""
    seconds = []
    for _ in range(repeats):
        output = scratch / "output"
        begin = time.perf_counter()
        with contextlib.redirect_stderr(io.StringIO()):
            content = prepare(
                [str(inputs)],
                output,
                sequence_length=1024,
                tokenizer=tokenizer,
                workers=workers,
                add_mask_token=True,
                cut=Cut(documents="", text_field="text", document_start="^(CHAPTER|Chapter) "),
            )
        seconds.append(time.perf_counter() - begin)
        shutil.rmtree(output)
    return min(seconds), content


def processor() -> str:
    with open("/proc/cpuinfo") as file:
        names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
    return f"{names[0] if names else 'unknown processor'}, {os.cpu_count()} cores"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--megabytes", type=int, default=130)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, os.cpu_count()])
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()

    text = lzma.decompress(CORPUS.read_bytes()).decode()
    num_copies = max(1, round(arguments.megabytes * 1e6 / len(text.encode())))
    with tempfile.TemporaryDirectory() as directory:
        scratch = Path(directory)
        inputs = scratch / "inputs"
        inputs.mkdir()
        for copy in range(num_copies):
            (inputs / f"{copy:04d}.txt").write_text(text)
        tokenizers = train_tokenizers(text, scratch)
        num_bytes = num_copies * len(text.encode())
        print(
            f"Machine: {processor()}. {num_bytes / 1e6:.0f} MB of text, sequences of 1024 tokens.\n"
        )
        columns = [
            f"{workers} process{'es' if workers > 1 else ''}: MB/s" for workers in arguments.workers
        ]
        columns += ["tokens/s of the last", "bytes/token", "trained in"]
        print(f"| tokenizer | {' | '.join(columns)} |")
        print("|---" * (len(columns) + 1) + "|")
        for name, (tokenizer, training_s) in tokenizers.items():
            cells = []
            for workers in arguments.workers:
                seconds, content = measure(
                    inputs, tokenizer, workers=workers, repeats=arguments.repeats, scratch=scratch
                )
                cells.append(f"{num_bytes / 1e6 / seconds:.1f}")
            num_tokens = sum(split["num_tokens"] for split in content["splits"].values())
            cells += [
                f"{num_tokens / seconds:,.0f}",
                f"{num_bytes / num_tokens:.2f}",
                f"{training_s:.1f} s",
            ]
            print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()

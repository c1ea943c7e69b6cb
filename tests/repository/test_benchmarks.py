"""The benchmarks measure what they say they measure."""

import importlib.util
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from support.datasets import write_dataset
from support.paths import ROOT
from support.required import library

from llada_jax.config import load_config
from llada_jax.verbs.evaluate import write_report


def module_of(script: str):
    """Returns a benchmark as a module."""
    spec = importlib.util.spec_from_file_location(script, ROOT / f"benchmarks/{script}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("size", "config", "not_alike"),
    [
        ("tiny", "tiny", {"vocab_size"}),
        ("llada_160m", "llada_160m", {"vocab_size"}),
        ("llada_1b", "llada_1b", set()),
        ("llada_8b_wide", "llada_8b", {"num_layers"}),
    ],
)
def test_the_networks_of_the_train_step_benchmark_are_those_of_the_configs(size, config, not_alike):
    train_step = module_of("train_step")
    shipped = load_config(str(ROOT / f"configs/{config}.py"))
    sizes = {k: v for k, v in train_step.SIZES[size].items() if k not in {"batch_size", *not_alike}}
    assert sizes.pop("sequence_length") == shipped.data.sequence_length
    assert sizes == {name: shipped.model[name] for name in sizes}


TORCH, PLAIN, BLOCKS = "PyTorch, published loop", "plain loop", "one loop per block"


def printed_by(script: str, words: list) -> str:
    """Returns what a script of benchmarks/ prints."""
    done = subprocess.run(
        [sys.executable, f"benchmarks/{script}.py", *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def sampling_table(words: list) -> dict[str, dict[str, str]]:
    """Returns the table of benchmarks/sampling.py: {mode: {column: value}}."""
    lines = [line for line in printed_by("sampling", words).splitlines() if line.startswith("| ")]
    header, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return {row[0]: dict(zip(header, row, strict=True)) for row in rows}


@pytest.mark.slow
def test_the_sampling_benchmark_compares_loops_that_sample_the_same():
    words = "--size 2m --gen-length 8 --block-length 4 --prompt-length 8 --batch-size 2 --repeats 1"
    table = sampling_table([*words.split(), "--modes", TORCH, PLAIN, BLOCKS])
    assert {mode: row["agreement"] for mode, row in table.items()} == {
        TORCH: "100%",
        PLAIN: "100%",
        BLOCKS: "100%",
    }


@pytest.mark.slow
def test_the_sampling_benchmarks_judge_the_modes_of_a_trained_network(runs, tmp_path):
    """Its angles and the eps of its norms are not those of an untrained one."""
    knobs = ("model.rope_theta=30.0", "model.norm_eps=1e-2", "evaluation.every_steps=0")
    runs.train(tmp_path / "model", *knobs)
    runs.train(tmp_path / "control", *knobs, "objective.name=autoregressive")
    words = ["--checkpoint", tmp_path / "model", "--data", runs.dataset]
    words += ["--control", tmp_path / "control", "--batch-size", 4]
    words += ["--prompt-length", 8, "--gen-length", 16, "--block-length", 8]
    table = sampling_table([*words, "--repeats", 1, "--modes", TORCH, PLAIN, "dual cache"])
    assert table[TORCH]["agreement"] == "100%"
    assert table[TORCH]["bits per byte"] == table[PLAIN]["bits per byte"]
    assert table[PLAIN]["no worse"] == "yes"
    assert float(table["dual cache"]["bits per byte"]) > 0
    # what `evaluate --report` shows of the other one
    report = tmp_path / "report"
    more = ["--num-prompts", 4, "--families", "schedule", "--output", report]
    assert "| the control | | |" in printed_by("frontier", [*words, *more])
    write_report(SimpleNamespace(checkpoint=str(tmp_path / "model"), report=str(report)), {})
    page = (report / "report.html").read_text()
    for tokens, passes in (("1 token", "1.000"), ("2 tokens", "0.500"), ("8 tokens", "0.125")):
        assert f"<td>schedule, {tokens} per pass</td><td>{passes}</td>" in page


def test_the_frequencies_of_the_frontier_are_those_of_all_held_out_text(tmp_path):
    eos_id = 256
    heldout = np.array([1, 1, 2, 3] * 8 + [4, 4, 4, eos_id] * 8)
    directory = write_dataset(tmp_path, {"train": np.full(64, 5), "heldout": heldout})
    lengths = {"prompt_length": 4, "gen_length": 8}
    prompts_BT, real_BT, frequency_V = module_of("frontier").held_out(
        str(directory), num_prompts=1, eos_id=eos_id, **lengths
    )
    assert prompts_BT.tolist() == [[1, 1, 2, 3]]
    assert real_BT.tolist() == [[1, 1, 2, 3] * 2]
    expected = {1: 16 / 56, 2: 8 / 56, 3: 8 / 56, 4: 24 / 56}
    assert dict(enumerate(frequency_V[:6])) == pytest.approx({0: 0, 5: 0, **expected})
    assert frequency_V[6:].sum() == 0


def tables(text: str) -> list[list[list[str]]]:
    """Returns the Markdown tables of a text: of each the header and then its rows."""
    return [
        [[cell.strip() for cell in line.strip("|").split("|")] for line in (header, *rows)]
        for header, _, *rows in map(str.splitlines, re.findall(r"(?:^\|.*\n)+", text, re.M))
    ]


@pytest.mark.slow
def test_the_benchmark_of_records_prints_the_tables_of_the_page():
    library("gcsfs")
    page = re.search(
        r"^## Records from a bucket.*?(?=^## )",
        (ROOT / "docs/benchmarks.md").read_text(),
        re.MULTILINE | re.DOTALL,
    )[0]
    words = "--latency 0.001 --shards 30 --seconds 0.1 --threads 1"
    rates, starts = tables(printed_by("records", words.split()))
    assert rates[0] == tables(page)[0][0]
    assert [row[:2] for row in rates[1:]] == [["disk", "1"], ["bucket, 1 ms", "1"]]
    assert starts[0] == ["30 shards on", *tables(page)[1][0][1:]]
    assert [row[0] for row in starts[1:]] == ["disk", "bucket, 1 ms"]
    rows_per_s, tokens_per_s = (float(cell.replace(",", "")) for cell in rates[1][2:4])
    assert tokens_per_s == pytest.approx(4096 * rows_per_s, abs=4096)

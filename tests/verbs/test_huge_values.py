"""Flags with numbers that nothing can hold: one sentence with the value, and status 2, at once.

The checkpoints, configs and data that the commands name do not exist, where there is no need for
them: the number is refused before anything is read.
"""

import time

import numpy as np
import pytest
from support.paths import ROOT

import llada_jax
from llada_jax.__main__ import main
from llada_jax.errors import UserError
from llada_jax.samplers.text import generate_tokens

HUGE, LONG = "1000000000", "1" + 29 * "0"

SAMPLE = ["sample", "--checkpoint", "none"]
EVALUATE = ["evaluate", "--checkpoint", "none", "--data", "none"]
TASKS = ["evaluate", "--checkpoint", "none", "--tasks", "none.jsonl"]
PREPARE = ["prepare", "--input", "none.txt", "--output", "none", "--tokenizer", "bytes"]
RECORDS = [*PREPARE, "--sequence-length", "8"]
PLAN = ["plan", "--config", str(ROOT / "configs/llada_8b.py"), "--topology", "v5p-128"]
TINY = ["plan", "--config", str(ROOT / "configs/tiny.py"), "--topology", "v5p-128"]
DRAWN = ["--temperature", "1"]

# (command, flag, values)
NUMBERS = [
    *((SAMPLE, flag, (HUGE, LONG, "0", "-1")) for flag in ("--gen-length", "--block-length")),
    *((SAMPLE, flag, (HUGE, LONG, "0", "-1")) for flag in ("--steps", "--batch-size")),
    *((SAMPLE, flag, (HUGE, LONG, "0", "-1")) for flag in ("--num-samples", "--best-of")),
    (SAMPLE, "--seed", (LONG, "-1")),
    *((SAMPLE, flag, ("nan", "inf", "-1", "1e39")) for flag in ("--temperature", "--cfg-scale")),
    *(
        ([*SAMPLE, "--infill", "a[MASK]"], flag, ("nan", "inf", "-1", "1e39"))
        for flag in ("--temperature", "--cfg-scale")
    ),
    ([*SAMPLE, *DRAWN], "--top-k", (HUGE, LONG, "-1")),
    ([*SAMPLE, *DRAWN], "--top-p", ("nan", "inf", "0", "-1")),
    (SAMPLE, "--suppress", (LONG, "-1")),
    (SAMPLE, "--lookahead", (HUGE, LONG, "-1")),
    ([*SAMPLE, "--cache", "dual"], "--refresh", (HUGE, LONG, "-1")),
    (EVALUATE, "--mc-samples", (HUGE, LONG, "0", "-1")),
    (EVALUATE, "--batch-size", (HUGE, LONG, "0", "-1")),
    (EVALUATE, "--seed", (LONG, "-1")),
    (TASKS, "--mc-samples", (HUGE, LONG, "0", "-1")),
    (TASKS, "--cfg-scale", ("nan", "inf", "-1", "1e39")),
    (PREPARE, "--sequence-length", (HUGE, LONG, "0", "1", "-1")),
    (RECORDS, "--workers", (HUGE, LONG, "0", "-1")),
    (RECORDS, "--heldout", ("nan", "inf", "-1", "1")),
    *(
        (RECORDS, "--tokenizer", (f"{k}:{n}" for n in (HUGE, LONG, "0")))
        for k in ("spm", "spm-bpe")
    ),
    (PLAN, "--slices", (HUGE, LONG, "0", "-1")),
    (PLAN, "--topology", (f"{HUGE}xh100", f"{LONG}xh100", "0xh100")),
    (TINY, "--vocab-size", (HUGE, LONG, "-1")),
]


@pytest.mark.parametrize(
    ("command", "flag", "value"),
    [
        pytest.param(command, flag, value, id=f"{command[0]} {flag} {value}")
        for command, flag, values in NUMBERS
        for value in values
    ],
)
def test_a_number_out_of_range_ends_at_once_in_a_sentence_that_holds_it(
    command, flag, value, capfd, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "none.txt").write_text("text")
    began = time.process_time()
    assert main([*command, flag, value]) == 2
    # a loop over a billion of anything takes longer
    assert time.process_time() - began < 20
    out, err = capfd.readouterr()
    (sentence,) = err.splitlines()
    assert out == ""
    assert sentence.startswith("llada-jax: ")
    assert sentence.endswith((".", "?"))
    assert value in sentence or f"{float(value):g}" in sentence or str(float(value)) in sentence
    # machines have names of their own
    name = flag.strip("-").replace("-", "_")
    assert name in sentence.replace("-", "_") or flag == "--topology"


def test_numbers_that_only_their_product_makes_too_large_are_refused(capfd):
    for words, sentence in (
        (
            [*SAMPLE, "--num-samples", "10000000", "--best-of", "10000000", *DRAWN],
            "There are 100000000000000 texts to generate",
        ),
        (
            [*TINY, "--vocab-size", "16777216", "--config.model.d_model=16777216"],
            "elements of the embedding, and no machine holds",
        ),
        (
            [*PLAN, "--slices", "1000000"],
            "--slices 1000000 of v5p-128 are 64000000 devices, and a plan is for at most",
        ),
    ):
        assert main(words) == 2
        assert sentence in capfd.readouterr().err


def test_the_nearest_block_length_of_a_long_text_is_found_without_trying_all(capfd):
    assert main([*SAMPLE, "--gen-length", "16777213", "--block-length", "4000"]) == 2
    assert (
        "block_length=4000 must divide gen_length=16777213; nearest: 1." in capfd.readouterr().err
    )


def test_the_python_interface_refuses_the_same_numbers(random_checkpoint):
    with pytest.raises(UserError, match="gen_length=1000000000000 must be at most"):
        generate_tokens(None, {}, [[1]], mask_id=0, pad_id=0, gen_length=10**12)
    model = llada_jax.load(str(random_checkpoint))
    for setting, value in (
        ("mc_samples", 10**9),
        ("batch_size", 10**9),
        ("seed", -1),
        ("seed", 10**18),
        ("cfg_scale", np.nan),
    ):
        with pytest.raises(UserError, match=f"{setting}={value}"):
            model.score([("a", "b")], **{setting: value})
    for setting, value in (("gen_length", 10**9), ("top_k", 10**12), ("seed", 10**18)):
        with pytest.raises(UserError, match=f"{setting}={value}"):
            model.generate(["a"], temperature=1.0, **{setting: value})

"""Fine-tuning on dialogues keeps the promises of pretraining: a killed run continues bit for bit,
and the curve depends neither on the mesh, nor on the hosts, nor on microbatches.
"""

import json
import math

import numpy as np
import pytest
from support.runs import (
    assert_same_run,
    is_committed,
    kill_when,
    last_logged_step,
    losses,
)

from llada_jax.run.metrics_file import read_lines

SFT = (
    "objective.name=sft",
    "data.random_length_probability=0.0",
    "data.attend_across_documents=False",
    "log.tensorboard=False",
)
# the recipes of configs/sft_llada_8b.py and configs/sft_packed.py
PADDED = ("data.eos_padding=2", "objective.t_sampling=iid")
PACKED = (
    "data.split_probability=0.3",
    "objective.masked=documents",
    "objective.mean_over=tokens",
)


@pytest.fixture(scope="module")
def straight(runs, dialogues):
    """The run on packed rows, on one device."""
    workdir = runs.directory / "sft"
    runs.train(workdir, f"data.path={dialogues('packed')}", *SFT, *PACKED)
    return workdir


@pytest.mark.slow
def test_a_killed_run_on_packed_rows_equals_the_straight_one(runs, dialogues, straight):
    curve = losses(straight)
    assert len(curve) == 20
    content = json.loads((dialogues("packed") / "dataset.json").read_text())["splits"]["train"]
    rate = content["num_bytes"] / content["num_tokens"]  # prompts are masked too
    train = read_lines(straight)[0]["train"]
    assert train["bits_per_byte"] == pytest.approx(train["nelbo"] / math.log(2) / rate, rel=1e-6)
    assert np.mean(curve[-5:]) < np.mean(curve[:3]) - 1  # it learns
    workdir = runs.directory / "sft-killed"
    words = (f"data.path={dialogues('packed')}", *SFT, *PACKED)
    process = runs.start(workdir, *words)
    kill_when(process, lambda: is_committed(workdir, 10) and last_logged_step(workdir) >= 11)
    lines = runs.train(workdir, *words)
    assert "start       step 10 of" in lines
    assert f"{rate:.2f} bytes per token" in lines
    assert_same_run(workdir, straight, step=20)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "num_devices", "num_processes", "overrides"),
    [
        ("mesh", 8, 1, ["mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2"]),
        ("processes", 4, 2, ["optimizer.gradient_accumulation=2"]),
    ],
)
def test_the_curve_depends_neither_on_mesh_nor_on_hosts_nor_on_microbatches(
    runs, dialogues, straight, name, num_devices, num_processes, overrides
):
    workdir = runs.directory / f"sft-{name}"
    runs.train(
        workdir,
        f"data.path={dialogues('packed')}",
        *SFT,
        *PACKED,
        "evaluation.every_steps=0",
        *overrides,
        num_devices=num_devices,
        num_processes=num_processes,
    )
    np.testing.assert_allclose(losses(workdir), losses(straight), rtol=1e-5)


@pytest.mark.slow
def test_rows_that_are_filled_up_are_the_same_on_two_hosts_and_in_microbatches(runs, dialogues):
    words = (f"data.path={dialogues('padded')}", *SFT, *PADDED, "evaluation.every_steps=0")
    one, two = runs.directory / "sft-padded", runs.directory / "sft-padded-2"
    runs.train(one, *words, "num_steps=6")
    assert not any("bits_per_byte" in line.get("train", ()) for line in read_lines(one))
    words += ("num_steps=6", "optimizer.gradient_accumulation=2")
    runs.train(two, *words, num_devices=4, num_processes=2)
    np.testing.assert_allclose(losses(two), losses(one), rtol=1e-5)


def speeds_of(workdir) -> list[dict]:
    return [line["speed"] for line in read_lines(workdir) if "speed" in line]


@pytest.mark.slow
def test_buckets_change_neither_the_curve_nor_what_a_killed_run_continues_to(runs, dialogues):
    words = (f"data.path={dialogues('padded')}", *SFT, "evaluation.every_steps=0")
    words += ("data.batch_size=4", "mesh.fsdp=1", "checkpoint.every_steps=3")
    plain, cut = runs.directory / "sft-whole-rows", runs.directory / "sft-buckets"
    buckets = "data.length_buckets=(12,16,20)"
    runs.train(plain, *words, "num_steps=8")
    log = runs.train(cut, *words, buckets, "num_steps=8")
    assert log.count("compiled    in") == 4
    np.testing.assert_allclose(losses(cut), losses(plain), rtol=1e-5)
    # attention to shorter rows is less work per token
    whole, short = (
        [speed["tflops_per_device"] / speed["tokens_per_s"] for speed in speeds_of(workdir)]
        for workdir in (plain, cut)
    )
    np.testing.assert_allclose(whole, whole[0], rtol=1e-6)
    assert max(short) < whole[0]
    # two hosts agree on the length of every batch, also after a restart
    two = runs.directory / "sft-buckets-2"
    several = dict(num_devices=2, num_processes=2)
    words = tuple(word for word in words if word != "mesh.fsdp=1")
    runs.train(two, *words, buckets, "num_steps=4", **several)
    runs.train(two, *words, buckets, "num_steps=8", **several)
    np.testing.assert_allclose(losses(two), losses(plain), rtol=1e-5)

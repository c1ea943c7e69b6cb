"""The table of machines in docs/finetuning.md holds what `llada-jax plan` computes."""

import re

import pytest
from support.paths import CONFIGS, ROOT

from llada_jax.cluster.hardware import machines_named
from llada_jax.config import load_config
from llada_jax.verbs.plan import Asked, estimate

PAGE = (ROOT / "docs" / "finetuning.md").read_text()
RANGE = r"([\d.]+) to ([\d.]+)"
ROWS = re.findall(
    rf"^\| `(\S+)` \| `(\S+)` \| (.*?) ?\| ([\d.]+) of ([\d.]+) GiB \| {RANGE} \| {RANGE} days \|$",
    PAGE,
    flags=re.MULTILINE,
)


def test_the_table_names_every_config_of_the_8b():
    tuned = [path.stem for path in CONFIGS.glob("*_llada_8b.py")]
    assert {name for name, *_ in ROWS} == {*tuned, "sft_packed"}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row[0]}-{row[1]}")
def test_a_row_is_what_plan_says(row):
    name, machine, knobs, *numbers = row
    config = load_config(str(CONFIGS / f"{name}.py"), knobs.strip("`").split())
    report = estimate(Asked(config, machines_named(machine), 1, config.model.vocab_size))
    found = [
        report["memory"]["peak"] / 2**30,
        report["usable_bytes"] / 2**30,
        *(report[unit][end] for unit in ("seconds_per_step", "days") for end in ("fast", "slow")),
    ]
    for text, value in zip(numbers, found, strict=True):
        digits = len(text.partition(".")[2])
        assert float(text) == pytest.approx(value, abs=0.51 / 10**digits)

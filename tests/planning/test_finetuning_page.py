"""The tables of memory and machines in docs/finetuning.md hold what `llada-jax plan` computes."""

import re

import pytest
from support.paths import CONFIGS, ROOT

from llada_jax.cluster.hardware import machines_named
from llada_jax.config import load_config
from llada_jax.validation import CHOICES
from llada_jax.verbs.plan import Asked, estimate

PAGE = (ROOT / "docs" / "finetuning.md").read_text()
RANGE = r"([\d.]+) to ([\d.]+)"
ROWS = re.findall(
    rf"^\| `(\S+)` \| `(\S+)` \| (.*?) ?\| ([\d.]+) of ([\d.]+) GiB \| {RANGE} \| {RANGE} days \|$",
    PAGE,
    flags=re.MULTILINE,
)
# of `frozen_dtype`, whose last column is the compiler's
FROZEN = re.findall(
    r"^\| `(\w+)` \| ([\d.]+) GiB \| ([\d.]+) GiB \| ([\d.]+) GiB \| [\d.]+ GiB \|$",
    PAGE,
    flags=re.MULTILINE,
)


def check_figure(text: str, value: float) -> None:
    """Asserts that a number of the page is a computed one, rounded."""
    digits = len(text.partition(".")[2])
    assert float(text) == pytest.approx(value, abs=0.51 / 10**digits)


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
        check_figure(text, value)


def test_the_table_names_every_dtype_of_a_frozen_network():
    assert [dtype for dtype, *_ in FROZEN] == [*CHOICES["lora.frozen_dtype"]]


@pytest.mark.parametrize("row", FROZEN, ids=lambda row: row[0])
def test_the_memory_over_a_frozen_network_is_what_plan_says(row):
    dtype, *numbers = row
    config = load_config(str(CONFIGS / "lora_llada_8b.py"), [f"lora.frozen_dtype={dtype}"])
    report = estimate(Asked(config, machines_named("1xh100"), 1, config.model.vocab_size))
    for text, name in zip(numbers, ("frozen", "state", "peak"), strict=True):
        check_figure(text, report["memory"][name] / 2**30)

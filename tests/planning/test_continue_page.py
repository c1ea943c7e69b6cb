"""The table of machines in docs/continue-8b.md holds what `llada-jax plan` computes."""

import re

import pytest
from support.paths import CONFIGS, ROOT

from llada_jax.cluster.hardware import machines_named
from llada_jax.config import load_config
from llada_jax.verbs.plan import Asked, estimate

PAGE = (ROOT / "docs" / "continue-8b.md").read_text()
ROWS = re.findall(
    r"^\| `(\S+)` \| `(.+?)` \| ([\d.]+) of ([\d.]+) GiB \| ([\d.]+) to ([\d.]+) days \|$",
    PAGE,
    flags=re.MULTILINE,
)


def test_the_table_is_found():
    assert len(ROWS) >= 5


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_a_row_is_what_plan_says(row):
    name, knobs, *numbers = row
    peak, usable, fast, slow = map(float, numbers)
    asked = ["num_tokens=1e10", "data.batch_size=256", *knobs.split()]
    config = load_config(str(CONFIGS / "llada_8b.py"), asked)
    report = estimate(Asked(config, machines_named(name), 1, config.model.vocab_size))
    assert report["memory"]["peak"] / 2**30 == pytest.approx(peak, abs=0.06)
    assert report["usable_bytes"] / 2**30 == pytest.approx(usable, abs=0.06)
    assert report["days"]["fast"] == pytest.approx(fast, abs=0.06)
    assert report["days"]["slow"] == pytest.approx(slow, abs=0.06)
    assert peak < usable


def test_the_table_of_steps_is_right():
    rows = re.findall(r"^\| (\d+) billion \| ([\d,]+) \|$", PAGE, flags=re.MULTILINE)
    assert rows
    for billions, steps in rows:
        assert round(int(billions) * 1e9 / (256 * 4096)) == pytest.approx(
            int(steps.replace(",", "")), abs=1
        )

"""What docs/continue-8b.md says of machines and of the config that `import` writes is so."""

import re

import pytest
from support.documents import commands
from support.paths import CONFIGS, ROOT

from llada_jax.cluster.hardware import machines_named
from llada_jax.config import load_config
from llada_jax.hf.starting_config import NAME, starting_config
from llada_jax.models.transformer import Architecture
from llada_jax.validation import knob, knobs
from llada_jax.verbs.plan import Asked, estimate

PAGE = (ROOT / "docs" / "continue-8b.md").read_text()
ROWS = re.findall(
    r"^\| `(\S+)` \| `(.+?)` \| ([\d.]+) of ([\d.]+) GiB \| ([\d.]+) to ([\d.]+) days \|$",
    PAGE,
    flags=re.MULTILINE,
)


(IMPORT,) = [words for words in commands(PAGE) if words[0] == "import"]
(TRAIN,) = [words for words in commands(PAGE) if words[0] == "train"]


def value_of(words: list[str], flag: str) -> str:
    return words[words.index(flag) + 1]


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> str:
    """The config that the page's import writes, whose network is that of LLaDA-8B."""
    model = load_config(str(CONFIGS / "llada_8b.py")).model
    architecture = Architecture(**{name: model[name] for name in Architecture.__dataclass_fields__})
    source, output = value_of(IMPORT, "--from"), value_of(IMPORT, "--output")
    file = tmp_path_factory.mktemp("imported") / NAME
    file.write_text(starting_config(architecture, source=source, output=output, has_tokenizer=True))
    return str(file)


def test_the_table_is_found():
    assert len(ROWS) >= 5


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_a_row_is_what_plan_says_of_either_config(row, written):
    name, of_table, *numbers = row
    peak, usable, fast, slow = map(float, numbers)
    asked = ["num_tokens=1e10", *of_table.split()]
    for file, changes in ((CONFIGS / "llada_8b.py", ["data.batch_size=256"]), (written, [])):
        config = load_config(str(file), [*asked, *changes])
        report = estimate(Asked(config, machines_named(name), 1, config.model.vocab_size))
        assert report["memory"]["peak"] / 2**30 == pytest.approx(peak, abs=0.06)
        assert report["usable_bytes"] / 2**30 == pytest.approx(usable, abs=0.06)
        assert report["days"]["fast"] == pytest.approx(fast, abs=0.06)
        assert report["days"]["slow"] == pytest.approx(slow, abs=0.06)
        assert peak < usable


def test_the_run_is_that_of_the_config_which_import_writes(written):
    assert value_of(TRAIN, "--config") == f"{value_of(IMPORT, '--output')}/{NAME}"
    prefix = "--config."
    overrides = [word.removeprefix(prefix) for word in TRAIN if word.startswith(prefix)]
    alone, run = (load_config(written, words) for words in (["data.path=x"], overrides))
    changed = {path for path in knobs(run) if knob(run, path) != knob(alone, path)}
    assert changed == {"data.path", "num_tokens", "optimizer.gradient_accumulation"}
    # that of the table
    (of_table,) = [row[1] for row in ROWS if row[0] == "8xh100"]
    assert {word for word in overrides if word.startswith("optimizer.")} <= set(of_table.split())
    estimates = re.findall(r"accumulation a step is estimated to need ([\d.]+) of ([\d.]+)", PAGE)
    ((peak, usable),) = [map(float, pair) for pair in estimates]
    report = estimate(Asked(alone, machines_named("8xh100"), 1, alone.model.vocab_size))
    assert report["memory"]["peak"] / 2**30 == pytest.approx(peak, abs=0.06)
    assert report["usable_bytes"] / 2**30 == pytest.approx(usable, abs=0.06)


def test_the_page_states_the_schedule_and_the_batch_of_that_config(written):
    config = load_config(written, ["data.path=x"])
    schedule = config.schedule
    (proposed,) = re.findall(r"^\| (\S+) \| [^|]*; what continue\.py proposes \|$", PAGE, re.M)
    assert schedule.learning_rate == float(proposed)
    ((warmup, name),) = re.findall(
        r"continue\.py takes (\d+) steps to the peak, and the last tenth of the steps falls "
        r"linearly to a tenth of it \(`(\w+)`\)",
        PAGE,
    )
    assert (schedule.warmup_steps, schedule.name) == (int(warmup), name)
    assert schedule.final_learning_rate == pytest.approx(schedule.learning_rate / 10)
    assert (schedule.decay_fraction, schedule.decay_shape) == (0.1, "linear")
    ((rows, remat),) = re.findall(r"continue\.py, which has (\d+) rows and `(\S+)` already", PAGE)
    assert config.data.batch_size == int(rows)
    assert f"model.remat={config.model.remat}" == remat


def test_the_table_of_steps_is_right():
    rows = re.findall(r"^\| (\d+) billion \| ([\d,]+) \|$", PAGE, flags=re.MULTILINE)
    assert rows
    for billions, steps in rows:
        assert round(int(billions) * 1e9 / (256 * 4096)) == pytest.approx(
            int(steps.replace(",", "")), abs=1
        )

"""The config files of the repository load, are valid, and say how they are run."""

import ast
import re
import runpy
import sys

import pytest
from support.configs import CONFIGS, PATHS, check
from support.errors import error_of

from llada_jax.config import load_config, parse_sources
from llada_jax.models.transformer import Architecture
from llada_jax.training.optim import make_optimizer, make_schedule
from llada_jax.training.step import optimizer_knobs
from llada_jax.validation import knobs


def test_there_are_the_published_and_the_small_configs():
    assert {"tiny", "debug", "llada_160m", "llada_1b", "llada_8b"} <= {
        path.stem for path in CONFIGS
    }


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_loads_is_valid_and_says_how_to_run_it(path):
    config = load_config(str(path))
    check(config)
    assert sorted(knobs(config)) == sorted(PATHS)
    assert config.data.batch_size >= 1
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    if "make demo" in docstring:  # then the commands stand in the Makefile
        makefile = (path.parent.parent / "Makefile").read_text()
        docstring += makefile.replace(
            "$(RUN)", re.search(r"^RUN := (.*)$", makefile, flags=re.MULTILINE).group(1)
        )
    verb = "sweep" if "sweep" in runpy.run_path(str(path)) else "train"
    assert f"{verb} --config configs/{path.name}" in docstring
    data = parse_sources(config.data.path)[0][0] if config.data.path else "--config.data.path="
    assert data in docstring, "the docstring says where the data come from"
    for prepared in re.findall(r"--sequence-length (\d+)", docstring):
        assert int(prepared) == config.data.sequence_length


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_builds_its_schedule_optimizer_and_architecture(path):
    config = load_config(str(path))
    B, T = config.data.batch_size, config.data.sequence_length
    num_steps = config.num_steps or max(1, config.num_tokens // (B * T))
    assert num_steps >= 1
    schedule = make_schedule(**config.schedule, num_steps=num_steps, tokens_per_step=B * T)
    first, middle, last = (float(schedule(step)) for step in (0, num_steps // 2, num_steps - 1))
    assert 0 < first <= middle
    assert 0 <= last <= middle
    make_optimizer(schedule, **optimizer_knobs(config.optimizer))
    fields = {name: config.model[name] for name in Architecture.__dataclass_fields__}
    Architecture(**{**fields, "vocab_size": fields["vocab_size"] or 260})


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_call_of_get_config_gives_a_config_of_its_own(path):
    get_config = runpy.run_path(str(path))["get_config"]
    first, second = get_config(), get_config()
    first.data.batch_size += 1
    assert second.data.batch_size == first.data.batch_size - 1


NEIGHBOUR = "from base import get_config as base\n\ndef get_config():\n    from late import SEED\n"


def test_a_config_imports_its_own_neighbours_and_not_those_of_another(tmp_path):
    for folder, seed in (("one", 3), ("two", 5)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "base.py").write_text(CONFIGS[0].read_text())
        (tmp_path / folder / "late.py").write_text(f"SEED = {seed}\n")
        (tmp_path / folder / "child.py").write_text(
            NEIGHBOUR + "    config = base()\n    config.seed = SEED\n    return config\n"
        )
    before = list(sys.path)
    seeds = [load_config(str(tmp_path / name / "child.py")).seed for name in ("one", "two")]
    assert seeds == [3, 5]
    assert sys.path == before


def test_a_config_that_exits_is_a_mistake_and_not_a_status(tmp_path):
    (tmp_path / "exits.py").write_text("import sys\nsys.exit(3)\n")
    assert "SystemExit: 3" in error_of(load_config, str(tmp_path / "exits.py"))


def test_knobs_that_hold_a_path_know_the_home_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = load_config(str(CONFIGS[0]), ["checkpoint.restore=~/run@3"])
    assert config.checkpoint.restore == f"{tmp_path}/run@3"

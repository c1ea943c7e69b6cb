"""The config files of the repository load, are valid, and say how they are run."""

import ast
import re
import runpy

import pytest
from support.configs import CONFIGS, PATHS

from llada_jax.config import (
    knobs,
    load_config,
    parse_sources,
    validate,
)
from llada_jax.models.transformer import Architecture
from llada_jax.training.optim import make_optimizer, make_schedule
from llada_jax.training.step import optimizer_knobs


def test_there_are_the_published_and_the_small_configs():
    assert {"tiny", "debug", "llada_160m", "llada_1b", "llada_8b"} <= {
        path.stem for path in CONFIGS
    }


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_loads_is_valid_and_says_how_to_run_it(path):
    config = load_config(str(path))
    validate(config)
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

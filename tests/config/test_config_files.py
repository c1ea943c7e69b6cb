"""The config files of the repository load, are valid, and say how they are run."""

import ast
import json
import re
import runpy
import sys

import pytest
from ml_collections import ConfigDict
from support.configs import CONFIGS, PATHS, check
from support.errors import error_of

from llada_jax.config import completed, load_config, parse_sources
from llada_jax.models.transformer import Architecture
from llada_jax.training.optim import make_optimizer, make_schedule
from llada_jax.training.step import optimizer_knobs
from llada_jax.validation import knob, knobs

FILE = """
from ml_collections import config_dict
from llada_jax.config import default_config

def get_config():
    config = default_config()
    config.num_steps = 4
    {line}
    return config
"""


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
    if "make demo" in docstring:  # then the commands are in the Makefile
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


# Copied from the sources: config.json of GSAI-ML/LLaDA-8B-Base for the network of 8B, table 5 of
# arXiv 2502.09992 for that of 1B, and its section 2.2 and appendix B.2 for the recipe of both. The
# betas, the epsilon and the clipping are those of SMDM (arXiv 2410.18514), by the same authors.
NETWORKS = {
    "llada_8b": {
        "num_layers": 32,
        "d_model": 4096,
        "num_heads": 32,
        "num_kv_heads": 32,
        "head_dim": 128,
        "d_ff": 12288,
    },
    "llada_1b": {
        "num_layers": 22,
        "d_model": 2048,
        "num_heads": 32,
        "num_kv_heads": 4,
        "head_dim": 64,
        "d_ff": 5634,
    },
}
OF_BOTH = {
    "data.batch_size": 1280,
    "data.sequence_length": 4096,
    "data.random_length_probability": 0.01,
    "data.attend_across_documents": True,
    "model.vocab_size": 126464,
    "model.rope_theta": 500000.0,
    "model.rope_scaling": (),
    "model.norm_eps": 1e-5,
    "model.tie_embeddings": False,
    "model.qk_norm": "none",
    "model.attention_bias": "none",
    "model.output_shift": False,
    "objective.name": "masked_diffusion",
    "objective.eps": 1e-3,
    "objective.t_sampling": "iid",
    "objective.masking": "bernoulli",
    "objective.weight": "1/p",
    "optimizer.name": "adamw",
    "optimizer.weight_decay": 0.1,
    "optimizer.b1": 0.9,
    "optimizer.b2": 0.95,
    "optimizer.eps": 1e-8,
    "optimizer.clip_norm": 1.0,
    "optimizer.ema_decay": 0.0,
    "schedule.name": "llada",
    "schedule.warmup_steps": 2000,
}


# Appendix B.1 of the same paper: 4.5 M dialogues, three epochs, batches of 256 with two rows per
# device. Answers and the end-of-text that pads them are masked and weighted by 1/p, and the loss of
# a row is divided by the length of its answer.
FINE_TUNED = {
    "num_steps": 52_734,
    "data.batch_size": 256,
    "data.random_length_probability": 0.0,
    "data.attend_across_documents": True,
    "data.eos_padding": 2,
    "data.padding_cycle": (),
    "objective.name": "sft",
    "objective.masked": "answers",
    "objective.mean_over": "answers",
    "objective.max_mask_ratio": 1.0,
    "objective.complementary": False,
    "objective.prompt_dropout": 0.0,
    "schedule.name": "wsd",
    "schedule.warmup_steps": 50,
    "lora.rank": 0,
}


def published_knobs(name: str) -> dict:
    if name == "sft_llada_8b":
        return published_knobs("llada_8b") | FINE_TUNED
    return OF_BOTH | {f"model.{key}": value for key, value in NETWORKS[name].items()}


@pytest.mark.parametrize("name", [*NETWORKS, "sft_llada_8b"])
def test_the_knobs_of_the_published_recipes_are_those_of_their_sources(name):
    (path,) = [path for path in CONFIGS if path.stem == name]
    config, published = load_config(str(path)), published_knobs(name)
    assert {key: knob(config, key) for key in published} == published


def test_the_published_fine_tuning_has_the_rates_of_the_paper():
    """Appendix B.1: 0 to 2.5e-5 in 50 steps, 2.5e-5, and linearly to 2.5e-6 in the last 10%."""
    (path,) = [path for path in CONFIGS if path.stem == "sft_llada_8b"]
    config, num_steps = load_config(str(path)), 52_734
    assert num_steps == round(3 * 4.5e6 / 256)
    rate = make_schedule(**config.schedule, num_steps=num_steps, tokens_per_step=256 * 4096)
    for step, published in (
        (24, 1.25e-5),  # the 25th step
        (50, 2.5e-5),
        (0.9 * num_steps, 2.5e-5),
        (0.95 * num_steps, 1.375e-5),
        (num_steps, 2.5e-6),
    ):
        assert float(rate(int(step))) == pytest.approx(published, rel=2e-3), step


def test_the_published_schedule_has_the_rates_of_the_paper():
    """Section 2.2: 0 to 4e-4 in 2000 steps, 4e-4 until 1.2T tokens, 1e-4 for 0.8T tokens, and
    linearly to 1e-5 in the last 0.3T.
    """
    (path,) = [path for path in CONFIGS if path.stem == "llada_8b"]
    config, tokens = load_config(str(path)), 1280 * 4096
    assert config.num_tokens == 2.3e12
    num_steps = config.num_tokens // tokens
    rate = make_schedule(**config.schedule, num_steps=num_steps, tokens_per_step=tokens)
    for step, published in (
        (1000, 2e-4),
        (2000, 4e-4),
        (1.19e12 // tokens, 4e-4),
        (1.21e12 // tokens, 1e-4),
        (1.99e12 // tokens, 1e-4),
        (2.15e12 // tokens, 5.5e-5),
        (num_steps, 1e-5),
    ):
        assert float(rate(int(step))) == pytest.approx(published, rel=2e-3), step


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


def test_a_config_from_json_has_tuples_and_floats_again():
    config = load_config(str(CONFIGS[0]))
    config.model.rope_theta = 10_000.0
    content = json.loads(json.dumps(config.to_dict()))
    content["model"]["rope_theta"] = 10_000
    again = completed(ConfigDict(content), values={})
    assert {name: knob(again, name) for name in knobs(again)} == {
        name: knob(config, name) for name in knobs(config)
    }
    assert type(again.model.rope_theta) is float
    assert type(again.schedule.stages[0]) is tuple


def test_knobs_that_hold_a_path_know_the_home_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = load_config(str(CONFIGS[0]), ["checkpoint.restore=~/run@3"])
    assert config.checkpoint.restore == f"{tmp_path}/run@3"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("config.num_steps = None", "config.num_steps=None is not of type int; the default is 0"),
        ("config.data.path = None", "config.data.path=None is not of type str"),
        ("config.model.num_layers = True", "config.model.num_layers=True is not of type int"),
        (
            "config.seed = config_dict.required_placeholder(int)",
            "A required placeholder in get_config() of",
        ),
        ("config.unlock(); config.extra = 3", "config.extra is not a knob"),
        (
            "config.unlock(); del config.data.path",
            "There is no knob 'data.path' in get_config() of",
        ),
        ("del config.data.path", "locked"),
        ("open('/nowhere')", "No such file or directory: '/nowhere'; fix it there"),
        ("assert config is None", "AssertionError; fix it there"),
        (
            "config.lora.update({'rank': 2, 'targets': 'a{99999999999}'})",
            "not a regular expression",
        ),
        ("config.schedule.stages = ((float('nan'), 1e-3, 1e-3),)", "growing token counts"),
        (
            "config.objective.update({'name': 'a:b', 'arguments': (('f', max),)})",
            "cannot be kept in run.json",
        ),
        (
            "config.objective.update({'name': 'a:b', 'arguments': (('f', float('nan')),)})",
            "cannot be kept in run.json",
        ),
    ],
)
def test_a_line_that_cannot_be_used_ends_in_a_sentence(tmp_path, line, said):
    file = tmp_path / "config.py"
    file.write_text(FILE.format(line=line))
    assert said in error_of(load_config, str(file))


def test_a_frozen_config_is_as_good_as_another(tmp_path):
    file = tmp_path / "config.py"
    file.write_text(FILE.format(line="config = config_dict.FrozenConfigDict(config)"))
    assert load_config(str(file), ["seed=3"]).seed == 3

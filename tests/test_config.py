"""The config: what an override may say, which knobs exist, and that every choice it offers is one
that the code takes.
"""

import ast
import math
import re
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict
from support.paths import ROOT

from llada_jax import config
from llada_jax.config import (
    AT_LEAST,
    AUTO,
    CHOICES,
    apply_override,
    default_config,
    knob,
    knobs,
    load_config,
    parse_sources,
    validate,
)
from llada_jax.errors import UserError
from llada_jax.masks import BIDIRECTIONAL, CAUSAL
from llada_jax.models.attention import IMPLEMENTATIONS, choose
from llada_jax.models.model import compute_dtype, make_model
from llada_jax.models.transformer import REMAT_POLICIES, Architecture
from llada_jax.objectives import corruption
from llada_jax.objectives.masked_diffusion import masked_diffusion_loss
from llada_jax.objectives.named import make_objective
from llada_jax.training.optim import OPTIMIZERS, make_optimizer, make_schedule
from llada_jax.training.step import optimizer_knobs

patient = settings(
    deadline=None, suppress_health_check=[HealthCheck.too_slow]
)  # the machine may be busy

CONFIGS = sorted((ROOT / "configs").glob("*.py"))
DEFAULT = default_config()
PATHS = knobs(DEFAULT)

NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
VALUES = {
    bool: st.booleans(),
    int: st.integers(-(10**12), 10**12),
    float: NUMBERS,
    str: st.text(),
    tuple: st.lists(st.one_of(NUMBERS, st.text(), st.tuples(st.text(), NUMBERS)), max_size=3).map(
        tuple
    ),
}


def valid(**changes) -> ConfigDict:
    """A valid config with knobs changed: valid(**{"data.batch_size": 3})."""
    config = default_config()
    config.num_steps = 10
    for path, value in changes.items():
        *groups, key = path.split(".")
        node = config
        for group in groups:
            node = node[group]
        node[key] = value
    return config


# ---- the overrides


def written(value) -> str:
    return value if isinstance(value, str) else repr(value)


@patient
@given(st.data())
def test_an_override_reads_back_what_python_writes(data):
    path = data.draw(st.sampled_from(PATHS))
    kind = type(knob(DEFAULT, path))
    value = data.draw(VALUES[kind])
    config = default_config()
    apply_override(config, f"{path}={written(value)}")
    assert type(knob(config, path)) is kind
    assert knob(config, path) == value
    for other in PATHS:
        assert other == path or knob(config, other) == knob(DEFAULT, other)


@patient
@given(st.sampled_from(PATHS), st.text())
@example("num_steps", "{[]}")
@example("num_steps", "{1: [], []: 2}")
@example("num_steps", "(" * 300)
@example("num_steps", "9" * 5000)
@example("samples.prompts", "-" * 5000 + "1")
@example("model.tie_embeddings", "1")
@example("num_steps", "True")
@example("schedule.learning_rate", "0x10")
def test_any_text_gives_a_value_of_the_type_of_the_default_or_a_user_error(path, text):
    config = default_config()
    kind = type(knob(DEFAULT, path))
    try:
        apply_override(config, f"{path}={text}")
    except UserError as error:
        assert path in str(error)  # noqa: PT017
        assert kind.__name__ in str(error)  # noqa: PT017
        assert knob(config, path) == knob(DEFAULT, path)
    else:
        assert type(knob(config, path)) is kind


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("num_tokens=2.3e12", 2_300_000_000_000),  # how people write a token count
        ("num_tokens=1_000", 1000),
        ("schedule.learning_rate=1", 1.0),
        ("schedule.learning_rate=3e-4", 3e-4),
        ("model.tie_embeddings=true", True),
        ("model.tie_embeddings=False", False),
        ("data.path=a=0.7,b=0.3", "a=0.7,b=0.3"),
        ("data.path=", ""),
        ("objective.weight=none", "none"),
        ("log.compilation_cache=123", "123"),
        ("samples.prompts=['Once', 'It is']", ("Once", "It is")),
        ("schedule.stages=((1e9, 1e-3, 1e-4),)", ((1e9, 1e-3, 1e-4),)),
        ("model.rope_scaling=(8.0, 1.0, 4.0, 8192.0)", (8.0, 1.0, 4.0, 8192.0)),
        ("model.rope_scaling=[]", ()),
        (
            "optimizer.learning_rate_multipliers=(('embed', 2), ('.*', 1))",
            (("embed", 2), (".*", 1)),
        ),
    ],
)
def test_overrides_as_people_write_them(override, value):
    config = default_config()
    apply_override(config, override)
    result = knob(config, override.partition("=")[0])
    assert result == value
    assert type(result) is type(value)


@patient
@given(st.sampled_from(PATHS), st.data())
def test_a_misspelt_knob_names_the_one_that_was_meant(path, data):
    group, dot, key = path.rpartition(".")
    i = data.draw(st.integers(0, max(0, len(key) - 2)))
    typo = f"{group}{dot}{key[:i]}{key[i + 1 :]}"  # a letter is left out
    if typo in PATHS or len(key) < 4:
        return
    with pytest.raises(UserError, match=re.escape(f"no knob {typo!r}. Did you mean ")):
        apply_override(default_config(), f"{typo}=1")


def test_overrides_are_applied_in_order_and_reach_the_validated_config(tmp_path):
    file = tmp_path / "c.py"
    file.write_text("from llada_jax.config import default_config as get_config\n")
    config = load_config(str(file), ["num_steps=5", "seed=1", "seed=2"])
    assert (config.num_steps, config.seed) == (5, 2)
    with pytest.raises(UserError, match="exactly one"):
        load_config(str(file), [])


# ---- the validation


def test_the_defaults_are_valid_once_the_length_of_the_run_is_given():
    validate(valid())
    validate(valid(**{"num_steps": 0, "num_tokens": 1000}))


@pytest.mark.parametrize(
    ("num_steps", "num_tokens"), [(0, 0), (5, 5), (-5, 100), (100, -5), (-1, -1), (-5, 0)]
)
def test_exactly_one_of_steps_and_tokens_says_how_long_to_train(num_steps, num_tokens):
    with pytest.raises(UserError, match="num_steps|num_tokens"):
        validate(valid(**{"num_steps": num_steps, "num_tokens": num_tokens}))


@pytest.mark.parametrize("path", AT_LEAST)
def test_every_lower_bound_is_of_a_knob_and_is_exact(path):
    least = AT_LEAST[path]
    kind = type(knob(DEFAULT, path))
    assert knob(DEFAULT, path) >= least
    changes = {"num_steps": 0, "num_tokens": 10} if path == "num_steps" else {}
    changes |= {"model.num_kv_heads": 1} if path == "model.num_heads" else {}
    validate(valid(**{**changes, path: kind(least)}))
    with pytest.raises(
        UserError, match=re.escape(f"config.{path}={kind(least - 1)} must be at least {least}")
    ):
        validate(valid(**{**changes, path: kind(least - 1)}))


def test_no_count_or_interval_may_be_negative():
    """Every integer knob has a lower bound but the axes of the mesh, where -1 means the rest."""
    integers = [
        path for path in PATHS if type(knob(DEFAULT, path)) is int and not path.startswith("mesh.")
    ]
    accepted = []
    for path in integers:
        try:
            validate(valid(**{path: -1}))
        except UserError:
            continue
        accepted.append(path)
    assert accepted == []


@pytest.mark.parametrize("path", [path for path in PATHS if type(knob(DEFAULT, path)) is float])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_no_number_may_be_infinite(path, value):
    with pytest.raises(UserError, match=re.escape(f"config.{path}={value}")):
        validate(valid(**{path: value}))


@pytest.mark.parametrize("path", CHOICES)
def test_every_choice_is_valid_and_a_typo_names_it(path):
    assert knob(DEFAULT, path) in CHOICES[path]
    for choice in CHOICES[path]:
        validate(valid(**{path: choice}))
        if len(choice) > 4:
            with pytest.raises(
                UserError,
                match=re.escape(f"config.{path}=") + ".*" + re.escape(f"mean {choice!r}?"),
            ):
                validate(valid(**{path: choice[:-1]}))


# ---- the choices are what the code takes


def test_the_choices_of_tables_are_the_keys_of_the_tables():
    assert set(CHOICES["optimizer.name"]) == set(OPTIMIZERS)
    assert set(CHOICES["model.attention"]) == {AUTO, *IMPLEMENTATIONS}
    assert set(CHOICES["model.remat"]) == {"none", *REMAT_POLICIES}


def test_every_knob_that_lists_words_in_its_comment_has_those_choices():
    """`# a | b` above a knob in default_config is what CHOICES holds, so that the file that people
    read is right.
    """
    source = Path(config.__file__).read_text()
    listed = {}
    for comment, path in re.findall(r"\n +# (.*\|.*)\n +config\.([\w.]+) = ", source):
        if True:
            (clause,) = (
                part for part in re.split("[:;]", re.sub(r"\([^)]*\)", "", comment)) if "|" in part
            )
            listed[path] = {word.split()[0] for word in clause.split("|")}
    assert set(listed) == set(CHOICES)
    for path, words in listed.items():
        assert words == set(CHOICES[path]) - {AUTO}, path


def schedule_knobs(**changes) -> dict:
    return {**DEFAULT.schedule, "warmup_steps": 0, **changes}


@pytest.mark.parametrize("name", CHOICES["schedule.name"])
@pytest.mark.parametrize("shape", CHOICES["schedule.decay_shape"])
def test_every_schedule_gives_positive_rates(name, shape):
    schedule = make_schedule(
        **schedule_knobs(name=name, decay_shape=shape), num_steps=100, tokens_per_step=1 << 20
    )
    rates = np.array([schedule(step) for step in range(100)])
    assert (rates > 0).all()
    assert rates.max() <= 4e-4 * (1 + 1e-6)


def test_the_decay_shapes_differ():
    rates = [
        make_schedule(
            **schedule_knobs(name="wsd", decay_shape=shape), num_steps=100, tokens_per_step=1
        )(95)
        for shape in CHOICES["schedule.decay_shape"]
    ]
    assert len(set(map(float, rates))) == len(rates)


def test_an_unknown_schedule_or_decay_shape_is_refused_by_make_schedule_too():
    with pytest.raises(UserError, match="schedule 'wds'"):
        make_schedule(**schedule_knobs(name="wds"), num_steps=10, tokens_per_step=1)


class Ids:
    mask_id, bos_id = 3, 1


@pytest.mark.parametrize("name", CHOICES["objective.name"])
def test_every_objective_trains_and_has_a_bound(name):
    knobs = valid(**{"objective.name": name}).objective
    objective = make_objective(Ids(), **knobs)
    assert callable(objective.loss)
    assert callable(objective.bound)
    assert objective.bound_name == {"masked_diffusion": "nelbo", "autoregressive": "nll"}[name]
    assert objective.mask == {"masked_diffusion": BIDIRECTIONAL, "autoregressive": CAUSAL}[name]


@pytest.mark.parametrize("t_sampling", CHOICES["objective.t_sampling"])
@pytest.mark.parametrize("masking", CHOICES["objective.masking"])
@pytest.mark.parametrize("weight", CHOICES["objective.weight"])
def test_every_way_to_corrupt_and_to_weigh_is_taken(t_sampling, masking, weight):
    B, T = 4, 8
    batch = {name: jnp.ones((B, T), jnp.int32) for name in ("tokens", "segment_ids", "positions")}
    batch["is_maskable"] = jnp.ones((B, T), bool)

    class Scores:
        nll_BT = None
        is_correct_BT = jnp.zeros((B, T), bool)

    def nll_fn(params, noisy_BT, targets_BT, where_BT, segment_ids_BT, positions_BT):
        scores = Scores()
        scores.nll_BT = where_BT.astype(jnp.float32)  # one nat a masked token
        return scores

    loss_sum, count, metrics = masked_diffusion_loss(
        nll_fn,
        {},
        batch,
        jax.random.key(0),
        jnp.arange(B),
        num_rows=B,
        mask_id=3,
        t_sampling=t_sampling,
        masking=masking,
        weight=weight,
    )
    assert count == B * T
    num_masked = metrics["masked_accuracy"][1]
    assert 0 < num_masked <= B * T
    if weight == "none":
        assert loss_sum == num_masked
    else:
        assert loss_sum == metrics["nelbo"][0]
        assert loss_sum >= num_masked


def test_the_two_ways_to_draw_t_differ_and_a_third_is_no_silent_default():
    rows = jnp.arange(4)
    drawn = [
        corruption.sample_t(jax.random.key(0), rows, num_rows=4, t_sampling=how)
        for how in ("stratified", "iid")
    ]
    assert not np.array_equal(*drawn)
    with pytest.raises(AssertionError, match="antithetic"):
        corruption.sample_t(jax.random.key(0), rows, num_rows=4, t_sampling="antithetic")


@pytest.mark.parametrize("name", CHOICES["optimizer.name"])
def test_every_optimizer_takes_a_step(name):
    knobs = optimizer_knobs(valid(**{"optimizer.name": name}).optimizer)
    # The paths are the model's own: muon tells matrices of the blocks from the rest by their names.
    params = make_model(architecture()).init(jax.random.key(0))
    optimizer = make_optimizer(lambda step: 1e-3, **knobs)
    gradients = jax.tree.map(jnp.ones_like, params)
    updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    for update, param in zip(jax.tree.leaves(updates), jax.tree.leaves(params)):
        assert update.shape == param.shape
        assert np.isfinite(update).all()
        assert (
            np.asarray(update) < 0
        ).mean() > 0.5  # downhill, but for what the decay of a large weight outweighs


def architecture(**changes) -> Architecture:
    sizes = {
        "vocab_size": 64,
        "num_layers": 1,
        "d_model": 16,
        "num_heads": 2,
        "num_kv_heads": 2,
        "head_dim": 8,
        "d_ff": 16,
    }
    return Architecture(**{**sizes, **changes})


def logits(**kwargs) -> np.ndarray:
    changes = {"qk_norm": kwargs.pop("qk_norm", "none")}
    model = make_model(architecture(**changes), **kwargs)
    tokens_BT = jnp.arange(8)[None] % 5
    positions_BT = jnp.arange(8)[None]
    params = model.init(jax.random.key(0))
    return np.asarray(
        jax.jit(model.logits_fn)(params, tokens_BT, jnp.ones_like(tokens_BT), positions_BT),
        np.float32,
    )


def test_every_qk_norm_and_remat_policy_computes():
    plain = logits()
    for remat in CHOICES["model.remat"]:
        np.testing.assert_allclose(logits(remat=remat), plain, atol=1e-5)
    results = [logits(qk_norm=how) for how in CHOICES["model.qk_norm"]]
    assert all(result.shape == plain.shape for result in results)
    assert not np.allclose(results[0], results[1])


def test_every_dtype_is_one_and_auto_depends_on_the_platform():
    for name in CHOICES["model.dtype"]:
        for platform in ("cpu", "gpu", "tpu"):
            dtype = compute_dtype(name, platform)
            expected = ("float32" if platform == "cpu" else "bfloat16") if name == AUTO else name
            assert dtype == jnp.dtype(expected)


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("sequence_length", [16, 128, 4096])
def test_auto_attention_is_an_implementation(platform, packed, sequence_length):
    for name in CHOICES["model.dtype"]:
        chosen = choose(
            AUTO,
            platform=platform,
            packed=packed,
            sequence_length=sequence_length,
            head_dim=64,
            dtype=compute_dtype(name, platform),
        )
        assert chosen in IMPLEMENTATIONS


# ---- the config files


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


# ---- the sources

DIRECTORIES = st.text(
    st.characters(blacklist_characters=",=", blacklist_categories=("Cs", "Z", "Cc")), min_size=1
)
WEIGHTS = st.floats(min_value=1e-6, max_value=1e6)


@patient
@given(st.lists(st.tuples(DIRECTORIES, WEIGHTS), min_size=1))
def test_a_mixture_reads_back_as_written(sources):
    path = ",".join(f"{directory}={weight!r}" for directory, weight in sources)
    assert parse_sources(path) == tuple(sources)


@patient
@given(DIRECTORIES)
def test_one_directory_needs_no_weight(directory):
    assert parse_sources(directory) == ((directory, 1.0),)


@pytest.mark.parametrize(
    ("path", "sources"),
    [
        ("a, b", (("a", 1.0), ("b", 1.0))),
        ("runs/x=1/data=0.5", (("runs/x=1/data", 0.5),)),
        ("a=2,b", (("a", 2.0), ("b", 1.0))),
        ("a=.5,b=1e-1", (("a", 0.5), ("b", 0.1))),
    ],
)
def test_sources_as_people_write_them(path, sources):
    assert parse_sources(path) == sources


@pytest.mark.parametrize("path", ["", "a=", "a=half", "a=1,", ",", "=0.5", "a,,b", " "])
def test_a_mixture_with_a_hole_is_refused(path):
    with pytest.raises(UserError, match="config.data.path"):
        parse_sources(path)

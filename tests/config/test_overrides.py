"""What an override on the command line may say, and how it is read."""

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from support.configs import DEFAULT, PATHS

from llada_jax.config import apply_override, default_config, load_config
from llada_jax.errors import UserError
from llada_jax.validation import knob

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


def written(value) -> str:
    return value if isinstance(value, str) else repr(value)


@pytest.mark.slow
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


def test_the_arguments_of_a_file_are_for_the_part_that_it_names(tmp_path):
    file = tmp_path / "c.py"
    file.write_text(
        "from llada_jax.config import default_config\n"
        "def get_config():\n"
        "    config = default_config()\n"
        "    config.num_steps = 5\n"
        "    config.objective.name = 'own:objective'\n"
        "    config.objective.arguments = (('margin', 0.1),)\n"
        "    return config\n"
    )
    assert load_config(str(file)).objective.arguments == (("margin", 0.1),)
    control = load_config(str(file), ["objective.name=masked_diffusion"])
    assert control.objective.arguments == ()

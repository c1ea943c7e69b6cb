"""Which values a config may have, and which of them contradict each other."""

import math
import re
import sys

import pytest
from support.configs import DEFAULT, PATHS, check, valid

from llada_jax.config import learning_rate_knob, load_config, own_parts
from llada_jax.errors import UserError
from llada_jax.ranges import RANGES, check_ranges
from llada_jax.validation import CHOICES, OWN_PARTS, knob


def test_the_defaults_are_valid_once_the_length_of_the_run_is_given():
    check(valid())
    check(valid(**{"num_steps": 0, "num_tokens": 1000}))


@pytest.mark.parametrize(
    ("num_steps", "num_tokens"), [(0, 0), (5, 5), (-5, 100), (100, -5), (-1, -1), (-5, 0)]
)
def test_exactly_one_of_steps_and_tokens_says_how_long_to_train(num_steps, num_tokens):
    with pytest.raises(UserError, match="num_steps|num_tokens"):
        check(valid(**{"num_steps": num_steps, "num_tokens": num_tokens}))


# What a knob needs next to it, so that something reads it.
READERS = {
    "schedule.learning_rate": {"schedule.name": "constant"},
    "schedule.final_learning_rate": {"schedule.name": "cosine"},
    "schedule.decay_fraction": {"schedule.name": "wsd"},
    "schedule.decay_shape": {"schedule.name": "wsd"},
    "evaluation.weights": {"optimizer.ema_decay": 0.9},
    "objective.masked": {"objective.name": "sft"},
    "objective.mean_over": {"objective.name": "sft"},
    "objective.prompt_dropout": {"objective.name": "sft"},
    "objective.beta": {"objective.name": "vrpo"},
    "objective.num_times": {"objective.name": "vrpo"},
    "objective.masks_per_time": {"objective.name": "vrpo"},
    "lora.alpha": {"lora.rank": 8},
    "lora.frozen_dtype": {"lora.rank": 8},
    "checkpoint.init_from_weights": {"checkpoint.init_from": "runs/base"},
}


def changes_for(path: str) -> dict:
    """What else has to change so that a knob may have any value of its range."""
    return {
        "num_steps": {"num_steps": 0, "num_tokens": 10},
        "num_tokens": {"num_steps": 5},
        "model.num_heads": {"model.num_kv_heads": 1},
        "checkpoint.local_every_steps": {"checkpoint.local_directory": "/dev/shm/x"},
        **READERS,
    }.get(path, {})


def test_every_number_has_a_range():
    numbers = {path for path in PATHS if type(knob(DEFAULT, path)) in (int, float)}
    assert numbers == set(RANGES)


@pytest.mark.parametrize("path", RANGES)
def test_every_range_holds_the_default_and_its_ends_are_exact(path):
    low, high, above, below = RANGES[path]
    kind = type(knob(DEFAULT, path))
    assert RANGES[path].holds(knob(DEFAULT, path))

    def step(value, direction):
        return value + direction if kind is int else math.nextafter(value, math.inf * direction)

    # the open ends are 0 and 1, and next to them lie numbers of float32
    inside = [2.0**-126 if above else kind(low)]
    outside = [kind(low) if above else step(kind(low), -1)]
    if high < math.inf:
        inside.append(1 - 2.0**-24 if below else kind(high))
        outside.append(kind(high) if below else step(kind(high), 1))
    for value in inside:
        check_ranges({path: value})
    for value in outside:
        with pytest.raises(UserError, match=re.escape(f"config.{path}={value} must ")):
            check(valid(**{**changes_for(path), path: value}))


@pytest.mark.parametrize(
    ("path", "value", "rounded"),
    [
        ("optimizer.b2", 0.99999999, "1"),
        ("optimizer.eps", 1e-50, "0"),
        ("optimizer.eps", 1e-40, "0"),  # a subnormal number, which CPUs and accelerators take for 0
        ("model.rope_theta", 1e300, "inf"),
    ],
)
def test_a_number_that_float32_rounds_out_of_its_range_is_refused(path, value, rounded):
    with pytest.raises(
        UserError, match=re.escape(f"config.{path}={value} is {rounded} in float32")
    ):
        check(valid(**{path: value}))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("optimizer.b1", 2.0),
        ("optimizer.b2", 1.0),
        ("optimizer.eps", -1.0),
        ("optimizer.eps", 0.0),
        ("model.rope_theta", 0.0),
        ("model.norm_eps", -1e-5),
        ("model.d_model", 10**12),
        ("model.num_layers", 10**9),
        ("data.batch_size", 10**15),
        ("num_steps", 2**31),
        ("schedule.final_learning_rate", -1e-4),
        ("samples.temperature", -0.5),
        ("samples.temperature", 1e39),
        ("samples.prompts", ("", "\udc80")),
        ("optimizer.weight_decay_multipliers", ((".*", -1.0),)),
        ("optimizer.learning_rate_multipliers", ((".*", math.inf),)),
        ("optimizer.learning_rate_multipliers", (("(", 1.0),)),
        ("schedule.stages", ((1e9, -1e-4, 1e-4),)),
        ("schedule.stages", ((1e9, 1e-4, math.nan),)),
    ],
)
def test_a_value_that_can_mean_nothing_is_refused_by_name(path, value):
    with pytest.raises(UserError, match=re.escape(f"config.{path}")):
        check(valid(**{path: value}))


@pytest.mark.parametrize(
    ("changes", "array"),
    [
        ({"model.d_model": 2**24, "model.vocab_size": 2**24}, "the embedding"),
        (
            {"model.d_model": 2**20, "model.num_heads": 2**12, "model.head_dim": 2**12},
            "the projections of attention",
        ),
        ({"model.d_model": 2**24, "model.d_ff": 2**24}, "the feed-forward layers"),
        ({"data.batch_size": 2**24, "data.sequence_length": 2**24}, "a batch"),
        ({"data.sequence_length": 2**23, "data.batch_size": 2**20}, "the attention of a batch"),
    ],
)
def test_sizes_that_are_in_their_ranges_and_together_fit_no_machine_are_refused(changes, array):
    with pytest.raises(UserError, match=f"elements of {array}, and no machine holds"):
        check(valid(**changes))


def test_the_largest_networks_of_today_are_far_from_the_limits():
    """A dense network of 10^13 parameters and a batch of 10^9 tokens."""
    check(
        valid(
            **{
                "model.num_layers": 256,
                "model.d_model": 2**16,
                "model.num_heads": 512,
                "model.num_kv_heads": 512,
                "model.head_dim": 128,
                "model.d_ff": 2**18,
                "model.vocab_size": 2**18,
                "data.batch_size": 2**14,
                "data.sequence_length": 2**16,
            }
        )
    )


def test_no_count_or_interval_may_be_negative():
    """Every integer knob has a lower bound but the axes of the mesh, where -1 means the rest."""
    integers = [
        path for path in PATHS if type(knob(DEFAULT, path)) is int and not path.startswith("mesh.")
    ]
    accepted = []
    for path in integers:
        try:
            check(valid(**{path: -1}))
        except UserError:
            continue
        accepted.append(path)
    assert accepted == []


@pytest.mark.parametrize("path", [path for path in PATHS if type(knob(DEFAULT, path)) is float])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_no_number_may_be_infinite(path, value):
    with pytest.raises(UserError, match=re.escape(f"config.{path}={value}")):
        check(valid(**{path: value}))


@pytest.mark.parametrize("path", CHOICES)
def test_every_choice_is_valid_and_a_typo_names_it(path):
    assert knob(DEFAULT, path) in CHOICES[path]
    for choice in CHOICES[path]:
        check(valid(**{**READERS.get(path, {}), path: choice}))
        if len(choice) > 4:
            with pytest.raises(
                UserError,
                match=re.escape(f"config.{path}=") + ".*" + re.escape(f"mean {choice!r}?"),
            ):
                check(valid(**{path: choice[:-1]}))


# ---- parts of the user's own


@pytest.mark.parametrize("path", OWN_PARTS)
def test_a_part_of_the_users_own_is_a_choice_and_takes_arguments(path):
    group = path.partition(".")[0]
    config = valid(**{path: "my.parts:Made.here", f"{group}.arguments": (("margin", 0.1),)})
    check(config)
    assert own_parts(config) == {path: "my.parts:Made.here"}
    assert own_parts(valid()) == {}


@pytest.mark.parametrize("name", ["parts:", ":made", "parts:made:twice", "my parts:made", ":"])
def test_a_name_that_is_not_module_and_attribute_is_refused(name):
    with pytest.raises(UserError, match="is not known.*named module:attribute"):
        check(valid(**{"schedule.name": name}))


@pytest.mark.parametrize(
    "arguments", [("margin",), (("margin",),), (("mar gin", 1),), ((1, 2),), ("ab",)]
)
def test_arguments_are_pairs_of_a_name_and_a_value(arguments):
    with pytest.raises(UserError, match=r"objective.arguments=.* must be \(\(name, value\), ...\)"):
        check(valid(**{"objective.name": "m:f", "objective.arguments": arguments}))


def test_arguments_next_to_a_part_of_ours_are_refused():
    with pytest.raises(UserError, match=r"optimizer.arguments=.* 'adamw' is ours"):
        check(valid(**{"optimizer.arguments": (("b3", 0.5),)}))


def test_only_a_config_with_own_parts_makes_its_directory_importable(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    file = tmp_path / "c.py"
    file.write_text("from llada_jax.config import default_config as get_config\n")
    load_config(str(file), ["num_steps=5"])
    assert str(tmp_path) not in sys.path
    load_config(str(file), ["num_steps=5", "schedule.name=mine:rate"])
    assert sys.path[-1] == str(tmp_path)


# ---- knobs that the chosen part does not read

UNREAD = [
    ("schedule.name", "llada", "schedule.learning_rate", 1e-3),
    ("schedule.name", "cosine", "schedule.stages", ((1e9, 1e-3, 1e-3),)),
    ("schedule.name", "constant", "schedule.decay_shape", "1-sqrt"),
    ("schedule.name", "my:rate", "schedule.decay_fraction", 0.5),
    ("optimizer.name", "lion", "optimizer.eps", 1e-6),
    ("objective.name", "autoregressive", "objective.t_sampling", "iid"),
    ("objective.name", "my:loss", "objective.eps", 0.01),
]


@pytest.mark.parametrize(("part", "name", "path", "value"), UNREAD)
def test_a_changed_knob_that_the_chosen_part_does_not_read_is_refused(part, name, path, value):
    check(valid(**{part: name}))
    with pytest.raises(UserError, match=rf"config\.{path}=.* changes nothing: .* reads "):
        check(valid(**{part: name, path: value}))


def test_the_refusal_names_the_knobs_that_are_read():
    with pytest.raises(UserError, match=r"schedule.name='wsd' reads learning_rate, .*decay_shape;"):
        check(valid(**{"schedule.name": "wsd", "schedule.stages": ((1e9, 1e-3, 1e-3),)}))


def test_an_override_that_chooses_another_part_drops_what_the_file_set_for_its_own(tmp_path):
    file = tmp_path / "c.py"
    file.write_text(
        "from llada_jax.config import default_config\n\n\ndef get_config():\n"
        "    config = default_config()\n    config.num_steps = 5\n"
        "    config.schedule.name = 'wsd'\n    config.schedule.decay_fraction = 0.5\n"
        "    config.schedule.learning_rate = 0.1\n    return config\n"
    )
    schedule = load_config(str(file), ["schedule.name=constant"]).schedule
    assert (schedule.learning_rate, schedule.decay_fraction) == (
        0.1,
        DEFAULT.schedule.decay_fraction,
    )
    with pytest.raises(UserError, match="decay_fraction=0.3 changes nothing"):
        load_config(str(file), ["schedule.name=constant", "schedule.decay_fraction=0.3"])


def test_the_knob_to_lower_is_the_one_that_the_schedule_reads():
    assert learning_rate_knob(valid()) == "the rates in config.schedule.stages"
    assert learning_rate_knob(valid(**{"schedule.name": "wsd"})) == "config.schedule.learning_rate"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"objective.complementary": True},
            "needs config.objective.masking='bernoulli'",
        ),
        ({"num_steps": 0, "num_tokens": 10**15}, "and a run has at most 2147483647"),
        ({"objective.eps": 0.0}, re.escape("must lie in (0, 1)")),
        ({"objective.t_sampling": "bell", "objective.bell_width": 0.08}, "must be at least 0.1"),
        ({"optimizer.name": "muon", "lora.rank": 4}, "would train the adapters with Adam alone"),
        ({"objective.bell_width": 0.3}, "changes nothing, because config.objective.t_sampling="),
        ({"objective.name": "sft", "objective.t_sampling": "bell"}, "is for masked_diffusion"),
        ({"objective.name": "sft", "objective.complementary": True}, "max_mask_ratio below 1"),
        (
            {
                "objective.name": "sft",
                "objective.prompt_dropout": 0.1,
                "objective.masked": "documents",
            },
            "masks them already",
        ),
        ({"objective.name": "sft", "data.split_probability": 0.3}, "part answers from"),
        ({"objective.name": "vrpo", "data.split_probability": 0.3}, "part answers from"),
        ({"data.padding_cycle": (5, 6)}, "changes nothing, because config.data.eos_padding=0"),
        ({"data.length_buckets": (64, 32)}, "ascending"),
        ({"data.length_buckets": (4096,)}, "below config.data.sequence_length"),
        ({"data.length_buckets": (1.5,)}, "ascending whole numbers"),
        ({"data.padding_cycle": ("a",), "data.eos_padding": 2}, "must be ids"),
        ({"objective.beta": 0.2}, "changes nothing"),
        ({"lora.alpha": 64.0}, "changes nothing, because config.lora.rank=0; set rank"),
        ({"lora.targets": "blocks/"}, "changes nothing, because config.lora.rank=0"),
        ({"lora.frozen_dtype": "int8"}, "changes nothing, because config.lora.rank=0"),
        ({"checkpoint.init_from_weights": "raw"}, "because config.checkpoint.init_from=''"),
        ({"objective.name": "sft", "objective.num_times": 2}, "changes nothing"),
        ({"objective.name": "vrpo", "objective.mean_over": "tokens"}, "changes nothing"),
    ],
)
def test_knobs_of_fine_tuning_that_do_not_fit_together_are_refused(changes, says):
    with pytest.raises(UserError, match=says):
        check(valid(**changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"objective.complementary": True, "objective.weight": "none"},
        {"objective.complementary": True, "objective.max_mask_ratio": 0.9},
        {"objective.masked": "documents", "data.split_probability": 0.3},
        {"data.padding_cycle": (5, 6), "data.eos_padding": 2},
        {"lora.alpha": 64.0, "lora.targets": "blocks/", "lora.rank": 8},
        {"checkpoint.init_from_weights": "raw", "checkpoint.init_from": "runs/base"},
    ],
)
def test_knobs_of_fine_tuning_that_fit_together_are_accepted(changes):
    check(valid(**{"objective.name": "sft", **changes}))

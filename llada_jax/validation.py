"""What makes a set of knobs impossible: unknown names, values out of range, knobs that contradict
each other, and knobs that the chosen part does not read.

The defaults are an argument, because llada_jax.config, which holds them, calls this module.

This is the one place outside of llada_jax.objectives that asks for an objective by its name: a
config is checked before any objective exists, and these rules are about knobs that only the
objectives of the package read. What runs asks the Objective record instead.
"""

import json
import math
import re
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict, FrozenConfigDict
from ml_collections.config_dict import RequiredValueError

from llada_jax.errors import UserError, did_you_mean
from llada_jax.parts import is_own
from llada_jax.ranges import MAX_STEPS, check_ranges, check_sizes

# The value of a knob that the run decides by itself.
AUTO = "auto"
# The value of config.log.tracker without one.
NO_TRACKER = "none"

CHOICES = {
    "model.qk_norm": ("none", "full", "per_head"),
    "model.attention_bias": ("none", "qkv", "qkvo"),
    "model.dtype": (AUTO, "bfloat16", "float32"),
    "model.attention": (AUTO, "xla", "xla_by_head", "splash", "cudnn", "triton"),
    "model.remat": (AUTO, "none", "dots", "attention", "full"),
    "objective.name": ("masked_diffusion", "sft", "vrpo", "autoregressive"),
    "objective.t_sampling": ("stratified", "mirrored", "iid", "bell"),
    "objective.masking": ("bernoulli", "exact_count"),
    "objective.weight": ("1/p", "none"),
    "objective.masked": ("answers", "documents"),
    "objective.mean_over": ("answers", "tokens"),
    "lora.frozen_dtype": ("float32", "bfloat16", "int8"),
    "optimizer.name": ("adamw", "lion", "muon"),
    "optimizer.gradient_dtype": ("compute", "float32"),
    "optimizer.first_moment_dtype": ("float32", "bfloat16"),
    "schedule.name": ("llada", "wsd", "cosine", "constant"),
    "evaluation.weights": (AUTO, "raw", "ema"),
    "checkpoint.init_from_weights": (AUTO, "raw", "ema"),
    "schedule.decay_shape": ("linear", "1-sqrt"),
    "log.tracker": (NO_TRACKER, "wandb", "trackio"),
}


# Knobs that may also name a part of the user's own, as module:attribute.
OWN_PARTS = ("objective.name", "optimizer.name", "schedule.name")


# Which of the knobs next to its name a part reads; "own": a part of the user's own. Knobs of the
# group that no part lists, such as clip_norm, are read whatever the part is.
READ_BY = {
    "objective": {
        "masked_diffusion": (
            "eps",
            "t_sampling",
            "bell_width",
            "masking",
            "weight",
            "complementary",
        ),
        "sft": (
            "eps",
            "t_sampling",
            "weight",
            "masked",
            "mean_over",
            "max_mask_ratio",
            "complementary",
            "prompt_dropout",
        ),
        "vrpo": (
            "eps",
            "t_sampling",
            "masking",
            "beta",
            "num_times",
            "masks_per_time",
            "shared_draws",
        ),
        "autoregressive": (),
        "own": (),
    },
    "optimizer": {
        "adamw": ("b1", "b2", "eps", "first_moment_dtype"),
        "lion": ("b1", "b2", "first_moment_dtype"),
        "muon": ("b1", "b2", "eps", "first_moment_dtype"),
        "own": ("b1", "b2", "eps"),
    },
    "schedule": {
        "llada": ("stages",),
        "wsd": ("learning_rate", "final_learning_rate", "decay_fraction", "decay_shape"),
        "cosine": ("learning_rate", "final_learning_rate"),
        "constant": ("learning_rate",),
        "own": ("learning_rate", "final_learning_rate"),
    },
}


# Knobs that do nothing while another one has a certain value: (that one, whether it lets them act,
# what to do about it). Those that only watch a run (samples, profiles) are not here: they are set
# once and switched on and off.
_ADAPTERS = ("lora.rank", bool, "set rank for adapters")
SWITCHED_BY: dict[str, tuple[str, Callable[[Any], bool], str]] = {
    "lora.alpha": _ADAPTERS,
    "lora.targets": _ADAPTERS,
    "lora.frozen_dtype": _ADAPTERS,
    "checkpoint.init_from_weights": ("checkpoint.init_from", bool, "name a run in init_from"),
    "data.padding_cycle": ("data.eos_padding", bool, "set eos_padding, which fills rows up"),
    "objective.bell_width": (
        "objective.t_sampling",
        lambda name: name == "bell",
        "set t_sampling to bell",
    ),
}


def resolved(config: ConfigDict, defaults: ConfigDict, *, origin: str) -> ConfigDict:
    """Returns a copy without references, in which each knob has a value of the type of its default.

    A ConfigDict takes None for any knob, a bool for an int, and new knobs once it is unlocked; one
    that was made from the run.json of a run has lists for tuples.

    Args:
        origin: of the config, for messages.

    Raises:
        UserError: a knob is missing, does not exist, has no value, or one of another type.
    """
    if isinstance(config, FrozenConfigDict):
        config = config.as_configdict()
    try:
        config = config.copy_and_resolve_references()
    except RequiredValueError as error:
        raise UserError(
            f"A required placeholder in {origin} has no value; set the knob that holds it."
        ) from error
    known, found = knobs(defaults), set(knobs(config))
    if lost := [path for path in known if path not in found]:
        raise UserError(
            f"There is no knob {lost[0]!r} in {origin}, which must start from default_config()."
        )
    if unknown := sorted(found - set(known)):
        raise UserError(
            f"config.{unknown[0]} is not a knob, and nothing reads it; correct the name, or leave "
            "it out."
        )
    completed = defaults.copy_and_resolve_references()
    for path in known:
        default = knob(defaults, path)
        value = _from_json(knob(config, path), default)
        is_of_type = isinstance(value, type(default)) and isinstance(value, bool) == isinstance(
            default, bool
        )
        if not is_of_type:
            raise UserError(
                f"config.{path}={value!r} is not of type {type(default).__name__}; the default is "
                f"{default!r}."
            )
        completed.update_from_flattened_dict({path: value})
    return completed


def _from_json(value: Any, default: Any) -> Any:
    """Returns a value as Python has it, where JSON has another type for that of `default`."""
    if isinstance(default, float) and type(value) is int:
        return float(value)
    if isinstance(default, tuple) and isinstance(value, (list, tuple)):
        return tuple(_from_json(item, ()) for item in value)
    return value


def validate(config: ConfigDict, defaults: ConfigDict) -> None:
    """Raises UserError for a value that a knob cannot have, and for knobs that contradict each
    other.

    What depends on the devices, the data or the objective is checked where these are known
    (llada_jax.training.step.make_recipe).
    """
    check_choices(config)
    for path in OWN_PARTS:
        check_arguments(config, path)
    values = {path: knob(config, path) for path in knobs(config)}
    check_ranges(values)
    check_sizes(values)
    check_read(config, defaults)
    check_switches(config, defaults)
    check_tables(config)
    check_contradictions(config, defaults)


def check_choices(config: ConfigDict) -> None:
    """Raises UserError for a name that is not among the choices of its knob."""
    for path, choices in CHOICES.items():
        value = knob(config, path)
        if path in OWN_PARTS and re.fullmatch(r"[\w.]+:[\w.]+", value):
            continue
        if value not in choices:
            own = " A part of your own is named module:attribute." if path in OWN_PARTS else ""
            raise UserError(
                f"config.{path}={value!r} is not known.{did_you_mean(value, choices)}{own}"
            )


def check_read(config: ConfigDict, defaults: ConfigDict) -> None:
    """Raises UserError for a changed knob that the chosen part does not read."""
    for group, parts in READ_BY.items():
        name = config[group].name
        read = parts["own" if is_own(name) else name]
        for key in unread(config, defaults, group):
            raise UserError(
                f"config.{group}.{key}={config[group][key]!r} changes nothing: "
                f"{group}.name={name!r} reads {', '.join(read) or 'none of the knobs next to it'}; "
                f"set {key} back to {defaults[group][key]!r}, or choose another {group} that "
                "reads it."
            )


def check_switches(config: ConfigDict, defaults: ConfigDict) -> None:
    """Raises UserError for a changed knob that another one switches off: a sweep over it would
    train the same run again and again.
    """
    for path, (switch, is_on, remedy) in SWITCHED_BY.items():
        value, default = (_plain(knob(of, path)) for of in (config, defaults))
        if value != default and not is_on(knob(config, switch)):
            raise UserError(
                f"config.{path}={value!r} changes nothing, because config.{switch}="
                f"{knob(config, switch)!r}; {remedy}, or set {path} back to {default!r}."
            )


def check_contradictions(config: ConfigDict, defaults: ConfigDict) -> None:
    """Raises UserError for knobs that are possible one by one and not together."""
    if (config.num_steps > 0) == (config.num_tokens > 0):
        raise UserError(
            f"config.num_steps={config.num_steps} and config.num_tokens={config.num_tokens}: "
            "set exactly one of them above 0 to say how long to train."
        )
    if (num_steps := num_steps_of(config)) > MAX_STEPS:
        raise UserError(
            f"config.num_tokens={config.num_tokens} takes {num_steps} steps of batch_size * "
            f"sequence_length tokens, and a run has at most {MAX_STEPS}; lower it, or raise "
            "config.data.batch_size."
        )
    model = config.model
    if model.num_heads % model.num_kv_heads:
        raise UserError(
            f"config.model.num_heads={model.num_heads} must be a multiple of "
            f"num_kv_heads={model.num_kv_heads}; set num_kv_heads to a divisor of it."
        )
    if model.head_dim % 2:
        raise UserError(
            f"config.model.head_dim={model.head_dim} must be even: rotary embeddings turn pairs."
        )
    if config.data.batch_size % config.optimizer.gradient_accumulation:
        raise UserError(
            f"config.data.batch_size={config.data.batch_size} must be a multiple of "
            f"config.optimizer.gradient_accumulation={config.optimizer.gradient_accumulation}; "
            "change one of them."
        )
    objective = config.objective
    if objective.eps >= objective.max_mask_ratio:
        raise UserError(
            f"config.objective.eps={objective.eps} and config.objective.max_mask_ratio="
            f"{objective.max_mask_ratio}: the mask ratio runs from the first to the second, which "
            "must be larger."
        )
    if config.optimizer.name == "muon" and config.lora.rank:
        raise UserError(
            f"config.optimizer.name='muon' is for the matrices that config.lora.rank="
            f"{config.lora.rank} freezes, and would train the adapters with Adam alone; choose "
            "adamw or lion."
        )
    if objective.t_sampling == "bell" and objective.name != "masked_diffusion":
        raise UserError(
            "config.objective.t_sampling='bell' is for masked_diffusion, and "
            f"config.objective.name={objective.name!r}; choose stratified or iid."
        )
    if objective.t_sampling == "mirrored" and objective.name == "vrpo":
        raise UserError(
            "config.objective.t_sampling='mirrored' is for masked_diffusion and sft, and "
            "config.objective.name='vrpo' draws the times of an answer; choose stratified or iid."
        )
    if (
        objective.complementary
        and objective.name == "masked_diffusion"
        and (objective.masking, objective.weight) != ("bernoulli", "none")
    ):
        raise UserError(
            "config.objective.complementary=True needs config.objective.masking='bernoulli' and "
            f"config.objective.weight='none' for text, not {objective.masking!r} and "
            f"{objective.weight!r}: a row whose complement is masked almost whole has few masks, "
            "and their weight no bound."
        )
    if objective.complementary and objective.weight == "1/p" and objective.max_mask_ratio == 1:
        raise UserError(
            "config.objective.complementary=True with config.objective.max_mask_ratio=1.0: where "
            "all is masked the complement is masked with probability 0, and weight='1/p' has no "
            "value; set max_mask_ratio below 1, or weight to none."
        )
    is_prompt_clean = objective.name == "sft" and objective.masked == "answers"
    if objective.prompt_dropout and not is_prompt_clean:
        raise UserError(
            f"config.objective.prompt_dropout={objective.prompt_dropout} hides prompts that are "
            "clean otherwise, and config.objective.masked='documents' masks them already; set one "
            "of them back."
        )
    data = config.data
    if data.split_probability and (is_prompt_clean or objective.name == "vrpo"):
        raise UserError(
            f"config.data.split_probability={data.split_probability} would part answers from their "
            "prompts; it is for text, and for config.objective.masked='documents'."
        )
    buckets = [1, *data.length_buckets, data.sequence_length]
    if not all(type(length) is int for length in buckets) or not all(
        shorter < longer for shorter, longer in zip(buckets, buckets[1:])
    ):
        raise UserError(
            f"config.data.length_buckets={data.length_buckets} must be ascending whole numbers "
            f"above 1 and below config.data.sequence_length={data.sequence_length}."
        )
    if not all(type(token) is int for token in data.padding_cycle):
        raise UserError(
            f"config.data.padding_cycle={data.padding_cycle} must be ids of tokens, as in (5, 6)."
        )
    check_regex("config.lora.targets", config.lora.targets)
    if config.evaluation.weights == "ema" and not config.optimizer.ema_decay:
        raise UserError(
            "config.evaluation.weights='ema' needs a moving average and "
            "config.optimizer.ema_decay=0 keeps none; set ema_decay, or weights to auto or raw."
        )
    prompts = config.samples.prompts
    if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise UserError(
            f"config.samples.prompts={prompts} must be one text or more; ('',) samples "
            "without a prompt."
        )
    if re.search("[\ud800-\udfff]", "".join(prompts)):
        raise UserError(
            f"config.samples.prompts={prompts!a} holds half of a surrogate pair, which is not "
            "Unicode text; leave it out."
        )
    checkpoint = config.checkpoint
    if bool(checkpoint.local_directory) != bool(checkpoint.local_every_steps):
        raise UserError(
            f"config.checkpoint.local_directory={checkpoint.local_directory!r} and "
            f"config.checkpoint.local_every_steps={checkpoint.local_every_steps}: set both for "
            "copies on local disks, or neither."
        )
    if "://" in checkpoint.local_directory:
        raise UserError(
            f"config.checkpoint.local_directory={checkpoint.local_directory!r} must be on a disk "
            "of this host, such as /dev/shm/llada_jax; what is remote goes into --workdir."
        )
    if config.checkpoint.restore and config.checkpoint.init_from:
        raise UserError(
            "config.checkpoint.restore and config.checkpoint.init_from are both set; restore "
            "continues a whole run, and init_from takes only its weights: keep one."
        )


def check_tables(config: ConfigDict) -> None:
    """Raises UserError for a table in the config whose rows do not have their form."""
    schedule = config.schedule
    ends = [stage[0] for stage in schedule.stages if _is_row(stage, (float, float, float))]
    if (
        not ends
        or len(ends) < len(schedule.stages)
        or not all(a < b for a, b in zip([0, *ends], ends))  # NaN grows nowhere
    ):
        raise UserError(
            f"config.schedule.stages={schedule.stages} must be ((until_tokens, first rate, last "
            "rate), ...) with growing token counts."
        )
    for group in ("weight_decay_multipliers", "learning_rate_multipliers"):
        rules = config.optimizer[group]
        if not all(_is_row(rule, (str, float)) for rule in rules):
            raise UserError(
                f"config.optimizer.{group}={rules} must be ((regex, factor), ...), as in (('.*', "
                "1.0),)."
            )
        for regex, factor in rules:
            check_rule(f"config.optimizer.{group}", regex, factor)
    for _, *rates in schedule.stages:
        if any(not 0 <= rate < math.inf for rate in rates):
            raise UserError(
                f"config.schedule.stages={schedule.stages} holds a rate that is negative or not "
                "finite; learning rates are 0 or more."
            )


def unread(config: ConfigDict, defaults: ConfigDict, group: str) -> list[str]:
    """Returns the knobs of a group of READ_BY that differ from the defaults and that the part which
    the group names does not read.
    """
    parts = READ_BY[group]
    name = config[group].name
    if not is_own(name) and name not in parts:
        # the name is misspelt, which `validate` says
        return []
    read = parts["own" if is_own(name) else name]
    of_some_part = [key for key in defaults[group] if any(key in keys for keys in parts.values())]
    return [
        key
        for key in of_some_part
        if key not in read and _plain(config[group][key]) != _plain(defaults[group][key])
    ]


def _plain(value):
    """Returns a value in which lists and tuples compare as equal."""
    return tuple(map(_plain, value)) if isinstance(value, list | tuple) else value


def check_arguments(config: ConfigDict, path: str) -> None:
    """Raises UserError unless the arguments next to a name are ((name, value), ...), and only an
    own part has any.
    """
    name = knob(config, path)
    path = path.rpartition(".")[0] + ".arguments"
    arguments = knob(config, path)
    if not all(
        isinstance(pair, tuple | list)
        and len(pair) == 2
        and isinstance(pair[0], str)
        and pair[0].isidentifier()
        for pair in arguments
    ):
        raise UserError(
            f"config.{path}={arguments} must be ((name, value), ...), as in (('margin', 0.1),)."
        )
    try:
        # not NaN, which is never equal to what a continued run reads there
        json.dumps(arguments, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"config.{path}={arguments} cannot be kept in run.json ({error}); give numbers, texts, "
            "True, False, None, and tuples of these."
        ) from error
    if arguments and not is_own(name):
        raise UserError(
            f"config.{path}={arguments} is for a part of your own, and {name!r} is ours: it is set "
            "by the knobs next to it; leave the arguments empty."
        )


def check_rule(path: str, regex: str, factor: float) -> None:
    """Raises UserError for a row (regex, factor) of a table of multipliers that cannot be meant."""
    check_regex(path, regex)
    if not 0 <= factor < math.inf:
        raise UserError(
            f"{path}: the factor {factor} of {regex!r} must be 0 or more and finite; a negative "
            "one would make the loss grow."
        )


def check_regex(path: str, regex: str) -> None:
    """Raises UserError for a text that is not a regular expression."""
    try:
        re.compile(regex)
    # OverflowError: of a repetition number
    except (re.error, OverflowError, RecursionError) as error:
        raise UserError(
            f"{path}: {regex!r} is not a regular expression ({error}); correct it."
        ) from error


def _is_row(row, kinds: tuple[type, ...]) -> bool:
    """Returns whether a row of a table in the config has entries of these types; an int may stand
    for a float.
    """
    accepted = {float: (int, float), str: (str,)}
    return (
        isinstance(row, tuple | list)
        and len(row) == len(kinds)
        and all(type(entry) in accepted[kind] for entry, kind in zip(row, kinds))
    )


def knobs(config: ConfigDict, prefix: str = "") -> list[str]:
    """Returns the dotted path of every knob."""
    paths = []
    for key, value in config.items():
        paths += (
            knobs(value, f"{prefix}{key}.") if isinstance(value, ConfigDict) else [f"{prefix}{key}"]
        )
    return paths


def knob(config: ConfigDict, path: str):
    """Returns the value at a dotted path."""
    for key in path.split("."):
        config = config[key]
    return config


def num_steps_of(config: ConfigDict) -> int:
    """Returns config.num_steps, or the whole steps that fit into config.num_tokens, at least 1."""
    tokens_per_step = config.data.batch_size * config.data.sequence_length
    return config.num_steps or max(1, config.num_tokens // tokens_per_step)

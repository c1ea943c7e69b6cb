"""The range of every number in the config, and of numbers that flags and functions share.

A bound is where a value stops to mean anything, not where it stops to be wise: a size above its
bound fits no machine, and would end in a traceback or in a hang instead of a sentence.
"""

import math
from typing import NamedTuple

import numpy as np

from llada_jax.errors import UserError


class Range(NamedTuple):
    """From least to most; `above` leaves out the lower end, `below` the upper one."""

    least: float
    most: float = math.inf
    above: bool = False
    below: bool = False

    def holds(self, value: float) -> bool:
        low = value > self.least if self.above else value >= self.least
        return low and (value < self.most if self.below else value <= self.most)

    def refusal(self, value: float) -> str:
        """Returns what is wrong with a value, as the end of a sentence."""
        if self.above or self.below or self.most <= 1:
            opening, closing = "(["[not self.above], ")]"[not self.below]
            return f"must lie in {opening}{self.least:g}, {self.most:g}{closing}."
        if value < self.least:
            return f"must be at least {self.least}."
        return f"must be at most {self.most}."


# Steps are counted in int32, on the devices and in checkpoints.
MAX_STEPS = 2**31 - 1
# Of one dimension of an array: the largest networks have some 2**18.
MAX_SIZE = 2**24
# Seconds and numbers of threads, which the system takes as C's int.
MAX_INT = 2**31 - 1

ANY = Range(-math.inf)
SIZE = Range(1, MAX_SIZE)
SIZE_OR_NONE = Range(0, MAX_SIZE)
SEED = Range(0, 2**32 - 1)
# Corruptions that are drawn for a row: the error falls with the root of their number, and 128 are
# usual.
DRAWS = Range(1, 2**16)
# Temperatures, and strengths of guidance: far beyond it float32 logits overflow, and the token that
# is proposed may be the mask, which is then proposed forever.
STRENGTH = Range(0, 1e6)
_STEPS = Range(0, MAX_STEPS)
_FROM_ONE = Range(1, MAX_STEPS)

RANGES = {
    "seed": SEED,
    "num_steps": _STEPS,
    "num_tokens": Range(0, 2**63 - 1),
    "data.batch_size": SIZE,
    "data.sequence_length": Range(2, MAX_SIZE),
    "data.random_length_probability": Range(0, 1),
    "data.eos_padding": Range(0, MAX_SIZE),
    "data.split_probability": Range(0, 1),
    "data.num_threads": Range(1, 2**12),
    "data.prefetch": Range(1, 2**16),
    "model.vocab_size": Range(0, MAX_SIZE),
    "model.num_layers": Range(1, 2**16),
    "model.d_model": SIZE,
    "model.num_heads": Range(1, 2**16),
    "model.num_kv_heads": Range(1, 2**16),
    "model.head_dim": Range(2, 2**16),
    "model.d_ff": SIZE,
    "model.rope_theta": Range(0, above=True),
    "model.norm_eps": Range(0, 1, above=True),
    "model.nll_chunk": SIZE,
    # without a floor, a time of 0 has the weight 1/0
    "objective.eps": Range(0, 1, above=True, below=True),
    # a narrower bell would never draw the extremes of t, whatever their weight
    "objective.bell_width": Range(0.1, 10),
    "objective.max_mask_ratio": Range(0, 1, above=True),
    "objective.prompt_dropout": Range(0, 1),
    "objective.beta": Range(0, above=True),
    "objective.num_times": Range(1, 2**16),
    "objective.masks_per_time": Range(1, 2**16),
    "lora.rank": Range(0, 2**16),
    "lora.alpha": Range(0, above=True),
    "optimizer.b1": Range(0, 1, below=True),
    "optimizer.b2": Range(0, 1, below=True),
    # without it an element whose gradient was always zero is 0/0
    "optimizer.eps": Range(0, 1, above=True),
    "optimizer.weight_decay": Range(0),
    "optimizer.clip_norm": Range(0),
    "optimizer.ema_decay": Range(0, 1, below=True),
    "optimizer.max_skipped_updates": _STEPS,
    "optimizer.gradient_accumulation": SIZE,
    "schedule.learning_rate": Range(0),
    "schedule.final_learning_rate": Range(0),
    "schedule.warmup_steps": _STEPS,
    "schedule.decay_fraction": Range(0, 1, above=True),
    # one axis may be -1, the devices that are left
    "mesh.data": Range(-1, 2**20),
    "mesh.fsdp": Range(-1, 2**20),
    "mesh.sequence": Range(-1, 2**20),
    "mesh.tensor": Range(-1, 2**20),
    "mesh.expert": Range(-1, 2**20),
    "distributed.initialization_timeout_s": Range(1, MAX_INT // 1000),
    "distributed.heartbeat_timeout_s": Range(1, MAX_INT // 1000),
    "distributed.step_timeout_s": Range(0, MAX_INT // 1000),
    "evaluation.every_steps": _STEPS,
    "evaluation.num_batches": _STEPS,
    "evaluation.final_num_batches": _STEPS,
    "samples.every_steps": _STEPS,
    "samples.gen_length": SIZE,
    "samples.steps": SIZE,
    "samples.block_length": SIZE,
    "samples.temperature": STRENGTH,
    "checkpoint.every_steps": _FROM_ONE,
    "checkpoint.keep": _FROM_ONE,
    "checkpoint.keep_every_steps": _STEPS,
    "checkpoint.local_every_steps": _STEPS,
    "log.every_steps": _FROM_ONE,
    "log.profile_at_step": _STEPS,
    "log.profile_num_steps": _FROM_ONE,
}


def check_ranges(values: dict[str, float]) -> None:
    """Raises UserError for the first of {dotted path of a knob: value} that lies out of its range.

    A number without a range must still be finite.
    """
    for path, value in values.items():
        if path in RANGES or isinstance(value, float):
            check_number(f"config.{path}=", value, RANGES.get(path, ANY))


def check_number(name: str, value: float, allowed: Range) -> None:
    """Raises UserError for a number that is not finite or lies out of its range, as it is or once
    devices round it to float32: b2=0.99999999 is 1 there, and Adam divides by 1 - b2.

    Args:
        name: of the number, as the message is to begin, such as "--steps " or "gen_length=".
    """
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{name}{value} must be a finite number.")
    if not allowed.holds(value):
        raise UserError(f"{name}{value} {allowed.refusal(value)}")
    if isinstance(value, float) and not holds_rounded(allowed, rounded := in_float32(value)):
        raise UserError(
            f"{name}{value} is {rounded:g} in float32, in which it is computed; give a number that "
            "float32 tells apart from it."
        )


def in_float32(value: float) -> float:
    """Returns a number rounded to float32, in which subnormal numbers count as 0."""
    with np.errstate(over="ignore"):
        rounded = np.float32(value)
    return 0.0 if abs(rounded) < np.finfo(np.float32).tiny else float(rounded)


def holds_rounded(allowed: Range, rounded: float) -> bool:
    """Whether a number from a range stays finite and off the open ends once it is rounded; onto an
    end that belongs to the range it may round.
    """
    is_open_end = allowed.above and rounded == allowed.least
    is_open_end |= allowed.below and rounded == allowed.most
    return math.isfinite(rounded) and not is_open_end


# Elements of an array that a run keeps: 70 TB in float32, a tenth of the memory of the largest pods
MAX_KEPT = 2**44
# Elements of an array that a run computes, of which devices may hold a part at a time. XLA counts
# them in int64 and ends the process where that overflows.
MAX_COMPUTED = 2**60

_HEADS = ("model.num_heads", "model.head_dim")
_ROWS = ("data.batch_size", "data.sequence_length")

# Each array as the sizes of its dimensions, knobs by their dotted path.
ARRAYS = {
    "the embedding": (MAX_KEPT, ("model.vocab_size", "model.d_model")),
    "the projections of attention": (MAX_KEPT, ("model.num_layers", "model.d_model", *_HEADS)),
    "the feed-forward layers": (MAX_KEPT, ("model.num_layers", "model.d_model", "model.d_ff")),
    "a batch": (MAX_KEPT, _ROWS),
    "the hidden states of a batch": (MAX_COMPUTED, (*_ROWS, "model.d_model")),
    "the logits of a batch": (MAX_COMPUTED, (*_ROWS, "model.vocab_size")),
    "the attention of a batch": (
        MAX_COMPUTED,
        (*_ROWS, "data.sequence_length", "model.num_heads"),
    ),
}


def check_sizes(values: dict[str, float]) -> None:
    """Raises UserError for the first array of ARRAYS that no machine can hold.

    Each size may be in its range and their product not.
    """
    for name, (most, paths) in ARRAYS.items():
        sizes = [values[path] for path in paths]
        if math.prod(sizes) > most:
            product = " * ".join(f"config.{path}={values[path]}" for path in paths)
            raise UserError(
                f"{product} are {math.prod(sizes):.1e} elements of {name}, and no machine holds "
                f"more than {most:.1e}; lower one of them."
            )

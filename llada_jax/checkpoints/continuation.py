"""Which runs may continue a checkpoint, and which may start from its weights."""

import dataclasses
import json
import re

from llada_jax.checkpoints.record import RunRecord
from llada_jax.data.tokenizer import Tokenizer
from llada_jax.errors import UserError

# The knobs from which the order of the data, the noise, or the layout of the optimizer's state
# follow. Others, such as the learning rate, may change between two starts of a run: that is how
# runs are steered, and the metrics show it. So may the mesh and the number of hosts, because
# neither data nor noise depends on them.
DECISIVE = (
    "seed",
    "data.batch_size",
    "data.sequence_length",
    "data.random_length_probability",
    "data.attend_across_documents",
    "optimizer.name",
    "objective.name",
)


def check_fits(theirs: RunRecord, ours: RunRecord, directory) -> None:
    """Raises UserError when a checkpoint is of another architecture or tokenizer."""
    check_same(
        f"The checkpoint in {directory} is of another architecture",
        vars(ours.architecture),
        # what an older version did not write has its default
        vars(theirs.architecture),
        remedy="set config.model to match it, or choose another --workdir",
    )
    check_same(
        f"The checkpoint in {directory} was trained with another tokenizer",
        vars(ours.tokenizer),
        vars(theirs.tokenizer),
        remedy=(
            "use data prepared with its tokenizer (WORKDIR/tokenizer), or choose another --workdir"
        ),
    )


def check_initialises(
    theirs: RunRecord, ours: RunRecord, directory, *, tokenizers: tuple[Tokenizer, Tokenizer]
) -> None:
    """Raises UserError when the weights of a checkpoint cannot be the start of a run.

    Args:
        tokenizers: theirs and ours. They may have different files, as those of an export have, as
            long as they do the same.
    """
    if tokenizers[0].behaves_like(tokenizers[1]):
        theirs = dataclasses.replace(theirs, tokenizer=ours.tokenizer)
    check_fits(theirs, ours, directory)


def check_continues(theirs: RunRecord, ours: RunRecord, directory) -> None:
    """Raises UserError when continuing would not continue the same run: other network, tokenizer,
    data or state.
    """
    check_fits(theirs, ours, directory)
    # After the tokenizer: with another one the data differ too, and would be blamed for it.
    if mixture_of(theirs) != mixture_of(ours):
        raise UserError(
            f"The run in {directory} was trained on other data: {describe_mixture(theirs)} there "
            f"and {describe_mixture(ours)} here; give the same records in config.data.path (they "
            "may have moved), or start a new --workdir with config.checkpoint.init_from."
        )
    check_same(
        f"The run in {directory} cannot be continued with another config",
        decisive_knobs(ours),
        decisive_knobs(theirs),
        remedy="undo the change, or start a new --workdir with config.checkpoint.init_from",
    )


def mixture_of(record: RunRecord) -> list[tuple[str, float]]:
    """Returns what decides which row is read when. The directories do not: data may be moved."""
    # A list and not a set: the number of a dataset in it decides how the dataset is shuffled.
    return [(source.fingerprint, source.share) for source in record.data]


def describe_mixture(record: RunRecord) -> str:
    """Returns the datasets of a run in words: their directories, and which version of them."""
    shares = len(record.data) > 1
    return ", ".join(
        f"{source.directory} ({f'{source.share:.3g} of the rows, ' if shares else ''}fingerprint "
        f"{source.fingerprint[:12]})"
        for source in record.data
    )


def decisive_knobs(record: RunRecord) -> dict:
    """Returns the knobs that must stay the same while a run is continued."""
    # Of the decay only whether there is an average: its value may change, the tree of the state
    # may not.
    return {
        **{f"config.{name}": record.knob(name) for name in DECISIVE},
        "config.optimizer.first_moment_dtype": record.first_moment_dtype,
        "keeps an EMA": record.keeps_ema,
        # two rows for each record; not a knob of the first versions
        "config.objective.complementary": bool(
            record.config.get("objective", {}).get("complementary")
        ),
        # Without adapters nothing reads their other knobs, which may then change.
        "config.lora": record.lora if record.lora.rank else None,
    }


def changed_knobs(config: dict, before: dict, prefix: str = "config.") -> list[str]:
    """Returns a line for each knob in which two configs differ, both as nested dicts.

    A knob that one of them does not know is left out: it belongs to another version.
    """
    lines = []
    # Not all keys, as in check_same: a knob that is new in this version has not been changed.
    for key in config.keys() & before.keys():
        new, old = config[key], before[key]
        if isinstance(new, dict) and isinstance(old, dict):
            lines += changed_knobs(new, old, f"{prefix}{key}.")
        elif _as_json(new) != _as_json(old):
            lines.append(f"{prefix}{key} changed from {old!r} to {new!r}")
    return sorted(lines)


def check_same(what: str, ours: dict, theirs: dict, *, remedy: str) -> None:
    """Raises UserError that names each key in which two small dicts differ."""
    keys = [
        key for key in {**theirs, **ours} if _as_json(ours.get(key)) != _as_json(theirs.get(key))
    ]
    if keys:
        differ = ", ".join(
            f"{key} is {_shown(ours.get(key))} here and {_shown(theirs.get(key))} there"
            for key in keys
        )
        raise UserError(f"{what}: {differ}; {remedy}.")


def _shown(value) -> str:
    """Returns a value for an error; of a fingerprint, its beginning."""
    is_fingerprint = isinstance(value, str) and re.fullmatch("[0-9a-f]{32,}", value)
    return value[:12] if is_fingerprint else repr(value)


def _as_json(value):
    # a tuple saved as JSON comes back as a list
    return json.loads(json.dumps(value))

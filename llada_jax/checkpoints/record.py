"""run.json: what a checkpoint was made from, and which runs may continue it."""

import datetime
import json
import platform
import subprocess
from pathlib import Path

import jax
from etils import epath

from llada_jax import __version__
from llada_jax.data.tokenizer import SPECIAL_IDS, Tokenizer
from llada_jax.errors import UserError
from llada_jax.masks import BIDIRECTIONAL, CAUSAL, Mask
from llada_jax.models.transformer import Architecture
from llada_jax.storage import remote


def run_record(config, a: Architecture, tokenizer: Tokenizer, *, data: list[dict], **more) -> dict:
    """Returns run.json as plain JSON values.

    Args:
        data: directory, fingerprint and share of each dataset; [] for weights that came from
            elsewhere.
        more: what else is to stand in it.
    """
    record = {
        "config": config.to_dict(),
        "architecture": {name: getattr(a, name) for name in Architecture.__dataclass_fields__},
        "tokenizer": {
            "kind": tokenizer.kind,
            "vocab_size": tokenizer.vocab_size,
            "fingerprint": tokenizer.fingerprint,
        },
        "data": data,
        "versions": {
            "llada_jax": __version__,
            "python": platform.python_version(),
            "jax": jax.__version__,
        },
        "commit": git_commit(),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **more,
    }
    return json.loads(json.dumps(record))


def mask_of(run: dict) -> Mask:
    """Returns what attention may see in the network of a run.json, without loading its objective,
    which may be of the user's own making and not be at hand.
    """
    if "mask" in run:
        return Mask(**run["mask"])
    # written before the mask was recorded, or for weights that came from elsewhere
    return CAUSAL if run["config"]["objective"]["name"] == "autoregressive" else BIDIRECTIONAL


def reads_ema(run: dict, wanted: bool | None, checkpoint) -> bool:
    """Returns whether to read the moving average of a checkpoint, or else its raw parameters.

    Args:
        run: run.json of the checkpoint.
        wanted: True or False says which; None takes the average where one is kept.

    Raises:
        UserError: the average is wanted and none was kept.
    """
    is_kept = run["config"]["optimizer"]["ema_decay"] > 0
    if wanted and not is_kept:
        raise UserError(
            f"The moving average of {checkpoint} is asked for and its run kept none "
            "(optimizer.ema_decay=0); ask for the raw parameters."
        )
    return is_kept if wanted is None else wanted


def git_commit() -> str:
    """Returns the commit of the checkout that this package lies in; "" for an installed package, or
    without git.
    """
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return ""
    try:
        told = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:  # no git here, as in most containers
        return ""
    return told.stdout.strip()


def write_run(workdir: str, tokenizer: Tokenizer, run: dict, *, config_text: str = "") -> None:
    """Writes WORKDIR/tokenizer, config.py and run.json, each whole or not at all.

    Args:
        config_text: the file that the config came from, kept as it is: run.json holds the values,
            and the file the reasons that its comments give. "" writes none.
    """
    path = epath.Path(workdir)
    if remote.is_remote(
        workdir
    ):  # objects are whole, and the one that makes a folder a tokenizer is written last
        if not (path / "tokenizer" / SPECIAL_IDS).exists():
            tokenizer.save(path / "tokenizer")
    elif not (path / "tokenizer").exists():
        tokenizer.save(path / "tokenizer.partial")
        (path / "tokenizer.partial").rename(path / "tokenizer")
    if config_text:
        remote.write_whole(path / "config.py", config_text)
    remote.write_whole(path / "run.json", json.dumps(run, indent=1) + "\n")


def check_fits(theirs: dict, ours: dict, directory) -> None:
    """Raises UserError when a checkpoint is of another architecture or tokenizer."""
    check_same(
        f"The checkpoint in {directory} is of another architecture",
        ours["architecture"],
        vars(
            Architecture(**theirs["architecture"])
        ),  # what an older version did not write has its default
        remedy="set config.model to match it, or choose another --workdir",
    )
    check_same(
        f"The checkpoint in {directory} was trained with another tokenizer",
        ours["tokenizer"],
        theirs["tokenizer"],
        remedy="use data prepared with its tokenizer (WORKDIR/tokenizer), or choose another --workdir",
    )


def check_continues(theirs: dict, ours: dict, directory) -> None:
    """Raises UserError when continuing would not continue the same run: other network, tokenizer,
    data or state.
    """
    check_fits(theirs, ours, directory)
    check_same(
        f"The run in {directory} was trained on other data",
        mixture_of(ours),
        mixture_of(theirs),
        remedy="give the same config.data.path, or start a new --workdir with config.checkpoint.init_from",
    )
    # what the order of the data, the noise or the layout of the optimizer state follow from
    decides = {
        "": ("seed",),
        "data": (
            "batch_size",
            "sequence_length",
            "random_length_probability",
            "attend_across_documents",
        ),
        "optimizer": ("name",),
        "objective": ("name",),
    }

    def chosen(config):
        picked = {
            f"config.{group}.{key}".replace("..", "."): (config[group] if group else config)[key]
            for group, keys in decides.items()
            for key in keys
        }
        return {**picked, "keeps an EMA": config["optimizer"]["ema_decay"] > 0}

    check_same(
        f"The run in {directory} cannot be continued with another config",
        chosen(ours["config"]),
        chosen(theirs["config"]),
        remedy="undo the change, or start a new --workdir with config.checkpoint.init_from",
    )


def changed_knobs(config: dict, before: dict, prefix: str = "config.") -> list[str]:
    """Returns a line for each knob in which two configs differ, both as nested dicts.

    A knob that one of them does not know is left out: it belongs to another version.
    """
    lines = []
    for key in config.keys() & before.keys():
        new, old = config[key], before[key]
        if isinstance(new, dict) and isinstance(old, dict):
            lines += changed_knobs(new, old, f"{prefix}{key}.")
        elif _as_json(new) != _as_json(old):
            lines.append(f"{prefix}{key} changed from {old!r} to {new!r}")
    return sorted(lines)


def mixture_of(run: dict) -> dict:
    """Returns what decides which record is read when, whatever the directories are called."""
    return {
        "datasets": [s["fingerprint"] for s in run["data"]],
        "weights": [s["share"] for s in run["data"]],
    }


def check_same(what: str, ours: dict, theirs: dict, *, remedy: str) -> None:
    """Raises UserError that names each key in which two small dicts differ."""
    keys = [
        key for key in {**theirs, **ours} if _as_json(ours.get(key)) != _as_json(theirs.get(key))
    ]
    if keys:
        differ = ", ".join(
            f"{key} is {ours.get(key)!r} here and {theirs.get(key)!r} there" for key in keys
        )
        raise UserError(f"{what}: {differ}; {remedy}.")


def _as_json(value):
    return json.loads(json.dumps(value))  # a tuple saved as JSON comes back as a list

"""Reads safetensors of a Hugging Face directory straight into sharded arrays: each host reads the
slices that its devices hold.

Names, shapes, dtypes and the length of every file are checked before the first number is read: a
download that was cut short is the most common fault, and should not cost minutes of loading.
"""

import dataclasses
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llada_jax.errors import UserError, require
from llada_jax.hf.config_json import architecture_from, layout_of
from llada_jax.hf.convert import Tensor, tensors
from llada_jax.hf.peft import CONFIG as ADAPTER_CONFIG
from llada_jax.models.transformer import Architecture
from llada_jax.rng import key_for
from llada_jax.schemas import GenerationConfig, Index, check, parse_json
from llada_jax.storage import files

CONFIG = "config.json"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = ("F32", "BF16", "F16", "F64")
# of two copies of an embedding, at a time
COMPARED_ROWS = 4096


class Stored(NamedTuple):
    """A tensor as its file describes it."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


def is_huggingface(path) -> bool:
    """Whether a path is a directory with a Hugging Face checkpoint, whole or not."""
    path = Path(path)
    return path.is_dir() and ((path / CONFIG).exists() or any(path.glob("*.safetensors*")))


def read_json(file: Path) -> dict:
    """Returns the object in a JSON file; UserError when there is none."""
    with files.reading(file, remedy="fetch the whole checkpoint again"):
        content = file.read_bytes()
    return parse_json(content, file=file)


def read_config(directory) -> tuple[dict, str, Architecture]:
    """Returns config.json of a directory, its layout, and the Architecture of its tensors.

    Raises:
        UserError: no such file, or another network; the message names the directory.
    """
    is_whole = (Path(directory) / CONFIG).exists()
    if not is_whole and (Path(directory) / ADAPTER_CONFIG).exists():
        raise UserError(
            f"{directory} holds adapters without the network that they belong to; give the run "
            "that they were exported from, or a whole model, which export writes without "
            "--adapters, and peft with merge_and_unload()."
        )
    hf_config = read_json(Path(directory) / CONFIG)
    try:
        found = hf_config, layout_of(hf_config), architecture_from(hf_config)
    except UserError as error:
        raise UserError(f"{directory}/{error}") from error
    generation = Path(directory) / "generation_config.json"
    if generation.exists():
        check(read_json(generation), GenerationConfig, file=generation)
    return found


# ---- what is in the directory


def list_tensors(directory) -> dict[str, Stored]:
    """Returns every tensor of a directory by its name, from the headers of its files.

    Raises:
        UserError: no safetensors, a shard is missing, cut short or not what the index says.
    """
    directory = Path(directory)
    if (directory / INDEX).exists():
        return _list_shards(directory)
    if (directory / SINGLE).exists():
        return _list_file(directory / SINGLE)
    others = sorted(
        file.name
        for pattern in ("*.safetensors", "*.bin", "*.pt", "*.gguf")
        for file in directory.glob(pattern)
    )
    holds = f"it holds {others[0]}" if others else "it holds no weights"
    raise UserError(
        f"{directory} has neither {SINGLE} nor {INDEX} ({holds}); fetch the whole checkpoint, or "
        "save it with model.save_pretrained(..., safe_serialization=True)."
    )


def _list_file(file: Path) -> dict[str, Stored]:
    safetensors = require("safetensors", extra="hf")
    try:
        with safetensors.safe_open(file, framework="numpy") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            return {
                name: Stored(file, tuple(s.get_shape()), s.get_dtype())
                for name, s in slices.items()
            }
    except (safetensors.SafetensorError, OSError) as error:
        files.check_readable(file)
        size = file.stat().st_size if file.exists() else 0
        raise UserError(
            f"{file} is damaged or cut short at {size:,} bytes ({error}); fetch it again."
        ) from error


def _list_shards(directory: Path) -> dict[str, Stored]:
    index = check(read_json(directory / INDEX), Index, file=directory / INDEX).weight_map
    files = sorted(set(index.values()))
    # What someone has uploaded must not make this read any other file of the machine. Names and not
    # the places that they lead to are looked at: Hugging Face's own cache is made of links.
    is_name = lambda file: file not in ("", "..") and "\0" not in file and Path(file).name == file  # noqa: E731
    outside = [file for file in files if not is_name(file)]
    if outside:
        raise UserError(
            f"{directory / INDEX} lists {_some(outside)}, and files outside of its directory are "
            "not read; fetch the checkpoint from a source that you trust."
        )
    # os.path, because Path.exists raises for a name that is longer than the disk allows
    missing = [file for file in files if not os.path.exists(directory / file)]
    if missing:
        raise UserError(
            f"{directory} lacks {_some(missing)}, which {INDEX} lists; fetch the whole checkpoint."
        )
    if outside := [file for file in files if not _is_inside(directory / file, directory)]:
        raise UserError(
            f"{directory / INDEX} lists {_some(outside)}, a link to a file outside of {directory}; "
            "put the file itself there."
        )
    stored = {}
    for file in files:
        found = _list_file(directory / file)
        wrong = [name for name, place in index.items() if place == file and name not in found]
        wrong += [name for name in found if index.get(name) != file]
        if wrong:
            raise UserError(
                f"{directory / INDEX} and {file} disagree about {_some(wrong)}; fetch both from "
                "the same revision."
            )
        stored |= found
    return stored


def _is_inside(file: Path, directory: Path) -> bool:
    """Whether a file, its links followed, lies in a directory or in that repository of the Hub's
    cache to which the directory belongs: there snapshots/REVISION/NAME links to blobs/DIGEST.
    """
    target, home = file.resolve(), directory.resolve()
    is_snapshot = home.parent.name == "snapshots"
    return target.is_relative_to(home) or (
        is_snapshot and target.parent == home.parent.parent / "blobs"
    )


def check_tensors(
    directory, stored: dict[str, Stored], expected: list[Tensor], allowed: set[str]
) -> None:
    """Raises UserError that names what is missing, unexpected, misshapen, or not of a float dtype.

    Args:
        allowed: names that may be there in addition to the expected ones.
    """
    names = {tensor.name for tensor in expected}
    faults = {
        "lacks": [tensor.name for tensor in expected if tensor.name not in stored],
        # frequencies that follow from config.json, saved by old versions of transformers
        "does not expect": [
            n for n in stored if n not in names | allowed and not n.endswith("rotary_emb.inv_freq")
        ],
        "has misshapen": [
            f"{tensor.name} {list(stored[tensor.name].shape)} instead of {list(tensor.hf_shape)}"
            for tensor in expected
            if tensor.name in stored and stored[tensor.name].shape != tensor.hf_shape
        ],
        "has of another dtype than a float": [
            f"{name} ({stored[name].dtype})"
            for name in sorted(names & set(stored))
            if stored[name].dtype not in DTYPES
        ],
    }
    wrong = [f"{verb} {_some(what)}" for verb, what in faults.items() if what]
    if wrong:
        raise UserError(
            f"{directory} {'; it '.join(wrong)}: config.json and its tensors must be of one "
            "checkpoint."
        )


def _some(names: list[str], most: int = 4) -> str:
    """Returns the first of many names and how many follow."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


# ---- reading it


def read_params(
    directory, abstract: dict, *, then: Callable[[dict, str], None] = lambda params, path: None
) -> dict:
    """Returns the parameters of a checkpoint, float32, the layers stacked, each in the shards of
    its device.

    One parameter is read after the other, so a host holds at most one stacked parameter in addition
    to what its devices hold.

    Args:
        abstract: nested dict of ShapeDtypeStructs with shardings, as of llada_jax.training.state. A
            vocabulary longer than the file's is filled up with zeros, see `fill_rows`.
        then: called with what has been read so far and the path of the last parameter, such as
            "blocks/q", which it may replace before the next one is read.

    Raises:
        UserError: the directory is damaged, is not the network that its config.json describes, or
            holds NaN or infinity.
    """
    _, layout, a = read_config(directory)
    stored = list_tensors(directory)
    expected = tensors(layout, a)
    copy = (
        tensors(layout, dataclasses.replace(a, tie_embeddings=False))[-1].name
        if a.tie_embeddings
        else None
    )
    check_tensors(directory, stored, expected, {copy} if copy else set())
    if copy in stored:
        _check_copies(directory, stored[expected[0].name], expected[0].name, stored[copy], copy)
    layers = {}
    for tensor in expected:
        layers.setdefault(tensor.path, []).append(tensor)
    params: dict[str, Any] = {"blocks": {}}
    for path, of_path in layers.items():
        *group, name = path.split("/")
        leaf = abstract["blocks"][name] if group else abstract[name]
        (params["blocks"] if group else params)[name] = _read_parameter(of_path, stored, leaf)
        then(params, path)
    return params


def _check_copies(directory, one: Stored, one_name: str, other: Stored, other_name: str) -> None:
    """config.json says that head and embedding are one, and the file holds both (as iLLaDA's does):
    they must be equal.
    """
    rows = one.shape[0]
    same = one.shape == other.shape
    for row in range(0, rows if same else 0, COMPARED_ROWS):
        part = [slice(row, min(row + COMPARED_ROWS, rows))]
        same = same and np.array_equal(_read(one, one_name, part), _read(other, other_name, part))
    if not same:
        raise UserError(
            f"{directory}/{CONFIG} ties head and embedding, but {other_name} differs from "
            f"{one_name}; set tie_word_embeddings (weight_tying) to false if the model was trained "
            "with both."
        )


def digest(directory) -> str:
    """Returns what distinguishes the weights of a directory from others with the same config.json:
    a digest of the names, shapes and dtypes of all tensors and of the first row of each.

    A checksum of all bytes would take as long as loading them. Training changes every row of a
    tensor, but for those of tokens that it has not seen.

    Raises:
        UserError: the directory is damaged.
    """
    result = hashlib.sha256()
    for name, stored in sorted(list_tensors(directory).items()):
        result.update(f"{name} {stored.shape} {stored.dtype}\n".encode())
        # of another dtype than a float: what loads the tensors will refuse it
        if stored.dtype in DTYPES:
            first = [slice(0, 1)] * (len(stored.shape) - 1) + [slice(None)]
            result.update(_read(stored, name, first[: len(stored.shape)]).tobytes())
    return result.hexdigest()


def _read(stored: Stored, name: str, slices: list[slice]) -> np.ndarray:
    """Reads part of one tensor. The file is closed again, so that its pages do not add up."""
    safetensors = require("safetensors", extra="hf")
    with safetensors.safe_open(stored.file, framework="numpy") as opened:
        return opened.get_slice(name)[tuple(slices)]


def _read_parameter(of_path: list[Tensor], stored: dict[str, Stored], leaf) -> jax.Array:
    # Devices that hold the same part share it.
    parts = {}

    def part(index):
        bounds = tuple(s.indices(size)[:2] for s, size in zip(index, leaf.shape))
        if bounds not in parts:
            parts[bounds] = _read_part(of_path, stored, bounds)
        return parts[bounds]

    return jax.make_array_from_callback(leaf.shape, leaf.sharding, part)


def _read_part(of_path: list[Tensor], stored: dict[str, Stored], bounds) -> np.ndarray:
    """Returns one part of a parameter, float32; bounds are (start, stop) of each of its dims, the
    layers included.
    """
    part = np.zeros([stop - start for start, stop in bounds], np.float32)
    if of_path[0].layer is None:
        _read_into(part, of_path[0], stored, bounds)
    else:
        for row, layer in enumerate(range(*bounds[0])):
            _read_into(part[row], of_path[layer], stored, bounds[1:])
    return part


def _read_into(part: np.ndarray, tensor: Tensor, stored: dict[str, Stored], bounds) -> None:
    bound_of = {
        letter: (min(start, tensor.sizes[letter]), min(stop, tensor.sizes[letter]))
        for letter, (start, stop) in zip(tensor.dims, bounds)
    }
    slices = []
    for first, *inner in tensor.hf_dims.split():  # type: ignore[str-unpack]
        # what stands together in the file is split over devices by its first dim alone
        # (llada_jax.cluster.sharding.RULES)
        assert all(bound_of[letter] == (0, tensor.sizes[letter]) for letter in inner), (
            tensor.name,
            bounds,
        )
        width = int(np.prod([tensor.sizes[letter] for letter in inner], initial=1))
        slices.append(slice(bound_of[first][0] * width, bound_of[first][1] * width))
    sizes = {letter: stop - start for letter, (start, stop) in bound_of.items()}
    if 0 in sizes.values():
        return
    values = dataclasses.replace(tensor, sizes=sizes).from_hf(
        _read(stored[tensor.name], tensor.name, slices)
    )
    if not np.isfinite(values).all():
        raise UserError(
            f"{stored[tensor.name].file} holds NaN or infinity in {tensor.name}; this checkpoint "
            "is broken, give another."
        )
    part[tuple(slice(0, size) for size in values.shape)] = values


# ---- tokens that are new


def fill_rows(
    params: dict, *, is_new_V: np.ndarray, is_trained_V: np.ndarray, seed: int = 0
) -> dict:
    """Returns params with rows for tokens that the checkpoint was never trained on: the mask, and
    rows that were added.

    Such a row is drawn from the normal distribution that has the mean and, coordinate by
    coordinate, the standard deviation of the trained rows. A row of zeros, or one that training has
    left near zero, must not stand for the mask: RMSNorm divides by its size, which blows the
    gradient up at half of all positions (LLaDA2.0, arXiv 2512.15745). A row as long as any other
    token's has the gradient of any other token. Columns of an untied head are drawn alike.
    """

    def fill(table, key, axis):
        shape = (-1, 1) if axis == 0 else (1, -1)
        is_new, is_trained = is_new_V.reshape(shape), (is_trained_V & ~is_new_V).reshape(shape)
        mean = jnp.mean(table, axis=axis, keepdims=True, where=is_trained)
        std = jnp.std(table, axis=axis, keepdims=True, where=is_trained)
        return jnp.where(is_new, mean + std * jax.random.normal(key, table.shape), table)

    filled = {
        name: jax.jit(fill, static_argnames="axis", out_shardings=params[name].sharding)(
            params[name], key_for("new rows", seed, axis), axis=axis
        )
        for name, axis in (("embed", 0), ("lm_head", 1))
        if name in params
    }
    return {**params, **filled}

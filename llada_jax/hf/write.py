"""Writes safetensors one tensor at a time, in any order: every size is known before the first
number is.

The format (https://huggingface.co/docs/safetensors): eight bytes with the length of the header, the
header as JSON, then the tensors without gaps. Files and index are named, and tensors dealt out, as
transformers does.
"""

import collections
import ctypes
import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llada_jax.errors import UserError
from llada_jax.hf.convert import Tensor
from llada_jax.hf.read import INDEX, SINGLE
from llada_jax.storage import files

# PyTorch code that both layouts need.
SHARED = ("masked_diffusion.py", "diffusion_sampler.py", "diffusion_rules.py")
DTYPES = {"bfloat16": ("BF16", np.dtype(jnp.bfloat16)), "float32": ("F32", np.dtype(np.float32))}


@dataclasses.dataclass(frozen=True)
class Shard:
    """One file to be written. header: its first bytes. start: {name: where in the file the tensor
    begins}. size: bytes.
    """

    name: str
    header: bytes
    start: dict[str, int]
    size: int


def plan_shards(tensors: list[Tensor], *, dtype: str, shard_size: int) -> list[Shard]:
    """Returns the files of a checkpoint; a file has at most `shard_size` bytes of tensors, unless
    one alone is larger.
    """
    groups, filled = [[]], 0
    for tensor in tensors:
        size = num_bytes(tensor, dtype)
        if groups[-1] and filled + size > shard_size:
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += size
    count = len(groups)
    names = (
        [SINGLE]
        if count == 1
        else [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    )
    return [_shard(name, group, dtype) for name, group in zip(names, groups)]


def _shard(name: str, tensors: list[Tensor], dtype: str) -> Shard:
    content: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for tensor in tensors:
        end = position + num_bytes(tensor, dtype)
        offsets = [position, end]
        content[tensor.name] = {
            "dtype": DTYPES[dtype][0],
            "shape": tensor.hf_shape,
            "data_offsets": offsets,
        }
        position = end
    header = json.dumps(content, separators=(",", ":")).encode()
    # Padded so that the numbers are aligned.
    header += b" " * (-len(header) % 8)
    header = len(header).to_bytes(8, "little") + header
    start = {t.name: len(header) + content[t.name]["data_offsets"][0] for t in tensors}
    return Shard(name, header, start, len(header) + position)


def num_bytes(tensor: Tensor, dtype: str) -> int:
    """Returns the bytes of a tensor in a file."""
    return int(np.prod(tensor.hf_shape, dtype=np.int64)) * DTYPES[dtype][1].itemsize


def index_json(shards: list[Shard]) -> bytes:
    """Returns model.safetensors.index.json."""
    total = sum(shard.size - len(shard.header) for shard in shards)
    places = {name: shard.name for shard in shards for name in shard.start}
    content = {"metadata": {"total_size": total}, "weight_map": places}
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


def other_files(shards: list[Shard], hf_config: dict, layout: str) -> dict[str, bytes]:
    """Returns, by name, what an export holds next to weights and tokenizer: configs, the index of
    several shards, PyTorch code.
    """
    keys = ("bos_token_id", "eos_token_id", "pad_token_id", "transformers_version")
    generation = {key: hf_config[key] for key in keys}
    # Published instruct models name here all that ends a text.
    if "eot_token_id" in hf_config:
        generation["eos_token_id"] = [hf_config["eos_token_id"], hf_config["eot_token_id"]]
    objects = {"config.json": hf_config, "generation_config.json": generation}
    contents = {
        name: (json.dumps(content, indent=2) + "\n").encode() for name, content in objects.items()
    }
    if len(shards) > 1:
        contents[INDEX] = index_json(shards)
    here = Path(__file__).parent / "shipped"
    for name in (f"configuration_{layout}.py", f"modeling_{layout}.py", *SHARED):
        contents[name] = (here / name).read_bytes()
    # Where transformers 5 looks for a generation method that a repository brings.
    contents["custom_generate/generate.py"] = (here / "generate.py").read_bytes()
    return contents


def begin(directory: Path, shard: Shard) -> None:
    """Creates a shard at its full size, so that a disk without the room for it says so at once;
    OSError if it does.
    """
    with open(directory / shard.name, "wb") as file:
        file.write(shard.header)
        file.flush()
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, shard.size)


def put(directory: Path, shard: Shard, tensor: Tensor, array: np.ndarray, *, dtype: str) -> None:
    """Writes one tensor into its place.

    Args:
        array: ours, one layer of it; any float dtype.

    Raises:
        UserError: it holds NaN or infinity in the dtype of the file.
        OSError: of the disk.
    """
    content = np.ascontiguousarray(tensor.to_hf(array.astype(DTYPES[dtype][1])))
    if not np.isfinite(content).all():
        raise UserError(
            f"{tensor.path}{'' if tensor.layer is None else f' of layer {tensor.layer}'} holds NaN "
            f"or infinity in {dtype}; export an earlier step, with --checkpoint WORKDIR@STEP."
        )
    with open(directory / shard.name, "r+b") as file:
        file.seek(shard.start[tensor.name])
        file.write(content.view(np.uint8).data)


def write_weights(
    directory: Path,
    tensors: list[Tensor],
    shards: list[Shard],
    *,
    read: Callable[[str, tuple[int, ...], int | None], np.ndarray],
    num_layers: int,
    dtype: str,
) -> None:
    """Writes the shards, one tensor after the other, so that a host holds one of them and not the
    model; of several processes each writes some of the shards, and reads what is in them.

    Args:
        read: read(path, shape, layer) -> one layer of one of our arrays, float32, or the whole of
            one without layers (None). shape: of the whole.

    Raises:
        UserError: a parameter cannot be read, or holds NaN or infinity.
        OSError: the disk refuses.
    """
    libc = ctypes.CDLL(None)
    number, count = jax.process_index(), jax.process_count()
    ours = [shard for i, shard in enumerate(shards) if i * count // len(shards) == number]
    shard_of = {name: shard for shard in ours for name in shard.start}
    for shard in ours:
        begin(directory, shard)
    by_path = collections.defaultdict(list)
    for tensor in tensors:
        if tensor.name in shard_of:
            by_path[tensor.path].append(tensor)
    # Parameter by parameter and not shard by shard: where layers share a chunk on the disk, it is
    # then read once.
    for path, group in by_path.items():
        for tensor in group:
            # glibc keeps for itself what the threads that read the last tensor have freed, so that
            # the peak would be two of them. Elsewhere (musl, macOS) there is no such call.
            if hasattr(libc, "malloc_trim"):
                libc.malloc_trim(0)
            shape = tensor.shape if tensor.layer is None else (num_layers, *tensor.shape)
            array = read(path, shape, tensor.layer)
            put(directory, shard_of[tensor.name], tensor, array, dtype=dtype)
            # gone before the next is read
            del array
    for shard in ours:
        # Here and not by the process that renames the folder: only the host that has written a file
        # has its bytes in its cache.
        files.sync(directory / shard.name)

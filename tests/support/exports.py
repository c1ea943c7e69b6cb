"""Checkpoints with random weights, as `train` leaves them, and exports of them."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from llada_jax.__main__ import main
from llada_jax.checkpoints.record import RunRecord
from llada_jax.checkpoints.workdir import Checkpoints
from llada_jax.cluster.sharding import one_device_mesh
from llada_jax.config import default_config
from llada_jax.data.tokenizer import load_tokenizer
from llada_jax.hf import read
from llada_jax.models.model import abstract_parameters, make_model
from llada_jax.models.transformer import Architecture
from llada_jax.training.state import TrainState

LLADA = Architecture(
    vocab_size=320,
    num_layers=3,
    d_model=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    d_ff=48,
    rope_theta=1e4,
)
ARCHITECTURES = {
    "llada": LLADA,
    "llada, tied, qk_norm full": dataclasses.replace(LLADA, tie_embeddings=True, qk_norm="full"),
    "illada, qk_norm per head": dataclasses.replace(LLADA, qk_norm="per_head"),
    "illada, biased, shifted, wide heads": dataclasses.replace(
        LLADA, attention_bias="qkvo", output_shift=True, head_dim=12, tie_embeddings=True
    ),
    "illada, scaled frequencies": dataclasses.replace(
        LLADA, rope_theta=100.0, rope_scaling=(8.0, 1.0, 4.0, 40.0)
    ),
}


def write_checkpoint(
    workdir: Path,
    a: Architecture,
    params: dict,
    *,
    step: int = 7,
    ema: dict | None = None,
    frozen: dict | None = None,
    **changes,
):
    """Writes a workdir as `train` leaves it; changes are of run.json."""
    tokenizer = load_tokenizer("bytes")
    tokenizer.save(workdir / "tokenizer")
    config = default_config()
    config.data.sequence_length = 48
    config.optimizer.ema_decay = 0.5 if ema else 0.0
    run = {
        "config": config.to_dict(),
        "architecture": dataclasses.asdict(a),
        "data": [],
        "step": step,
        "tokens": 1234567,
        "tokenizer": {"kind": "bytes", "vocab_size": 260, "fingerprint": tokenizer.fingerprint},
        "versions": {},
        **changes,
    }
    record = RunRecord.from_json(json.loads(json.dumps(run)), file="test")
    saved = Checkpoints(workdir)
    # where they are, if they are on devices already
    params, ema, frozen = jax.tree.map(jnp.asarray, (params, ema or {}, frozen or {}))
    saved.save(TrainState(jnp.int32(step), params, (), ema, {}, frozen), record)
    saved.close()
    return workdir


def export(workdir, output, *more) -> Path:
    """Runs `llada-jax export`, which must succeed; returns the directory."""
    assert (
        main(["export", "--checkpoint", str(workdir), "--output", str(output), *map(str, more)])
        == 0
    )
    return Path(output)


def contents_of(directory: Path) -> dict[str, bytes]:
    """Returns all files of a directory, those in folders too, by their paths in it."""
    files = [file for file in directory.rglob("*") if file.is_file()]
    return {str(file.relative_to(directory)): file.read_bytes() for file in files}


def read_back(directory, a: Architecture) -> dict:
    """Returns our parameters of an export, on one device."""
    mesh = one_device_mesh()
    return read.read_params(directory, abstract_parameters(make_model(a), mesh))


def assert_same_params(ours: dict, theirs: dict) -> None:
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(ours), jax.device_get(theirs))


class FakeHub:
    """Stands where huggingface_hub.HfApi does and notes what it is asked."""

    def __init__(self, calls: list, *, fails_at: str = ""):
        self.calls, self.fails_at = calls, fails_at

    def __call__(self):
        return self

    def _note(self, name, *args, **kwargs):
        if name == self.fails_at:
            raise OSError(f"{name} answers 403 Forbidden")
        self.calls.append((name, args, kwargs))

    def whoami(self):
        self._note("whoami")

    def create_repo(self, *args, **kwargs):
        self._note("create_repo", *args, **kwargs)

    def upload_folder(self, *, folder_path, **kwargs):
        files = sorted(contents_of(Path(folder_path)))
        self._note("upload_folder", folder_path=folder_path, files=files, **kwargs)

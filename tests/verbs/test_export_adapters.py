"""`llada-jax export --adapters`: what it writes, replaces, uploads and refuses."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from support.exports import LLADA, FakeHub, contents_of, export, write_checkpoint
from support.hf_directories import random_params

from llada_jax.config import default_config
from llada_jax.models.adapters import Lora, adapter_shapes

FILES = ["adapter_config.json", "adapter_model.safetensors"]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory) -> Path:
    """A checkpoint of adapters over a frozen LLADA."""
    network, rng = random_params(LLADA), np.random.default_rng(1)
    adapters = jax.tree.map(
        lambda leaf: rng.normal(size=leaf.shape).astype(np.float32),
        adapter_shapes(network, Lora(rank=2)),
    )
    config = default_config()
    config.lora.rank = 2
    workdir = tmp_path_factory.mktemp("adapters") / "run"
    return write_checkpoint(workdir, LLADA, adapters, frozen=network, config=config.to_dict())


def test_an_export_of_adapters_is_replaced_only_by_force(tuned, tmp_path, refused_export):
    out = export(tuned, tmp_path / "out", "--adapters")
    assert sorted(contents_of(out)) == FILES
    assert "--force to replace it" in refused_export(
        "--checkpoint", tuned, "--adapters", output=out
    )
    (out / FILES[0]).write_text("{}")
    export(tuned, out, "--adapters", "--force")
    assert json.loads((out / FILES[0]).read_text())["r"] == 2
    assert len(load_file(out / FILES[1])) == 2 * 4 * LLADA.num_layers


def test_adapters_are_uploaded(tuned, tmp_path, capfd, monkeypatch):
    calls = []
    monkeypatch.setattr("huggingface_hub.HfApi", FakeHub(calls))
    export(tuned, tmp_path / "out", "--adapters", "--push-to-hub", "me/adapters")
    assert [name for name, _, _ in calls] == ["whoami", "create_repo", "upload_folder"]
    assert calls[2][2]["files"] == FILES
    assert "uploaded to me/adapters" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--dtype", "bfloat16"], "--dtype would have no effect; leave it out"),
        (["--shard-size", "5GB", "--license", "mit"], "--shard-size, --license would have no"),
        (["--chat-template", "absent"], "--chat-template would"),
        (["--tokenizer", "bytes", "--verify"], "--tokenizer, --verify would"),
    ],
)
def test_flags_of_whole_models_are_refused(words, named, tuned, tmp_path, refused_export):
    out = tmp_path / "out"
    assert named in refused_export("--checkpoint", tuned, "--adapters", *words, output=out)


def test_a_run_without_adapters_is_refused(random_checkpoint, tmp_path, refused_export):
    words = ["--checkpoint", random_checkpoint, "--adapters"]
    assert "was trained without any" in refused_export(*words, output=tmp_path / "out")

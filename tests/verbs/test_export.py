"""`llada-jax export`: which files are written, and what is in them."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file
from support.exports import (
    ARCHITECTURES,
    LLADA,
    FakeHub,
    assert_same_params,
    contents_of,
    export,
    read_back,
    write_checkpoint,
)
from support.hf_directories import random_params
from support.paths import PUBLISHED

from llada_jax.__main__ import main
from llada_jax.data.tokenizer import load_tokenizer
from llada_jax.hf import read, write
from llada_jax.hf.config_json import hf_config
from llada_jax.hf.convert import tensors


def sizes_of(directory: Path) -> dict[str, int]:
    return {name: len(content) for name, content in contents_of(directory).items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_ours_to_hugging_face_to_ours_is_bit_exact_and_the_layout_is_said(name, tmp_path, capfd):
    a = ARCHITECTURES[name]
    params = random_params(a, seed=2)
    run = write_checkpoint(tmp_path / "run", a, params)
    layout = name.split(",")[0]
    out = export(run, tmp_path / "float32", "--dtype", "float32")
    assert f"layout {layout}: " in capfd.readouterr().err
    assert json.loads((out / "config.json").read_text())["model_type"] == layout
    assert read.read_config(out)[2] == a
    assert_same_params(read_back(out, a), params)
    rounded = jax.tree.map(
        lambda x: np.asarray(jnp.asarray(x).astype(jnp.bfloat16).astype(jnp.float32)), params
    )
    assert_same_params(read_back(export(run, tmp_path / "bfloat16"), a), rounded)


@pytest.mark.slow
def test_the_config_has_every_key_with_the_ids_of_the_tokenizer(random_checkpoint, tmp_path):
    out = export(random_checkpoint, tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    ids = {"mask_id": 256, "eos_id": 257, "bos_id": 258, "pad_id": 259}
    # the rows of the embedding above the last id are padding
    sizes = {"num_ids": 260, "max_sequence_length": 48}
    assert config == hf_config(LLADA, "llada", **ids, **sizes, dtype="bfloat16")
    assert (config["vocab_size"], config["embedding_size"]) == (260, LLADA.vocab_size)
    published = json.loads((PUBLISHED / "config.json").read_text())
    assert set(published) - {"_attn_implementation_autoset"} <= set(config)
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation == {
        "bos_token_id": 258,
        "eos_token_id": 257,
        "pad_token_id": 259,
        "transformers_version": "4.49.0",
    }
    assert (out / "modeling_llada.py").read_bytes() == (
        Path(write.__file__).parent / "shipped" / "modeling_llada.py"
    ).read_bytes()
    assert load_tokenizer(out).encode("Ab\n") == load_tokenizer("bytes").encode("Ab\n")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_shards_hold_what_one_file_holds_and_the_index_finds_it(dtype, random_checkpoint, tmp_path):
    whole = load_file(
        export(random_checkpoint, tmp_path / "one", "--dtype", dtype) / "model.safetensors"
    )
    out = export(random_checkpoint, tmp_path / "many", "--dtype", dtype, "--shard-size", "20KB")
    files = sorted(file.name for file in out.glob("*.safetensors"))
    assert len(files) > 3
    assert files == [
        f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)
    ]
    index = json.loads((out / "model.safetensors.index.json").read_text())
    found = {}
    for file in files:
        with safe_open(out / file, framework="np") as opened:
            assert opened.metadata() == {"format": "pt"}
            found |= {name: (file, opened.get_tensor(name)) for name in opened.keys()}  # noqa: SIM118
        held = sum(array.nbytes for place, array in found.values() if place == file)
        num_held = sum(place == file for place, _ in found.values())
        assert held <= 20_000 or num_held == 1
    assert index["weight_map"] == {name: place for name, (place, _) in found.items()}
    assert index["metadata"]["total_size"] == sum(array.nbytes for _, array in found.values())
    assert found.keys() == whole.keys() == {tensor.name for tensor in tensors("llada", LLADA)}
    for name, array in whole.items():
        np.testing.assert_array_equal(found[name][1], array)
    assert not (tmp_path / "one" / "model.safetensors.index.json").exists()


def test_tensors_are_put_in_any_order(tmp_path):
    listed = tensors("llada", LLADA)
    (shard,) = write.plan_shards(listed, dtype="float32", shard_size=10**9)
    params = random_params(LLADA)
    write.begin(tmp_path, shard)
    for i in np.random.default_rng(0).permutation(len(listed)):
        write.put(tmp_path, shard, listed[i], listed[i].of(params), dtype="float32")
    found = load_file(tmp_path / shard.name)
    for tensor in listed:
        np.testing.assert_array_equal(found[tensor.name], tensor.to_hf(tensor.of(params)))
    assert (tmp_path / shard.name).stat().st_size == shard.size


@pytest.mark.slow
def test_ema_takes_the_moving_average_and_without_it_the_average_is_mentioned(
    random_checkpoint, tmp_path, capfd
):
    out = export(random_checkpoint, tmp_path / "ema", "--ema", "--dtype", "float32")
    assert_same_params(read_back(out, LLADA), random_params(LLADA, seed=1))
    assert "from the moving average of the parameters" in (out / "README.md").read_text()
    assert "keeps a moving average" not in capfd.readouterr().err
    plain = export(random_checkpoint, tmp_path / "plain", "--dtype", "float32")
    assert_same_params(read_back(plain, LLADA), random_params(LLADA))
    assert (
        "keeps a moving average, which `sample` takes; --ema exports that" in capfd.readouterr().err
    )


@pytest.mark.slow
def test_json_is_one_object_with_the_files(random_checkpoint, tmp_path, capfd):
    out = export(random_checkpoint, tmp_path / "out", "--json")
    told = json.loads(capfd.readouterr().out)
    assert told["layout"] == "llada"
    assert told["step"] == 7
    assert told["files"] == sizes_of(out)
    assert "custom_generate/generate.py" in told["files"]


@pytest.mark.slow
def test_a_published_checkpoint_comes_back_with_every_tensor_and_key(published, tmp_path):
    """Hugging Face -> ours -> Hugging Face, with a tokenizer of as many ids as the fixture has
    rows.
    """
    from support.hf_directories import write_tokenizer

    source = tmp_path / "published"
    source.mkdir()
    for name in ("config.json", "model.safetensors"):
        (source / name).write_bytes((published / name).read_bytes())
    write_tokenizer(
        source,
        "<|eot_id|>",
        *(f"<|special-{i}|>" for i in range(254)),
        chat_template="{{ messages }}",
    )
    assert main(["import", "--from", str(source), "--output", str(tmp_path / "run")]) == 0
    out = export(tmp_path / "run", tmp_path / "out", "--dtype", "float32")
    before, after = (load_file(d / "model.safetensors") for d in (source, out))
    assert before.keys() == after.keys()
    for name, array in before.items():
        np.testing.assert_array_equal(after[name], array)
    config, ours = (json.loads((d / "config.json").read_text()) for d in (source, out))
    assert {key: ours[key] for key in config} == config
    # where the sampler of the export ends a text too
    assert ours["eot_token_id"] == load_tokenizer(out).id_of("<|eot_id|>")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (source / name).read_bytes()


@pytest.mark.slow
def test_rows_that_are_not_ids_are_counted_out_of_the_vocabulary_of_an_imported_model(
    imported_workdirs, tmp_path
):
    """Qwen's config.json says nothing about the rows that were added with the mask."""
    out = export(imported_workdirs["qwen"], tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    num_ids = load_tokenizer(out).vocab_size
    assert num_ids < config["vocab_size"]
    assert (config["model_type"], config["unpadded_vocab_size"]) == ("illada", num_ids)


@pytest.mark.slow
def test_a_dry_run_writes_and_uploads_nothing(random_checkpoint, tmp_path, capfd, monkeypatch):
    calls = []
    monkeypatch.setattr("huggingface_hub.HfApi", FakeHub(calls))
    more = ["--dry-run", "--push-to-hub", "me/model", "--shard-size", "100KB"]
    export(random_checkpoint, tmp_path / "out", *more)
    out = capfd.readouterr().out
    assert list(tmp_path.iterdir()) == []
    assert "would upload all of it to me/model" in out
    assert [name for name, _, _ in calls] == ["whoami"]
    real = export(random_checkpoint, tmp_path / "out", "--shard-size", "100KB")
    listed = {
        line.split()[1]: int(line.split()[0].replace(",", ""))
        for line in out.splitlines()
        if line.startswith("  ")
    }
    listed.pop("README.md")  # names the repository
    written = sizes_of(real)
    written.pop("README.md")
    assert listed == written

"""`llada-jax import`: what is read, where it is written, and what a new row of the embedding is."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.corpora import write_corpus
from support.exports import contents_of
from support.hf_directories import SMALL, write_huggingface, write_tokenizer
from support.imports import abstract_on, assert_equal_params

import llada_jax
from llada_jax.__main__ import main
from llada_jax.checkpoints.workdir import find_checkpoint
from llada_jax.config import load_config
from llada_jax.data.preparation import prepare
from llada_jax.hf import read, starting_config
from llada_jax.hf.convert import tensors
from llada_jax.models.transformer import Architecture
from llada_jax.verbs import import_hf

# ---- what is read


@pytest.mark.slow
def test_the_published_checkpoint_gives_the_published_logits_from_directory_and_workdir(
    published, tmp_path
):
    directory, workdir = tmp_path / "hf", tmp_path / "workdir"
    shutil.copytree(published, directory)
    write_tokenizer(directory, *(f"<|extra_{i}|>" for i in range(255)))  # 512 ids
    assert (
        main(["import", "--from", str(directory), "--output", str(workdir), "--mesh", "data=8"])
        == 0
    )
    expected = np.load(published / "expected.npz")
    for checkpoint in (directory, workdir):
        model = llada_jax.load(checkpoint)
        # of config.json
        assert (model.tokenizer.mask_id, model.tokenizer.eos_id, model.step) == (
            510,
            500,
            0,
        )
        np.testing.assert_allclose(
            model.logits(expected["input_ids"]), expected["logits"], atol=2e-5, rtol=0
        )


@pytest.mark.parametrize(
    "axes", [{"fsdp": 8}, {"fsdp": 4, "tensor": 2}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=str
)
def test_eight_devices_read_what_one_device_reads_and_nothing_twice(
    axes, huggingface_directories, monkeypatch
):
    num_read = []

    def counted(stored, name, slices, read_slices=read._read):
        array = read_slices(stored, name, slices)
        num_read.append(array.size)
        return array

    whole = read.read_params(huggingface_directories["llada"], abstract_on(SMALL))
    monkeypatch.setattr(read, "_read", counted)
    sharded = read.read_params(huggingface_directories["llada"], abstract_on(SMALL, 8, **axes))
    assert_equal_params(sharded, jax.device_get(whole))
    assert sum(num_read) == sum(leaf.size for leaf in jax.tree.leaves(whole))
    per_layer = {tensor.path: np.prod(tensor.shape) for tensor in tensors("llada", SMALL)}
    assert max(num_read) == max(per_layer.values()) // 8 * axes.get("data", 1)
    q = sharded["blocks"]["q"]
    assert q.addressable_shards[0].data.size * 8 == q.size * axes.get("data", 1)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16], ids=["bfloat16", "float16"])
def test_half_precision_files_become_float32_without_a_change(dtype, tmp_path):
    params = write_huggingface(tmp_path / "hf", "illada", SMALL, dtype=dtype, num_shards=3)
    ours = read.read_params(tmp_path / "hf", abstract_on(SMALL))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(ours))
    assert_equal_params(
        ours, jax.tree.map(lambda leaf: leaf.astype(dtype).astype(np.float32), params)
    )


def test_two_equal_copies_of_a_tied_embedding_are_read_as_one(tmp_path):
    tied = dataclasses.replace(SMALL, tie_embeddings=True)
    params = write_huggingface(tmp_path / "hf", "illada", tied)
    files = load_file(tmp_path / "hf" / "model.safetensors")
    files["lm_head.weight"] = files["model.embed_tokens.weight"].copy()
    save_file(files, tmp_path / "hf" / "model.safetensors")
    assert_equal_params(read.read_params(tmp_path / "hf", abstract_on(tied)), params)


def test_a_change_of_any_tensor_changes_the_digest(tmp_path):
    write_huggingface(tmp_path / "hf", "llada", SMALL)
    file = tmp_path / "hf" / "model.safetensors"
    tensors, digests = load_file(file), {read.digest(tmp_path / "hf")}
    for name, tensor in tensors.items():
        save_file({**tensors, name: tensor * 1.001}, file)
        digests.add(read.digest(tmp_path / "hf"))
    assert len(digests) == 1 + len(tensors)
    save_file(tensors, file)
    assert read.digest(tmp_path / "hf") in digests


# ---- what is written


@pytest.mark.slow
def test_ids_template_tokenizer_and_source_come_along(imported_workdirs, huggingface_directories):
    run = json.loads((imported_workdirs["llada"] / "run.json").read_text())
    assert run["special_ids"] == {"mask": 257, "eos": 256, "bos": 256, "pad": 256, "eot": 258}
    assert run["chat_template"] == "{{ messages }}"
    assert Architecture(**run["architecture"]) == SMALL
    assert run["architecture"].keys() == dataclasses.asdict(SMALL).keys()
    assert run["config"]["data"]["sequence_length"] == 128
    assert run["config"]["objective"]["name"] == "masked_diffusion"
    assert run["source"]["layout"] == "llada"
    assert run["source"]["config"] == json.loads(
        (huggingface_directories["llada"] / "config.json").read_text()
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (imported_workdirs["llada"] / "tokenizer" / name).read_bytes() == (
            huggingface_directories["llada"] / name
        ).read_bytes()


@pytest.mark.slow
def test_a_workdir_and_its_directory_give_the_same_text(
    imported_workdirs, huggingface_directories, capsys
):
    texts = []
    for checkpoint in (imported_workdirs["llada"], huggingface_directories["llada"]):
        words = ["--prompt", "abc", "--gen-length", "8", "--steps", "2", "--json"]
        assert main(["sample", "--checkpoint", str(checkpoint), *words]) == 0
        texts.append(json.loads(capsys.readouterr().out)["samples"])
    assert texts[0] == texts[1]
    assert len(texts[0][0]["tokens"]) > 0


def test_json_says_what_was_imported(huggingface_directories, tmp_path, capsys):
    argv = [
        "import",
        "--from",
        str(huggingface_directories["llada"]),
        "--output",
        str(tmp_path / "new"),
        "--json",
    ]
    assert main(argv) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["parameters"] == sum(leaf.size for leaf in jax.tree.leaves(abstract_on(SMALL)))
    assert Architecture(**told["architecture"]) == SMALL
    assert (told["layout"], told["mask"]) == ("llada", 257)
    file = tmp_path / "new" / starting_config.NAME
    continued = load_config(str(file), ["data.path=x"])
    assert continued.checkpoint.init_from == str(tmp_path / "new")


@pytest.mark.slow
def test_the_config_that_import_writes_trains_on_from_the_weights(imported_workdirs, tmp_path):
    imported = imported_workdirs["llada"]
    corpus, data = tmp_path / "corpus", tmp_path / "data"
    write_corpus(corpus, num_files=1, num_documents=30)
    as_imported = {"tokenizer": str(imported / "tokenizer"), "heldout": 0.2}
    prepare([str(corpus)], data, sequence_length=32, **as_imported)
    changes = {"data.path": str(data), "num_tokens": 0, "num_steps": 2, "data.batch_size": 8}
    changes |= {"data.sequence_length": 32, "log.tensorboard": False}
    llada_jax.train(imported / starting_config.NAME, tmp_path / "more", changes=changes)
    before, after = (llada_jax.load(workdir).params for workdir in (imported, tmp_path / "more"))
    # AdamW moves a number by the learning rate at most, here 1% and 2% of 2.5e-5.
    for ours, theirs in zip(jax.tree.leaves(after), jax.tree.leaves(before), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6, rtol=1e-6)
    assert np.any(after["embed"] != before["embed"])


def test_an_import_leaves_what_another_writes_or_has_written_in_the_meantime(
    huggingface_directories, tmp_path, capsys, monkeypatch
):
    output = tmp_path / "run"
    words = ["import", "--from", str(huggingface_directories["llada"]), "--output", str(output)]
    load, seen = import_hf.load, []

    def meanwhile(*args):
        # the second one begins while the first one reads the weights
        seen.append((main(words), capsys.readouterr().err))
        return load(*args)

    # As it was when both of them asked: their outputs did not exist.
    check, asked = import_hf.check_output, []
    monkeypatch.setattr(
        import_hf,
        "check_output",
        lambda path: asked.append(path) or (len(asked) < 5 or check(path)),
    )
    monkeypatch.setattr(import_hf, "load", meanwhile)
    assert main(words) == 0
    ((status, said),) = seen
    assert status == 2
    assert "Another import, or a train, is writing into" in said
    before = contents_of(output)
    assert main(words) == 2
    assert "is not empty" in capsys.readouterr().err
    assert contents_of(output) == before
    assert find_checkpoint(str(output))[1] == 0

"""What `llada-jax import` refuses, with nothing left behind: bad directories, flags and disks."""

import dataclasses
import errno
import json
import os
import re
import shutil
import subprocess
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.hf_directories import (
    SMALL,
    our_config,
    write_huggingface,
    write_tokenizer,
    write_weights,
)

import llada_jax
from llada_jax.__main__ import main
from llada_jax.checkpoints.workdir import Checkpoints
from llada_jax.data.tokenizer import load_tokenizer
from llada_jax.data.tokenizer_training import train_sentencepiece
from llada_jax.hf.read import list_tensors
from llada_jax.models.model import make_model

# ---- bad input


def truncated(directory):
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def no_header(directory):
    (directory / "model.safetensors").write_bytes(b"<html>Not found</html>")


def changed(directory, change):
    files = load_file(directory / "model.safetensors")
    change(files)
    save_file(files, directory / "model.safetensors")


def sharded(directory, change=lambda index: None, *, remove=""):
    (directory / "model.safetensors").unlink()
    params = jax.tree.map(
        np.ones_like,
        jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), make_model(SMALL).abstract),
    )
    write_weights(directory, "llada", SMALL, params, num_shards=2)
    file = directory / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    change(index)
    file.write_text(json.dumps(index))
    if remove:
        (directory / remove).unlink()


def linked(directory):
    (directory / SECOND).rename(directory.parent / "elsewhere.safetensors")
    (directory / SECOND).symlink_to(directory.parent / "elsewhere.safetensors")


def config_of(directory, **changes):
    (directory / "config.json").write_text(json.dumps({**our_config("llada", SMALL), **changes}))


def poisoned(files, value):
    files["model.transformer.blocks.1.up_proj.weight"][3, 4] = value


SECOND = "model-00002-of-00002.safetensors"
Q0 = "model.transformer.blocks.0.q_proj.weight"
BAD = {
    "truncated": (truncated, ["model.safetensors", "cut short", "fetch it again"]),
    "no header": (no_header, ["model.safetensors", "damaged", "fetch it again"]),
    "NaN": (
        lambda d: changed(d, lambda f: poisoned(f, np.nan)),
        ["NaN or infinity", "blocks.1.up_proj.weight"],
    ),
    "infinity": (
        lambda d: changed(d, lambda f: poisoned(f, np.inf)),
        ["NaN or infinity", "blocks.1.up_proj.weight"],
    ),
    "missing": (lambda d: changed(d, lambda f: f.pop(Q0)), ["lacks", Q0]),
    "unexpected": (
        lambda d: changed(d, lambda f: f.update({"adapter": np.ones(3)})),
        ["does not expect adapter"],
    ),
    "misshapen": (
        lambda d: changed(d, lambda f: f.update({Q0: f[Q0][:-1]})),
        ["misshapen", "[63, 64] instead of [64, 64]"],
    ),
    "integers": (lambda d: changed(d, lambda f: f.update({Q0: f[Q0].astype(np.int8)})), [Q0, "I8"]),
    "missing shard": (
        lambda d: sharded(d, remove=SECOND),
        [SECOND, "lacks", "fetch the whole checkpoint"],
    ),
    "shard with a name that no disk has": (
        lambda d: sharded(d, lambda i: i["weight_map"].update({Q0: "a" * 300})),
        ["lacks aaa", "fetch the whole checkpoint"],
    ),
    "wrong index": (
        lambda d: sharded(d, lambda i: i["weight_map"].update({Q0: SECOND})),
        ["disagree about", Q0],
    ),
    "outside": (
        lambda d: sharded(d, lambda i: i["weight_map"].update({Q0: "../secret.safetensors"})),
        ["lists ../secret.safetensors", "outside of its directory", "source that you trust"],
    ),
    "absolute": (
        lambda d: sharded(d, lambda i: i["weight_map"].update({Q0: "/etc/passwd"})),
        ["lists /etc/passwd", "outside of its directory"],
    ),
    "unlisted": (lambda d: sharded(d, lambda i: i["weight_map"].pop(Q0)), ["disagree about", Q0]),
    "no map": (lambda d: sharded(d, lambda i: i.pop("weight_map")), ["has no weight_map"]),
    "no index": (
        lambda d: sharded(d) or (d / "model.safetensors.index.json").unlink(),
        ["neither", "model-00001-of-00002.safetensors"],
    ),
    "no weights": (
        lambda d: (d / "model.safetensors").unlink(),
        ["neither model.safetensors nor", "no weights"],
    ),
    "no config": (lambda d: (d / "config.json").unlink(), ["config.json", "cannot be read"]),
    "damaged config": (
        lambda d: (d / "config.json").write_text("{"),
        ["config.json is not valid JSON"],
    ),
    "listed config": (lambda d: (d / "config.json").write_text("[]"), ["config.json holds a list"]),
    "unknown architecture": (
        lambda d: config_of(d, model_type="mamba"),
        ["model_type='mamba'", "illada"],
    ),
    "mixture of experts": (
        lambda d: config_of(d, num_experts=64),
        ["num_experts=64", "mixture of experts"],
    ),
    "sizes below one": (
        lambda d: config_of(d, n_layers=-2),
        ["n_layers=-2 must be greater than or equal to 1"],
    ),
    "a size in words": (
        lambda d: config_of(d, max_sequence_length="4k"),
        ["max_sequence_length='4k' must be a whole number"],
    ),
    "a list for a number": (
        lambda d: config_of(d, rope_theta=[1e4]),
        ["rope_theta=[10000.0] must be a number"],
    ),
    "no rotary base": (
        lambda d: config_of(d, rope_theta=0),
        ["rope_theta=0 must be greater than 0"],
    ),
    "mask without a row": (
        lambda d: config_of(d, mask_token_id=320),
        ["mask_token_id=320 is not an id of the embedding", "320 rows"],
    ),
    "negative mask": (lambda d: config_of(d, mask_token_id=-1), ["mask_token_id=-1 must be"]),
    "mask that is also EOS": (
        lambda d: config_of(d, eos_token_id=[256, 257]),
        ["mask_token_id=257 and eos_token_id=[256, 257] are the same token"],
    ),
    "deep JSON": (
        lambda d: (d / "config.json").write_text('{"a":' + "[" * 100_000),
        ["config.json is nested too deeply"],
    ),
    "JSON in another encoding": (
        lambda d: (d / "config.json").write_bytes(b'{"model_type": "\xff"}'),
        ["config.json is not valid JSON"],
    ),
    "half of a surrogate pair": (
        lambda d: (d / "config.json").write_text('{"model_type": "\\ud800"}'),
        ["config.json is not valid JSON", "surrogates not allowed"],
    ),
    "generation config": (
        lambda d: (d / "generation_config.json").write_text('{"eos_token_id": "two"}'),
        ["generation_config.json: eos_token_id='two' must be a whole number"],
    ),
    "listed tokenizer": (
        lambda d: (d / "tokenizer.json").write_text("[1]"),
        ["tokenizer.json holds a list"],
    ),
    "odd added tokens": (
        lambda d: (d / "tokenizer.json").write_text('{"model": {}, "added_tokens": null}'),
        ["tokenizer.json: added_tokens=None must be a list"],
    ),
    "listed tokenizer config": (
        lambda d: (d / "tokenizer_config.json").write_text("[]"),
        ["tokenizer_config.json holds a list"],
    ),
    "a number for a token": (
        lambda d: (d / "tokenizer_config.json").write_text('{"eos_token": 7}'),
        ["tokenizer_config.json: eos_token=7 must be a text"],
    ),
    "an index of a link that leaves": (
        lambda d: sharded(d) or linked(d),
        [SECOND, "a link to a file outside of"],
    ),
    "other network": (lambda d: config_of(d, alibi=True), ["alibi=True"]),
    "long tokenizer": (
        lambda d: write_tokenizer(d, *(f"<|mask|>{i}" if i else "<|mask|>" for i in range(90))),
        ["347 ids", "320 rows"],
    ),
}


@pytest.fixture
def refused(capsys):
    """Returns refused(argv, says): the command exits 2 with one sentence, and its output is not
    there.
    """

    def refused(argv: list[str], says: list[str]) -> None:
        assert main(argv) == 2
        out, err = capsys.readouterr()
        assert out == ""
        *progress, sentence = err.splitlines()
        assert all(line.startswith("llada-jax: reading") for line in progress)
        assert all(words in sentence for words in says), sentence

    return refused


@pytest.fixture(scope="module")
def ours():
    texts = ["in the house of the mouse, on the hill by the mill\n"] * 20
    return train_sentencepiece(texts, vocab_size=290, model_type="bpe")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("whole") / "hf"
    write_huggingface(directory, "llada", SMALL)
    return directory


def test_the_links_of_the_hubs_cache_are_followed(whole, tmp_path):
    repository = tmp_path / "models--me--model"
    directory = repository / "snapshots" / "abc"
    shutil.copytree(whole, directory)
    sharded(directory)
    (repository / "blobs").mkdir()
    (directory / SECOND).rename(repository / "blobs" / "digest")
    (directory / SECOND).symlink_to("../../blobs/digest")
    assert Q0 in list_tensors(directory)


def test_a_tokenizer_model_alone_is_imported_with_the_ids_of_the_config(whole, tmp_path, ours):
    directory = tmp_path / "hf"
    shutil.copytree(whole, directory)
    (directory / "tokenizer.json").unlink()
    (directory / "tokenizer.model").write_bytes(ours.files["sentencepiece.model"])
    config_of(directory, mask_token_id=319)
    assert main(["import", "--from", str(directory), "--output", str(tmp_path / "out")]) == 0
    loaded = load_tokenizer(tmp_path / "out" / "tokenizer")
    assert (loaded.kind, loaded.mask_id, loaded.eos_id) == ("sentencepiece", 319, 256)
    assert loaded.encode("in the house") == ours.encode("in the house")


@pytest.mark.parametrize("fault", BAD)
def test_a_bad_directory_is_refused_in_one_sentence_with_nothing_left_behind(
    fault, whole, tmp_path, refused
):
    spoil, says = BAD[fault]
    directory, output = tmp_path / "hf", tmp_path / "out"
    shutil.copytree(whole, directory)
    spoil(directory)
    refused(["import", "--from", str(directory), "--output", str(output)], says)
    assert not output.exists()


@pytest.mark.slow
def test_code_in_a_directory_is_never_run(whole, tmp_path):
    """Only `export --verify` runs code, and only that of its own export."""
    directory, mark = tmp_path / "hf", tmp_path / "it-ran"
    shutil.copytree(whole, directory)
    code = f"open({str(mark)!r}, 'w').close()\n"
    for name in ("modeling_llada", "configuration_llada", "tokenization_x", "__init__", "setup"):
        (directory / f"{name}.py").write_text(code)
    auto_map = {
        "AutoConfig": "configuration_llada.LLaDAConfig",
        "AutoModel": "modeling_llada.LLaDAModelLM",
        "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM",
        "AutoTokenizer": ["tokenization_x.X", None],
    }
    for file in (directory / "config.json", directory / "tokenizer_config.json"):
        file.write_text(json.dumps({**json.loads(file.read_text()), "auto_map": auto_map}))
    assert main(["import", "--from", str(directory), "--output", str(tmp_path / "out")]) == 0
    words = ["--gen-length", "4", "--steps", "2", "--block-length", "4", "--prompt", "a"]
    assert main(["sample", "--checkpoint", str(directory), *words]) == 0
    assert (
        main(["export", "--checkpoint", str(tmp_path / "out"), "--output", str(tmp_path / "e")])
        == 0
    )
    assert not mark.exists()
    # No other file of the package may ask transformers to run what it finds.
    asking = re.compile(r"from_pretrained\([^)]*trust_remote_code=True", re.DOTALL)
    package = Path(llada_jax.__file__).parent
    found = [path for path in package.rglob("*.py") if asking.search(path.read_text())]
    assert sorted(path.relative_to(package).as_posix() for path in found) == [
        "hf/card.py",  # which writes the line into the model card
        "hf/verify.py",
    ]


def test_tied_copies_that_differ_are_refused(tmp_path, refused):
    write_huggingface(tmp_path / "hf", "illada", dataclasses.replace(SMALL, tie_embeddings=True))
    changed(
        tmp_path / "hf", lambda f: f.update({"lm_head.weight": f["model.embed_tokens.weight"] + 1})
    )
    argv = ["import", "--from", str(tmp_path / "hf"), "--output", str(tmp_path / "out")]
    refused(argv, ["ties head and embedding", "lm_head.weight differs", "tie_word_embeddings"])
    assert not (tmp_path / "out").exists()


def test_bad_flags_are_refused(whole, tmp_path, refused, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    out = ["--output", str(tmp_path / "out")]
    cases = [
        (
            ["--from", str(tmp_path / "absent"), *out],
            ["absent", "neither a directory with a config.json"],
        ),
        (["--from", str(tmp_path), *out], ["neither a directory with a config.json"]),
        (
            ["--from", "nobody/nothing", *out],
            ["nobody/nothing", "cannot be downloaded", "give its directory"],
        ),
        (["--from", str(whole), "--output", str(whole)], ["not empty"]),
        (["--from", str(whole), "--output", "http://a/b"], ["Unknown kind of URL 'http'"]),
        (
            ["--from", str(whole), *out, "--causal"],
            ["masked diffusion model", "leave the flag out"],
        ),
        (["--from", str(whole), *out, "--mask-token", "<|no|>"], ["no token '<|no|>'"]),
        (
            ["--from", str(whole), *out, "--mesh", "fdsp=8"],
            ["no axis 'fdsp'", "Did you mean 'fsdp'"],
        ),
        (["--from", str(whole), *out, "--mesh", "fsdp"], ["is not a size", "fsdp=8"]),
        (["--from", str(whole), *out, "--mesh", "tensor=8"], ["key/value heads=4", "8 ways"]),
        (["--from", str(whole), *out, "--mesh", "fsdp=3"], ["needs 3 devices"]),
    ]
    for argv, says in cases:
        refused(["import", *argv], says)
        assert not (tmp_path / "out").exists()


# ---- the disk


def test_a_full_or_read_only_disk_leaves_nothing_behind(whole, mount, refused):
    disk = mount("size=300k")  # the weights are 400 kB
    argv = ["import", "--from", str(whole), "--output", str(disk / "out")]
    refused(argv, ["free space"])
    assert list(disk.iterdir()) == []
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    refused(argv, ["cannot be written", "Read-only file system"])


def test_what_is_written_after_the_failure_is_removed_too(whole, tmp_path, monkeypatch, refused):
    late = []

    def save(saved, state, record):
        def write():
            for _ in range(4):
                time.sleep(0.2)
                file = saved.directory / "0.partial" / "params" / "array"
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text("late")

        late.append(threading.Thread(target=write))
        late[0].start()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Checkpoints, "save", save)
    refused(["import", "--from", str(whole), "--output", str(tmp_path / "out")], ["No space left"])
    late[0].join()
    assert list(tmp_path.iterdir()) == []


def test_an_output_below_a_file_is_refused(whole, tmp_path, refused):
    (tmp_path / "file").write_text("keep me")
    refused(
        ["import", "--from", str(whole), "--output", str(tmp_path / "file" / "out")],
        ["cannot be written", "file"],
    )
    assert (tmp_path / "file").read_text() == "keep me"

"""What `llada-jax export` refuses, and what the Hub refuses."""

from pathlib import Path

import numpy as np
import pytest
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

import llada_jax
import llada_jax.verbs.export
from llada_jax.__main__ import main
from llada_jax.config import default_config
from llada_jax.errors import UserError
from llada_jax.storage.arrays import read_chunks


@pytest.mark.slow
def test_what_cannot_be_exported_is_refused_with_the_reason(
    random_checkpoint, tmp_path, refused_export
):
    out = tmp_path / "out"
    ours = ["--checkpoint", random_checkpoint]
    assert "'5 loaves' is not a size" in refused_export(
        *ours, "--shard-size", "5 loaves", output=out
    )
    assert "'0GB' is not a size" in refused_export(*ours, "--shard-size", "0GB", output=out)
    assert "cannot be written" in refused_export(*ours, "--layout", "llama", output=out)
    assert "no checkpoint of step 9" in refused_export(
        "--checkpoint", f"{random_checkpoint}@9", output=out
    )
    assert "holds no checkpoints" in refused_export("--checkpoint", tmp_path, output=out)
    assert "is not a Jinja template" in refused_export(
        *ours, "--chat-template", _file(tmp_path / "bad.jinja", "{% if %}"), output=out
    )
    assert "cannot be read" in refused_export(
        *ours, "--chat-template", tmp_path / "absent", output=out
    )
    with pytest.raises(UserError, match="must be a local or mounted directory"):
        llada_jax.verbs.export.main(
            ["--checkpoint", str(random_checkpoint), "--output", "gs://bucket/out"]
        )
    plain = write_checkpoint(tmp_path / "plain", LLADA, random_params(LLADA))
    assert "kept no moving average" in refused_export("--checkpoint", plain, "--ema", output=out)
    per_head = ARCHITECTURES["illada, qk_norm per head"]
    other = write_checkpoint(tmp_path / "other", per_head, random_params(per_head))
    assert "qk_norm='per_head' has no key in it" in refused_export(
        "--checkpoint", other, "--layout", "llada", output=out
    )
    described = {"kind": "bytes", "vocab_size": 260, "fingerprint": "f" * 64}
    stranger = write_checkpoint(
        tmp_path / "stranger", LLADA, random_params(LLADA), tokenizer=described
    )
    assert "is not the tokenizer of the checkpoint" in refused_export(
        "--checkpoint", stranger, output=out
    )


@pytest.mark.parametrize(
    ("name", "mask", "seen"),
    [
        ("autoregressive", None, "to the left alone"),
        ("own", {"causal": True, "block_length": 0}, "to the left alone"),
        ("own", {"causal": False, "block_length": 8}, "to its own block of 8 positions and those"),
    ],
)
def test_a_network_that_does_not_attend_in_both_directions_is_refused(
    name, mask, seen, tmp_path, refused_export
):
    config = default_config().to_dict()
    config["objective"]["name"] = name
    changes = {"config": config, "mask": mask}
    run = write_checkpoint(tmp_path / "run", LLADA, random_params(LLADA), **changes)
    sentence = refused_export("--checkpoint", run, output=tmp_path / "out")
    assert f"attends {seen}" in sentence
    assert "the layouts of LLaDA attend in both directions" in sentence


@pytest.mark.slow
def test_parameters_that_the_network_does_not_have_are_named_and_not_called_damage(
    tmp_path, refused_export
):
    params = random_params(LLADA)
    params["blocks"]["gate"] = np.ones((3, 4), np.float32)
    run = write_checkpoint(tmp_path / "run", LLADA, params)
    sentence = refused_export("--checkpoint", run, output=tmp_path / "out")
    assert "holds blocks/gate, which the network of its record does not have" in sentence
    with pytest.raises(UserError, match="holds blocks/gate, which the network"):
        llada_jax.load(run)
    del params["blocks"]["gate"], params["blocks"]["ff_up"]
    run = write_checkpoint(tmp_path / "less", LLADA, params)
    sentence = refused_export("--checkpoint", run, output=tmp_path / "out")
    assert "lacks blocks/ff_up, which the network of its record has" in sentence


def _file(path: Path, content: str) -> Path:
    path.write_text(content)
    return path


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_no_numbers_are_refused_by_name(value, tmp_path, refused_export):
    params = random_params(LLADA)
    params["blocks"]["ff_up"][1, 2, 3] = value
    run = write_checkpoint(tmp_path / "run", LLADA, params)
    assert "blocks/ff_up of layer 1 holds NaN or infinity" in refused_export(
        "--checkpoint", run, output=tmp_path / "out"
    )


def test_a_damaged_checkpoint_is_refused(random_checkpoint, tmp_path, refused_export):
    import shutil

    run = Path(shutil.copytree(random_checkpoint, tmp_path / "run"))
    for file in (run / "checkpoints" / "7" / "params").rglob("d/*"):
        content = bytearray(file.read_bytes())
        for i in range(50, len(content), 101):
            content[i] ^= 0x10
        file.write_bytes(content)
    sentence = refused_export("--checkpoint", run, output=tmp_path / "out")
    assert "cannot be read" in sentence
    assert str(run / "checkpoints" / "7") in sentence


def test_a_flipped_number_is_found_by_its_checksum(
    random_checkpoint, tmp_path, refused_export, monkeypatch
):
    def flipped(store):
        array = real(store)
        if array.shape == (3, 32, 4, 8):
            array.view(np.uint32)[1, 2, 3, 4] ^= 1 << 20
        return array

    real = read_chunks
    monkeypatch.setattr("llada_jax.checkpoints.layers.read_chunks", flipped)
    sentence = refused_export("--checkpoint", random_checkpoint, output=tmp_path / "out")
    assert "params/blocks/q does not match its saved checksum" in sentence


# ---- the Hub


@pytest.mark.slow
def test_the_hub_gets_the_whole_directory_in_a_private_repository(
    random_checkpoint, tmp_path, capfd, monkeypatch
):
    calls = []
    monkeypatch.setattr("huggingface_hub.HfApi", FakeHub(calls))
    out = export(random_checkpoint, tmp_path / "out", "--push-to-hub", "me/model")
    assert [name for name, _, _ in calls] == ["whoami", "create_repo", "upload_folder"]
    assert calls[1][1:] == (
        ("me/model",),
        {"repo_type": "model", "private": True, "exist_ok": True},
    )
    uploaded = calls[2][2]
    assert uploaded["repo_id"] == "me/model"
    assert uploaded["files"] == sorted(contents_of(out))
    assert "custom_generate/generate.py" in uploaded["files"]
    assert 'from_pretrained("me/model"' in (out / "README.md").read_text()
    assert "uploaded to me/model" in capfd.readouterr().out


@pytest.mark.slow
def test_a_hub_that_refuses_is_reported_before_the_work_and_an_upload_that_fails_keeps_the_export(
    random_checkpoint, tmp_path, refused_export, monkeypatch, capfd
):
    out = tmp_path / "out"
    assert "must be a repository such as" in refused_export(
        "--checkpoint", random_checkpoint, "--push-to-hub", "model", output=out
    )
    monkeypatch.setattr("huggingface_hub.HfApi", FakeHub([], fails_at="whoami"))
    sentence = refused_export(
        "--checkpoint", random_checkpoint, "--push-to-hub", "me/model", output=out
    )
    assert "you are not logged in to the Hub (whoami answers 403 Forbidden)" in sentence
    monkeypatch.setattr("huggingface_hub.HfApi", FakeHub([], fails_at="upload_folder"))
    assert (
        main(
            [
                "export",
                "--checkpoint",
                str(random_checkpoint),
                "--output",
                str(out),
                "--push-to-hub",
                "me/model",
            ]
        )
        == 2
    )
    assert f"{out} is complete, but me/model did not take it" in capfd.readouterr().err
    assert_same_params(
        read_back(out, LLADA), read_back(export(random_checkpoint, tmp_path / "again"), LLADA)
    )

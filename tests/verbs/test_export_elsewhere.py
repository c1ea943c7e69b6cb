"""A trained model in transformers, without this package, and `--verify`."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from support.datasets import SEQUENCE_LENGTH
from support.exports import ARCHITECTURES, export, write_checkpoint
from support.hf_directories import random_params
from support.runs import metric_lines
from support.transformers_versions import VERSIONS, run_python

import llada_jax
from llada_jax.data.records import Records, read_dataset
from llada_jax.data.tokenizer import load_tokenizer
from llada_jax.hf import write

ELSEWHERE = """
import json, sys
import numpy as np, torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

def load(auto):
    return auto.from_pretrained(directory, trust_remote_code=True)

directory, asked, out = sys.argv[1:]
asked = np.load(asked)
model = load(AutoModelForCausalLM).eval()
assert type(load(AutoModel)).__name__ == type(model).__name__
assert load(AutoConfig).mask_token_id == int(asked["mask_id"])
tokens, noisy, p_mask = (torch.from_numpy(asked[name]) for name in ("tokens", "noisy", "p_mask"))
with torch.no_grad():
    logits = model(noisy).logits
is_masked = noisy != tokens
nll = torch.nn.functional.cross_entropy(
    logits[is_masked].float(), tokens[is_masked], reduction="none")
nelbo = (nll / p_mask[:, None].expand_as(tokens)[is_masked]).sum() / tokens.numel()
prompts = torch.from_numpy(asked["prompts"])
canvases = [
    model.generate_diffusion(prompts, gen_length=16, block_length=length, steps=steps)
    for length, steps in ((16, 16), (8, 8))
]
text = AutoTokenizer.from_pretrained(directory).decode(prompts[0])
np.savez(out, logits=logits.float().numpy(), nelbo=nelbo.numpy(),
         canvases=torch.stack(canvases).numpy(), dtype=str(logits.dtype), text=text)
"""


@pytest.fixture(scope="module")
def trained(runs) -> Path:
    """A run of the small model that has learned something, with its held-out bound in
    metrics.jsonl.
    """
    workdir = runs.directory / "to-export"
    runs.train(workdir, "num_steps=60", "evaluation.every_steps=0", "checkpoint.every_steps=60")
    return workdir


@pytest.fixture(scope="module")
def asked(runs) -> dict:
    """Held-out rows, a corruption of them, and prompts: what ours and theirs are both asked."""
    rows = Records(read_dataset(runs.dataset), split="heldout")
    tokens_BT = np.stack([rows[i]["tokens"] for i in range(16)]).astype(np.int64)
    rng = np.random.default_rng(0)
    p_mask_B = rng.uniform(0.05, 1.0, size=16).astype(np.float32)
    noisy_BT = np.where(
        rng.random(tokens_BT.shape) < p_mask_B[:, None], load_tokenizer("bytes").mask_id, tokens_BT
    )
    return {
        "tokens": tokens_BT,
        "noisy": noisy_BT,
        "p_mask": p_mask_B,
        "prompts": tokens_BT[:3, :12],
        "mask_id": 256,
    }


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
def test_a_trained_model_is_the_same_in_transformers_without_this_package(
    version, trained, asked, tmp_path
):
    out = export(trained, tmp_path / "exported", "--dtype", "float32")
    np.savez(tmp_path / "asked.npz", **asked)
    run_python(
        version, ELSEWHERE, out, tmp_path / "asked.npz", tmp_path / "theirs.npz", home=tmp_path
    )
    theirs = np.load(tmp_path / "theirs.npz")
    ours = llada_jax.load(str(trained))
    logits_BTV = np.asarray(ours.logits(asked["noisy"]))
    assert str(theirs["dtype"]) == "torch.float32"
    np.testing.assert_allclose(theirs["logits"], logits_BTV, atol=1e-4)
    # the bound on the same noisy rows
    log_p = logits_BTV - np.log(np.exp(logits_BTV.astype(np.float64)).sum(-1, keepdims=True))
    nll_BT = -np.take_along_axis(log_p, asked["tokens"][..., None], -1)[..., 0]
    weighted_BT = np.where(
        asked["noisy"] != asked["tokens"], nll_BT / asked["p_mask"][:, None], 0.0
    )
    assert float(theirs["nelbo"]) == pytest.approx(weighted_BT.sum() / weighted_BT.size, rel=1e-5)
    assert float(theirs["nelbo"]) < 5.0  # log 320 = 5.77 is what an untrained model scores
    # what is most likely, block after block
    for canvas_BT, (block_length, steps) in zip(theirs["canvases"], ((16, 16), (8, 8))):
        settings = {
            "gen_length": 16,
            "block_length": block_length,
            "steps": steps,
            "temperature": 0.0,
        }
        np.testing.assert_array_equal(canvas_BT, ours.generate_tokens(asked["prompts"], **settings))
    assert str(theirs["text"]) == ours.tokenizer.decode(asked["prompts"][0])
    # and the card has the bound of the whole split
    bound = metric_lines(trained, "final")[-1]["final"]
    assert (
        f"{bound['nelbo']:.4f} +- {bound['standard_error']:.4f} nats"
        in (out / "README.md").read_text()
    )
    assert (
        f"{60 * 16 * SEQUENCE_LENGTH:,} tokens seen in 60 steps" in (out / "README.md").read_text()
    )


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
def test_the_other_layout_loads_from_shards_in_transformers(version, asked, tmp_path):
    biased = ARCHITECTURES["illada, biased, shifted, wide heads"]
    a = dataclasses.replace(biased, qk_norm="per_head", rope_scaling=(8.0, 1.0, 4.0, 40.0))
    params = random_params(a, seed=3)
    out = export(
        write_checkpoint(tmp_path / "run", a, params),
        tmp_path / "out",
        "--dtype",
        "float32",
        "--shard-size",
        "30KB",
    )
    assert len(list(out.glob("*.safetensors"))) > 2
    np.savez(tmp_path / "asked.npz", **asked)
    run_python(
        version, ELSEWHERE, out, tmp_path / "asked.npz", tmp_path / "theirs.npz", home=tmp_path
    )
    ours = np.asarray(llada_jax.load(str(tmp_path / "run")).logits(asked["noisy"]))
    np.testing.assert_allclose(np.load(tmp_path / "theirs.npz")["logits"], ours, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_verify_reports_how_near_the_export_is(dtype, trained, tmp_path, capfd):
    out = export(trained, tmp_path / "out", "--dtype", dtype, "--verify", "--json")
    found = json.loads(capfd.readouterr().out)["verify"]
    assert found["tokens"] == "held-out"
    assert found["num_tokens"] == 256
    assert found["relative_difference"] < 1e-5
    assert 0 <= found["kl_nats"] < {"float32": 1e-9, "bfloat16": 1e-3}[dtype]
    assert (out / "config.json").exists()


@pytest.mark.slow
def test_verify_keeps_nothing_of_an_export_that_is_another_network(
    random_checkpoint, tmp_path, refused_export, monkeypatch
):
    def swapped(directory, shard, tensor, array, *, dtype):
        other = {"blocks/ff_gate": "up_proj", "blocks/ff_up": "ff_proj"}.get(tensor.path)
        name = f"model.transformer.blocks.{tensor.layer}.{other}.weight" if other else tensor.name
        real(directory, shard, dataclasses.replace(tensor, name=name), array, dtype=dtype)

    real = write.put
    monkeypatch.setattr("llada_jax.hf.write.put", swapped)
    sentence = refused_export(
        "--checkpoint", random_checkpoint, "--verify", output=tmp_path / "out", status=3
    )
    assert "PyTorch's logits differ from ours" in sentence

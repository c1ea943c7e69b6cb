"""`llada-jax import` of Llama and Qwen weights, and training that starts from imported weights."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.hf_directories import SMALL, write_tokenizer
from support.imports import LLAMA3, QWEN, abstract_on, assert_equal_params, small_config
from support.runs import metric_lines
from support.transformers_versions import VERSIONS, run_python

import llada_jax
from llada_jax.__main__ import main
from llada_jax.config import load_config
from llada_jax.hf import read
from llada_jax.masks import CAUSAL
from llada_jax.models.model import make_model
from llada_jax.models.transformer import Architecture
from llada_jax.training.step import architecture_of

# ---- from Llama and Qwen weights


@pytest.mark.slow
def test_a_causal_model_gets_a_mask_row_and_a_shift_and_keeps_all_else(
    imported_workdirs, huggingface_directories, tmp_path
):
    run = json.loads((imported_workdirs["qwen"] / "run.json").read_text())
    assert run["special_ids"]["mask"] == 257  # after its 257 tokens
    assert Architecture(**run["architecture"]) == dataclasses.replace(
        QWEN, vocab_size=320, output_shift=True
    )
    ours = jax.device_get(llada_jax.load(imported_workdirs["qwen"]).params)
    theirs = jax.device_get(read.read_params(huggingface_directories["qwen"], abstract_on(QWEN)))
    assert_equal_params({**ours, "embed": ours["embed"][:257]}, theirs)


@pytest.mark.slow
def test_a_causal_control_gives_the_causal_logits(imported_workdirs, huggingface_directories):
    tokens = np.arange(30).reshape(2, 15) % 7
    raw = make_model(QWEN, mask=CAUSAL)
    positions = jnp.broadcast_to(jnp.arange(15), tokens.shape)
    params = read.read_params(huggingface_directories["qwen"], abstract_on(QWEN))
    expected = jax.jit(raw.logits_fn)(params, jnp.asarray(tokens), None, positions)
    for checkpoint in (imported_workdirs["causal"], huggingface_directories["qwen"]):
        model = llada_jax.load(checkpoint)
        assert model.config["objective"]["name"] == "autoregressive"
        assert not model.run["architecture"]["output_shift"]
        np.testing.assert_allclose(model.logits(tokens)[..., :257], expected, atol=1e-6, rtol=0)


MAKE_LLAMA3 = """
import numpy, torch, transformers
torch.manual_seed(0)
config = transformers.LlamaConfig(
    vocab_size=320, num_hidden_layers=2, hidden_size=64, num_attention_heads=8,
    num_key_value_heads=4, head_dim=8, intermediate_size=96, rms_norm_eps=1e-6,
    tie_word_embeddings=True, eos_token_id=256, max_position_embeddings=320, rope_theta=100.0,
    rope_scaling={"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                  "high_freq_factor": 4.0, "original_max_position_embeddings": 40})
model = transformers.LlamaForCausalLM(config).eval()
tokens = torch.randint(0, 256, (2, 100))
with torch.no_grad():
    for parameter in model.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    logits = model(tokens).logits
model.save_pretrained(sys.argv[1])
numpy.savez(sys.argv[2], tokens=tokens.numpy(), logits=logits.numpy())
"""


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
def test_llama_3_is_imported_as_what_it_is_and_as_a_start_with_its_scaled_frequencies(
    version, tmp_path, capsys
):
    source = tmp_path / "llama"
    run_python(version, MAKE_LLAMA3, source, tmp_path / "expected.npz", home=tmp_path)
    write_tokenizer(source)
    expected = np.load(tmp_path / "expected.npz")
    assert (
        main(["import", "--from", str(source), "--output", str(tmp_path / "causal"), "--causal"])
        == 0
    )
    assert (
        "config.model.rope_scaling = (8.0, 1.0, 4.0, 40.0)" in capsys.readouterr().out.splitlines()
    )
    for checkpoint in (source, tmp_path / "causal"):
        model = llada_jax.load(checkpoint)
        assert model.config["model"]["rope_scaling"] == [8.0, 1.0, 4.0, 40.0]
        np.testing.assert_allclose(
            model.logits(expected["tokens"]), expected["logits"], atol=1e-4, rtol=0
        )
    assert main(["import", "--from", str(source), "--output", str(tmp_path / "adapted")]) == 0
    lines = [
        line for line in capsys.readouterr().out.splitlines() if line.startswith("config.model")
    ]
    model = llada_jax.load(tmp_path / "adapted")
    a = dataclasses.replace(LLAMA3, output_shift=True)
    assert Architecture(**model.run["architecture"]) == a
    config = load_config(small_config(tmp_path, tmp_path, tmp_path / "adapted", *lines))
    assert architecture_of(config.model, model.tokenizer) == a
    tokens = jnp.asarray(expected["tokens"])
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    (
        shifted,
        unscaled,
    ) = (  # under a causal mask the start is Llama, shifted, but for the new row of the mask token
        jax.jit(make_model(b, mask=CAUSAL).logits_fn)(model.params, tokens, None, positions)[
            :, 1:, :257
        ]
        for b in (a, dataclasses.replace(a, rope_scaling=()))
    )
    np.testing.assert_allclose(shifted, expected["logits"][:, :-1, :257], atol=1e-4, rtol=0)
    assert jnp.abs(shifted - unscaled).max() > 0.1


def test_a_new_row_is_drawn_like_the_trained_ones_and_the_same_on_any_mesh():
    a = dataclasses.replace(SMALL, vocab_size=2048)
    rng = np.random.default_rng(0)
    std_D = rng.uniform(0.01, 0.1, 64)
    embed = (0.02 + std_D * rng.normal(size=(2048, 64))).astype(np.float32)
    embed[1024:] = 0.0
    is_new_V, is_trained_V = np.arange(2048) >= 1024, np.arange(2048) < 1000
    tables = []
    for sizes in ({}, {"num_devices": 8, "fsdp": 4, "tensor": 2}):
        leaf = abstract_on(a, **sizes)["embed"]
        params = {"embed": jax.device_put(embed, leaf.sharding), "lm_head": jax.device_put(embed.T)}
        filled = read.fill_rows(params, is_new_V=is_new_V, is_trained_V=is_trained_V)
        assert filled["embed"].sharding == leaf.sharding
        tables.append(jax.device_get(filled))
    new = tables[0]["embed"][1024:]
    np.testing.assert_array_equal(tables[0]["embed"][:1024], embed[:1024])
    # 1024 draws: a mean is off by 5 standard errors, and a standard deviation by 5 of 1/sqrt(2n),
    # with p < 1e-6 a column
    mean, std = embed[:1000].mean(axis=0), embed[:1000].std(axis=0)
    assert (np.abs(new.mean(axis=0) - mean) < 5 * std / 32).all()
    assert (np.abs(new.std(axis=0) / std - 1) < 5 / np.sqrt(2 * 1024)).all()
    np.testing.assert_array_equal(tables[0]["lm_head"][:, :1024], embed.T[:, :1024])
    assert tables[0]["lm_head"][:, 1024:].std() > 0.01
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, atol=1e-6), *tables)


@pytest.mark.slow
def test_a_mask_row_of_zeros_blows_the_gradient_up_and_ours_does_not(imported_workdirs):
    """The explosion that LLaDA2.0 describes, and the reason for `fill_rows`."""
    model = llada_jax.load(imported_workdirs["qwen"])
    mask_id = model.tokenizer.mask_id
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 256, (4, 24)))
    is_masked = jnp.arange(24) % 2 == jnp.arange(4)[:, None] % 2
    positions = jnp.broadcast_to(jnp.arange(24), tokens.shape)

    @jax.jit
    def gradient_norm(embed):
        def loss(embed):
            noisy = jnp.where(is_masked, mask_id, tokens)
            scores = model.model.nll_fn(
                {**model.params, "embed": embed}, noisy, tokens, is_masked, None, positions
            )
            return scores.nll_BT.sum() / is_masked.sum()

        return jnp.linalg.norm(jax.grad(loss)(embed))

    embed = model.params["embed"]
    ours, zeros, small = (
        gradient_norm(embed.at[mask_id].multiply(factor)) for factor in (1.0, 0.0, 1e-3)
    )
    assert ours < 10
    assert zeros > 30 * ours
    assert small > 10 * ours


# ---- training


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text(
        "".join(f"the cat sat on mat {i} and the dog sat on the cat\n" for i in range(80))
    )
    return text


@pytest.mark.slow
@pytest.mark.parametrize(("name", "start"), [("llada", "workdir"), ("qwen", "directory")])
def test_training_starts_from_a_workdir_or_a_directory_with_a_sane_gradient(
    name, start, imported_workdirs, huggingface_directories, corpus, tmp_path, capsys
):
    source = (imported_workdirs if start == "workdir" else huggingface_directories)[name]
    tokenizer = [source / "tokenizer"] if start == "workdir" else [source, "--add-mask-token"]
    data, workdir = tmp_path / "data", tmp_path / "run"
    words = [
        "--sequence-length",
        "16",
        "--documents",
        "line",
        "--heldout",
        "0.2",
        "--tokenizer",
        *tokenizer,
    ]
    assert main(["prepare", "--input", str(corpus), "--output", str(data), *map(str, words)]) == 0
    assert (
        main(
            [
                "import",
                "--from",
                str(huggingface_directories[name]),
                "--output",
                str(tmp_path / "w"),
            ]
        )
        == 0
    )
    capsys_lines = capsys.readouterr().out.splitlines()
    # what import says to write
    model = [line for line in capsys_lines if line.startswith("config.model")]
    config = small_config(tmp_path, data, source, *model)
    assert main(["train", "--config", config, "--workdir", str(workdir)]) == 0
    assert "start       weights of step 0 of" in capsys.readouterr().err
    numbers = [line["train"] for line in metric_lines(workdir, "train")]
    assert len(numbers) == 4
    assert all(0.01 < line["grad_norm"] < 100 and np.isfinite(line["loss"]) for line in numbers)
    before = llada_jax.load(imported_workdirs[name])
    after = llada_jax.load(workdir)
    if start == "workdir":  # which is where weights come from, and not a run to continue
        assert main(["train", "--config", config, "--workdir", str(tmp_path / "w")]) == 2
        assert "was trained on other data" in capsys.readouterr().err
    moved = jax.tree.map(
        lambda one, other: float(jnp.abs(one - other).max()), before.params, after.params
    )
    # four AdamW steps of 1e-3 from the imported weights
    assert max(jax.tree.leaves(moved)) < 4 * 1e-3 * 1.5
    assert after.run["architecture"] == before.run["architecture"]


@pytest.mark.slow
def test_an_autoregressive_run_starts_from_a_directory_at_the_likelihood_that_evaluate_reports(
    huggingface_directories, imported_workdirs, corpus, tmp_path, capsys
):
    data = tmp_path / "data"
    words = ["--sequence-length", "16", "--documents", "line", "--heldout", "0.2"]
    words += ["--tokenizer", str(imported_workdirs["causal"] / "tokenizer")]
    assert main(["prepare", "--input", str(corpus), "--output", str(data), *words]) == 0
    capsys.readouterr()
    evaluate = [
        "evaluate",
        "--checkpoint",
        str(huggingface_directories["qwen"]),
        "--data",
        str(data),
        "--batch-size",
        "8",
        "--json",
    ]
    assert main(evaluate) == 0
    told = json.loads(capsys.readouterr().out)
    model = [
        f"model.{key} = {value!r}"
        for key, value in llada_jax.load(imported_workdirs["causal"]).run["architecture"].items()
    ]
    config = small_config(
        tmp_path,
        data,
        huggingface_directories["qwen"],
        *model,
        "objective.name = 'autoregressive'",
        "num_steps = 1",
        "schedule.learning_rate = 1e-9",
    )
    assert main(["train", "--config", config, "--workdir", str(tmp_path / "run")]) == 0
    (final,) = metric_lines(tmp_path / "run", "final")
    assert final["final"]["nll"] == pytest.approx(told["nll_nats_per_token"], rel=1e-4)

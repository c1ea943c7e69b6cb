"""A run that trains adapters: the base stays, and every verb sees the network with them."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from support.exports import read_back
from support.required import library
from support.runs import losses, metric_lines, saved_arrays

import llada_jax
from llada_jax.__main__ import main
from llada_jax.models.adapters import Lora

WORDS = (
    "objective.name=sft",
    "data.random_length_probability=0.0",
    "data.attend_across_documents=False",
    "lora.rank=4",
    "lora.targets=blocks/(q|attn_out|ff_up)$",
    "samples.every_steps=10",
    "samples.gen_length=8",
    "samples.steps=8",
    "samples.block_length=8",
)


def arrays_of(workdir, step: int) -> dict[str, np.ndarray]:
    """Returns the arrays of a checkpoint by paths such as "params/blocks/q"."""
    return {
        name.removeprefix("['").removesuffix("']").replace("']['", "/"): array
        for name, array in saved_arrays(workdir, step).items()
    }


@pytest.fixture(scope="module")
def base(runs):
    workdir = runs.directory / "adapters-base"
    runs.train(workdir, "num_steps=10", "log.tensorboard=False")
    return workdir


@pytest.fixture(scope="module")
def tuned(runs, base, dialogues):
    workdir = runs.directory / "adapters"
    data = f"data.path={dialogues('packed')}"
    runs.train(workdir, *WORDS, data, f"checkpoint.init_from={base}")
    return workdir


@pytest.mark.slow
def test_adapters_learn_and_the_base_stays_as_it_was(base, tuned):
    curve = losses(tuned)
    assert np.mean(curve[-5:]) < np.mean(curve[:5]) - 0.3
    before, after = arrays_of(base, 10), arrays_of(tuned, 20)
    frozen = {name: array for name, array in after.items() if name.startswith("frozen/")}
    assert len(frozen) > 8
    for name, array in frozen.items():
        np.testing.assert_array_equal(array, before[name.replace("frozen/", "params/")])
    assert {name for name in after if name.startswith("params/")} == {
        f"params/blocks/{name}/{part}" for name in ("q", "attn_out", "ff_up") for part in "ab"
    }


@pytest.mark.slow
def test_load_evaluate_and_export_see_the_merged_network(base, tuned, dialogues, tmp_path, capsys):
    model, plain = llada_jax.load(str(tuned)), llada_jax.load(str(base))
    arrays = arrays_of(tuned, 20)
    for name, matrix in plain.params["blocks"].items():
        expected = np.asarray(matrix, np.float64)
        if f"params/blocks/{name}/a" in arrays:
            a, b = (arrays[f"params/blocks/{name}/{part}"].astype(np.float64) for part in "ab")
            assert np.abs(b).max() > 0
            expected = expected + (16.0 / 4 * (a @ b)).reshape(expected.shape)
        np.testing.assert_allclose(model.params["blocks"][name], expected, rtol=1e-5, atol=1e-6)
    # evaluate gives the bound that the run has logged at its end
    data = str(dialogues("packed"))
    words = ["--data", data, "--json", "--mc-samples", "1", "--batch-size", "16"]
    assert main(["evaluate", "--checkpoint", str(tuned), *words]) == 0
    evaluated = json.loads(capsys.readouterr().out)
    (final,) = metric_lines(tuned, "final")
    nelbo = evaluated["nelbo_nats_per_token"]
    assert nelbo == pytest.approx(final["final"]["nelbo"], rel=1e-4)
    words = ["--output", str(tmp_path / "out"), "--dtype", "float32"]
    assert main(["export", "--checkpoint", str(tuned), *words]) == 0
    exported = read_back(tmp_path / "out", model.record.architecture)
    jax.tree.map(
        lambda ours, theirs: np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6),
        exported,
        jax.tree.map(np.asarray, model.params),
    )


@pytest.mark.slow
def test_a_network_that_is_frozen_in_bfloat16_is_resumed_loaded_and_exported(
    runs, base, dialogues, tmp_path
):
    workdir = runs.directory / "adapters-bfloat16"
    words = (
        *WORDS,
        "samples.every_steps=0",
        "lora.frozen_dtype=bfloat16",
        f"data.path={dialogues('packed')}",
        f"checkpoint.init_from={base}",
    )
    runs.train(workdir, *words, "num_steps=4")
    runs.train(workdir, *words, "num_steps=6")
    before, after = arrays_of(base, 10), arrays_of(workdir, 6)
    model = llada_jax.load(str(workdir))
    for path, leaf in jax.tree_util.tree_leaves_with_path(model.params):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        frozen, expected = after[f"frozen/{name}"], before[f"params/{name}"]
        if "norm" not in name:
            expected = expected.astype(jnp.bfloat16)
        np.testing.assert_array_equal(frozen, expected)
        expected = expected.astype(np.float64)
        if f"params/{name}/a" in after:
            a, b = (after[f"params/{name}/{part}"].astype(np.float64) for part in "ab")
            expected = expected + (16.0 / 4 * (a @ b)).reshape(expected.shape)
        assert leaf.dtype == np.float32
        np.testing.assert_allclose(leaf, expected, rtol=1e-5, atol=1e-6)
    words = ["--output", str(tmp_path / "out"), "--dtype", "float32"]
    assert main(["export", "--checkpoint", str(workdir), *words]) == 0
    jax.tree.map(
        lambda ours, theirs: np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-7),
        read_back(tmp_path / "out", model.record.architecture),
        jax.tree.map(np.asarray, model.params),
    )


@pytest.mark.slow
def test_adapters_are_exported_for_peft(base, tuned, tmp_path):
    words = ["--output", str(tmp_path / "adapters"), "--adapters"]
    assert main(["export", "--checkpoint", str(tuned), *words]) == 0
    assert main(["export", "--checkpoint", str(base), *words]) == 2
    config = json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, Lora().alpha)
    weights = load_file(tmp_path / "adapters" / "adapter_model.safetensors")
    assert len(weights) == 2 * len(config["target_modules"]) == 12


@pytest.mark.slow
def test_peft_gives_the_logits_of_the_merged_network(base, tuned, tmp_path):
    peft = library("peft")
    torch, transformers = library("torch"), library("transformers")
    words = ["--dtype", "float32", "--output"]
    assert main(["export", "--checkpoint", str(base), *words, str(tmp_path / "base")]) == 0
    words = ["--adapters", "--output", str(tmp_path / "adapters")]
    assert main(["export", "--checkpoint", str(tuned), *words]) == 0
    network = transformers.AutoModel.from_pretrained(
        str(tmp_path / "base"), trust_remote_code=True, dtype=torch.float32
    )
    with_adapters = peft.PeftModel.from_pretrained(network, str(tmp_path / "adapters")).eval()
    tokens = np.random.default_rng(0).integers(0, 256, (2, 12))
    with torch.no_grad():
        theirs = with_adapters(torch.tensor(tokens)).logits.numpy()
    ours = np.asarray(llada_jax.load(str(tuned)).logits(tokens))
    np.testing.assert_allclose(theirs[..., :256], ours[..., :256], atol=2e-4)
    plain = np.asarray(llada_jax.load(str(base)).logits(tokens))
    assert np.abs(plain - ours).max() > 0.05

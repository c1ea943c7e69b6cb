"""A run that trains adapters: the base stays, and every verb sees the network with them."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from support.datasets import dialogue_dataset
from support.exports import read_back
from support.hf_directories import write_tokenizer
from support.paths import ROOT
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
# of the published fixture
ARCHITECTURE = (
    "model.vocab_size=512",
    "model.num_layers=3",
    "model.d_model=64",
    "model.num_heads=4",
    "model.num_kv_heads=4",
    "model.head_dim=16",
    "model.d_ff=176",
    "model.rope_theta=500000.0",
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
def official(published, tmp_path_factory):
    """A directory as LLaDA is published: the files of the fixture as they are, a tokenizer with
    the ids that its config.json states, and the code that it names.
    """
    directory = tmp_path_factory.mktemp("official")
    for file in ("config.json", "model.safetensors"):
        shutil.copyfile(published / file, directory / file)
    write_tokenizer(directory, *(f"<|reserved {n}|>" for n in range(9)), "<|mdm_mask|>", end_id=500)
    for file in (ROOT / "llada_jax/hf/shipped").glob("*.py"):
        shutil.copyfile(file, directory / file.name)
    return directory


@pytest.fixture(scope="module")
def official_dialogues(official, tmp_path_factory):
    directory = tmp_path_factory.mktemp("dialogues") / "of"
    return dialogue_dataset(directory, rows="packed", tokenizer=str(official))


@pytest.fixture(scope="module")
def tuned(runs, official, official_dialogues):
    """A run that trains adapters of the published network."""
    workdir = runs.directory / "adapters"
    data = f"data.path={official_dialogues}"
    runs.train(workdir, *WORDS, *ARCHITECTURE, data, f"checkpoint.init_from={official}")
    return workdir


@pytest.mark.slow
def test_adapters_learn_and_the_base_stays_as_it_was(official, tuned):
    curve = losses(tuned)
    assert np.mean(curve[-5:]) < np.mean(curve[:5]) - 0.3
    before, after = llada_jax.load(official).params, arrays_of(tuned, 20)
    frozen = {name: array for name, array in after.items() if name.startswith("frozen/")}
    leaves = jax.tree_util.tree_leaves_with_path(before)
    assert len(frozen) == len(leaves) > 8
    for path, leaf in leaves:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        np.testing.assert_array_equal(frozen[f"frozen/{name}"], leaf)
    assert {name for name in after if name.startswith("params/")} == {
        f"params/blocks/{name}/{part}" for name in ("q", "attn_out", "ff_up") for part in "ab"
    }


@pytest.mark.slow
def test_load_evaluate_and_export_see_the_merged_network(
    official, official_dialogues, tuned, tmp_path, capsys
):
    model, plain = llada_jax.load(str(tuned)), llada_jax.load(str(official))
    arrays = arrays_of(tuned, 20)
    for name, matrix in plain.params["blocks"].items():
        expected = np.asarray(matrix, np.float64)
        if f"params/blocks/{name}/a" in arrays:
            a, b = (arrays[f"params/blocks/{name}/{part}"].astype(np.float64) for part in "ab")
            assert np.abs(b).max() > 0
            expected = expected + (16.0 / 4 * (a @ b)).reshape(expected.shape)
        np.testing.assert_allclose(model.params["blocks"][name], expected, rtol=1e-5, atol=1e-6)
    # evaluate gives the bound that the run has logged at its end
    words = ["--data", str(official_dialogues), "--json", "--mc-samples", "1", "--batch-size", "16"]
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


def in_few_bits(runs, base, dialogues, dtype: str) -> tuple[str, ...]:
    """Returns the knobs of a run whose frozen network is kept in `dtype`."""
    return (
        *WORDS,
        "samples.every_steps=0",
        f"lora.frozen_dtype={dtype}",
        f"data.path={dialogues('packed')}",
        f"checkpoint.init_from={base}",
        "num_steps=6",
    )


@pytest.fixture(scope="module")
def resumed(runs, base, dialogues):
    """Returns resumed(dtype) -> the workdir of such a run, which was started twice."""
    found = {}

    def resumed(dtype: str):
        if dtype not in found:
            workdir = found[dtype] = runs.directory / f"adapters-{dtype}"
            words = in_few_bits(runs, base, dialogues, dtype)
            runs.train(workdir, *words, "num_steps=4")
            runs.train(workdir, *words)
        return found[dtype]

    return resumed


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_a_network_that_is_frozen_in_few_bits_is_loaded_and_exported(
    resumed, base, tmp_path, dtype
):
    workdir = resumed(dtype)
    before, after = arrays_of(base, 10), arrays_of(workdir, 6)
    model = llada_jax.load(str(workdir))
    for path, leaf in jax.tree_util.tree_leaves_with_path(model.params):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        frozen, expected = after[f"frozen/{name}"], before[f"params/{name}"]
        if f"frozen/scales/{name}" in after:
            assert frozen.dtype == np.int8
            scale = after[f"frozen/scales/{name}"]
            frozen = frozen * scale
            assert (np.abs(np.float64(frozen) - expected) <= scale / 2 * (1 + 1e-4)).all()
            expected = frozen
        elif "norm" not in name:
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
def test_an_int8_run_has_the_loss_of_bfloat16_and_resumes_and_moves_as_any_other(
    runs, resumed, base, dialogues
):
    workdir = resumed("int8")
    curve, of_bfloat16 = losses(workdir), losses(resumed("bfloat16"))
    assert np.abs(curve - of_bfloat16).max() < 0.01
    assert (curve != of_bfloat16).any()
    words = in_few_bits(runs, base, dialogues, "int8")
    straight, on_mesh = runs.directory / "int8-straight", runs.directory / "int8-mesh"
    runs.train(straight, *words)
    here, in_one_go = arrays_of(workdir, 6), arrays_of(straight, 6)
    assert here.keys() == in_one_go.keys()
    for name, array in here.items():
        np.testing.assert_array_equal(array, in_one_go[name], err_msg=name)
    np.testing.assert_array_equal(curve, losses(straight))
    # the base is the same to the bit on a mesh, and what is trained on it to rounding
    runs.train(on_mesh, *words, "mesh.fsdp=2", "mesh.tensor=2", num_devices=4)
    np.testing.assert_allclose(losses(on_mesh), curve, rtol=1e-5)
    there = arrays_of(on_mesh, 6)
    for name in here:
        if name.startswith("frozen/"):
            np.testing.assert_array_equal(here[name], there[name])


@pytest.mark.slow
def test_adapters_are_exported_for_peft(base, tuned, tmp_path, capsys):
    words = ["--output", str(tmp_path / "adapters"), "--adapters"]
    assert main(["export", "--checkpoint", str(tuned), *words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert main(["export", "--checkpoint", str(base), *words]) == 2
    config = json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, Lora().alpha)
    weights = load_file(tmp_path / "adapters" / "adapter_model.safetensors")
    assert len(weights) == 2 * len(config["target_modules"]) == 18
    assert told["files"] == {
        path.name: path.stat().st_size for path in (tmp_path / "adapters").iterdir()
    }
    assert told["parameters"] == sum(array.size for array in weights.values())


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["llada", "illada"])
def test_peft_gives_the_logits_of_the_merged_network(official, tuned, tmp_path, layout):
    """On the published directory itself, and on the other layout of the same network."""
    peft = library("peft")
    torch, transformers = library("torch"), library("transformers")
    words = ["--layout", layout, "--adapters", "--output", str(tmp_path / "adapters")]
    assert main(["export", "--checkpoint", str(tuned), *words]) == 0
    base = official
    if layout == "illada":
        imported, base = tmp_path / "imported", tmp_path / "base"
        assert main(["import", "--from", str(official), "--output", str(imported)]) == 0
        words = ["--layout", layout, "--dtype", "float32", "--output", str(base)]
        assert main(["export", "--checkpoint", str(imported), *words]) == 0
    network = transformers.AutoModel.from_pretrained(
        str(base), trust_remote_code=True, dtype=torch.float32
    )
    with_adapters = peft.PeftModel.from_pretrained(network, str(tmp_path / "adapters")).eval()
    tokens = np.random.default_rng(0).integers(0, 256, (2, 12))
    with torch.no_grad():
        theirs = with_adapters(torch.tensor(tokens)).logits.numpy()
    ours = np.asarray(llada_jax.load(str(tuned)).logits(tokens))
    np.testing.assert_allclose(theirs[..., :256], ours[..., :256], atol=2e-4)
    plain = np.asarray(llada_jax.load(str(official)).logits(tokens))
    assert np.abs(plain - ours).max() > 0.05

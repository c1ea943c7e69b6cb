"""`llada-jax import`: what is read, where it lands, what can be done with it, what is refused with
nothing left behind.
"""

import dataclasses
import json
import shutil
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
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
from support.runs import metric_lines
from support.transformers_versions import VERSIONS, run_python

import llada_jax
from llada_jax.__main__ import main
from llada_jax.cluster.sharding import AXES, make_mesh
from llada_jax.config import load_config
from llada_jax.hf import read
from llada_jax.hf.convert import tensors
from llada_jax.models.model import abstract_parameters, make_model
from llada_jax.models.transformer import Architecture
from llada_jax.training.step import architecture_of

QWEN = dataclasses.replace(SMALL, vocab_size=257, attention_bias="qkv", tie_embeddings=True)
LLAMA3 = dataclasses.replace(
    SMALL, rope_theta=100.0, rope_scaling=(8.0, 1.0, 4.0, 40.0), tie_embeddings=True
)


def abstract(a, num_devices: int = 1, **axes):
    sizes = {**dict.fromkeys(AXES, 1), **axes}
    return abstract_parameters(make_model(a), make_mesh(sizes, devices=jax.devices()[:num_devices]))


def equal(ours: dict, theirs: dict) -> None:
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(ours), theirs)


@pytest.fixture(scope="module")
def directories(tmp_path_factory) -> dict[str, Path]:
    """A LLaDA directory in two shards and a Qwen2 directory whose tokenizer fills its embedding."""
    home = tmp_path_factory.mktemp("huggingface")
    write_huggingface(home / "llada", "llada", SMALL, num_shards=2)
    write_huggingface(home / "qwen", "qwen2", QWEN)
    return {"llada": home / "llada", "qwen": home / "qwen"}


@pytest.fixture(scope="module")
def imported(directories, tmp_path_factory) -> dict[str, Path]:
    """The workdirs of both, and of the Qwen2 directory with --causal."""
    home = tmp_path_factory.mktemp("imported")
    flags = {"llada": [], "qwen": ["--mesh", "fsdp=4,tensor=2"], "causal": ["--causal"]}
    for name, more in flags.items():
        source = directories["llada" if name == "llada" else "qwen"]
        assert main(["import", "--from", str(source), "--output", str(home / name), *more]) == 0
    return {name: home / name for name in flags}


# ---- what is read


def test_the_published_checkpoint_gives_the_published_logits_from_the_directory_and_from_the_workdir(
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
def test_eight_devices_read_what_one_device_reads_and_nothing_twice(axes, directories, monkeypatch):
    num_read = []

    def counted(stored, name, slices, read_slices=read._read):
        array = read_slices(stored, name, slices)
        num_read.append(array.size)
        return array

    whole = read.read_params(directories["llada"], abstract(SMALL))
    monkeypatch.setattr(read, "_read", counted)
    sharded = read.read_params(directories["llada"], abstract(SMALL, 8, **axes))
    equal(sharded, jax.device_get(whole))
    assert sum(num_read) == sum(leaf.size for leaf in jax.tree.leaves(whole))
    per_layer = {tensor.path: np.prod(tensor.shape) for tensor in tensors("llada", SMALL)}
    assert max(num_read) == max(per_layer.values()) // 8 * axes.get("data", 1)
    q = sharded["blocks"]["q"]
    assert q.addressable_shards[0].data.size * 8 == q.size * axes.get("data", 1)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16], ids=["bfloat16", "float16"])
def test_half_precision_files_become_float32_without_a_change(dtype, tmp_path):
    params = write_huggingface(tmp_path / "hf", "illada", SMALL, dtype=dtype, num_shards=3)
    ours = read.read_params(tmp_path / "hf", abstract(SMALL))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(ours))
    equal(ours, jax.tree.map(lambda leaf: leaf.astype(dtype).astype(np.float32), params))


def test_two_equal_copies_of_a_tied_embedding_are_read_as_one(tmp_path):
    tied = dataclasses.replace(SMALL, tie_embeddings=True)
    params = write_huggingface(tmp_path / "hf", "illada", tied)
    files = load_file(tmp_path / "hf" / "model.safetensors")
    files["lm_head.weight"] = files["model.embed_tokens.weight"].copy()
    save_file(files, tmp_path / "hf" / "model.safetensors")
    equal(read.read_params(tmp_path / "hf", abstract(tied)), params)


# ---- what is written


def test_ids_template_tokenizer_and_source_come_along(imported, directories):
    run = json.loads((imported["llada"] / "run.json").read_text())
    assert run["special_ids"] == {"mask": 257, "eos": 256, "bos": 256, "pad": 256, "eot": 258}
    assert run["chat_template"] == "{{ messages }}"
    assert Architecture(**run["architecture"]) == SMALL
    assert run["architecture"].keys() == dataclasses.asdict(SMALL).keys()
    assert run["config"]["data"]["sequence_length"] == 128
    assert run["config"]["objective"]["name"] == "masked_diffusion"
    assert run["source"]["layout"] == "llada"
    assert run["source"]["config"] == json.loads((directories["llada"] / "config.json").read_text())
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (imported["llada"] / "tokenizer" / name).read_bytes() == (
            directories["llada"] / name
        ).read_bytes()


def test_a_workdir_and_its_directory_give_the_same_text(imported, directories, capsys):
    texts = []
    for checkpoint in (imported["llada"], directories["llada"]):
        words = ["--prompt", "abc", "--gen-length", "8", "--steps", "2", "--json"]
        assert main(["sample", "--checkpoint", str(checkpoint), *words]) == 0
        texts.append(json.loads(capsys.readouterr().out)["samples"])
    assert texts[0] == texts[1]
    assert len(texts[0][0]["tokens"]) > 0


def test_json_says_what_was_imported(directories, tmp_path, capsys):
    argv = [
        "import",
        "--from",
        str(directories["llada"]),
        "--output",
        str(tmp_path / "new"),
        "--json",
    ]
    assert main(argv) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["parameters"] == sum(leaf.size for leaf in jax.tree.leaves(abstract(SMALL)))
    assert Architecture(**told["architecture"]) == SMALL
    assert (told["layout"], told["mask"]) == ("llada", 257)


# ---- from Llama and Qwen weights


def test_a_causal_model_gets_a_mask_row_and_a_shift_and_keeps_all_else(
    imported, directories, tmp_path
):
    run = json.loads((imported["qwen"] / "run.json").read_text())
    assert run["special_ids"]["mask"] == 257  # after its 257 tokens
    assert Architecture(**run["architecture"]) == dataclasses.replace(
        QWEN, vocab_size=320, output_shift=True
    )
    ours = jax.device_get(llada_jax.load(imported["qwen"]).params)
    theirs = jax.device_get(read.read_params(directories["qwen"], abstract(QWEN)))
    equal({**ours, "embed": ours["embed"][:257]}, theirs)


def test_a_causal_control_gives_the_causal_logits(imported, directories):
    tokens = np.arange(30).reshape(2, 15) % 7
    raw = make_model(QWEN, causal=True)
    positions = jnp.broadcast_to(jnp.arange(15), tokens.shape)
    params = read.read_params(directories["qwen"], abstract(QWEN))
    expected = jax.jit(raw.logits_fn)(params, jnp.asarray(tokens), None, positions)
    for checkpoint in (imported["causal"], directories["qwen"]):
        model = llada_jax.load(checkpoint)
        assert model.config["objective"]["name"] == "autoregressive"
        assert not model.run["architecture"]["output_shift"]
        np.testing.assert_allclose(model.logits(tokens)[..., :257], expected, atol=1e-6, rtol=0)


MAKE_LLAMA3 = """
import numpy, torch, transformers
torch.manual_seed(0)
config = transformers.LlamaConfig(
    vocab_size=320, num_hidden_layers=2, hidden_size=64, num_attention_heads=8, num_key_value_heads=4, head_dim=8,
    intermediate_size=96, rms_norm_eps=1e-6, tie_word_embeddings=True, eos_token_id=256, max_position_embeddings=320,
    rope_theta=100.0, rope_scaling={"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 40})
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
        jax.jit(make_model(b, causal=True).logits_fn)(model.params, tokens, None, positions)[
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
        leaf = abstract(a, **sizes)["embed"]
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


def test_a_mask_row_of_zeros_blows_the_gradient_up_and_ours_does_not(imported):
    """The explosion that LLaDA2.0 describes, and the reason for `fill_rows`."""
    model = llada_jax.load(imported["qwen"])
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


def small_config(directory: Path, data: Path, init_from: Path, *changes: str) -> str:
    lines = [
        "num_steps = 4",
        "data.batch_size = 8",
        "data.sequence_length = 16",
        f"data.path = {str(data)!r}",
        "schedule.name = 'constant'",
        "schedule.learning_rate = 1e-3",
        "schedule.warmup_steps = 0",
        "log.every_steps = 1",
        "log.tensorboard = False",
        "evaluation.every_steps = 0",
        "checkpoint.every_steps = 4",
        f"checkpoint.init_from = {str(init_from)!r}",
        *changes,
    ]
    body = "\n".join(f"    config.{line.removeprefix('config.')}" for line in lines)
    head = "from llada_jax.config import default_config\n\n\ndef get_config():\n    config = default_config()\n"
    file = directory / f"{init_from.name}.py"
    file.write_text(f"{head}{body}\n    return config\n")
    return str(file)


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
    name, start, imported, directories, corpus, tmp_path, capsys
):
    source = (imported if start == "workdir" else directories)[name]
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
    assert main(["import", "--from", str(directories[name]), "--output", str(tmp_path / "w")]) == 0
    capsys_lines = capsys.readouterr().out.splitlines()
    # what import says to write
    model = [line for line in capsys_lines if line.startswith("config.model")]
    config = small_config(tmp_path, data, source, *model)
    assert main(["train", "--config", config, "--workdir", str(workdir)]) == 0
    assert "start       weights of step 0 of" in capsys.readouterr().err
    numbers = [line["train"] for line in metric_lines(workdir, "train")]
    assert len(numbers) == 4
    assert all(0.01 < line["grad_norm"] < 100 and np.isfinite(line["loss"]) for line in numbers)
    before = llada_jax.load(imported[name])
    after = llada_jax.load(workdir)
    if start == "workdir":  # which is where weights come from, and no run to continue
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
    directories, imported, corpus, tmp_path, capsys
):
    data = tmp_path / "data"
    words = ["--sequence-length", "16", "--documents", "line", "--heldout", "0.2"]
    words += ["--tokenizer", str(imported["causal"] / "tokenizer")]
    assert main(["prepare", "--input", str(corpus), "--output", str(data), *words]) == 0
    capsys.readouterr()
    evaluate = [
        "evaluate",
        "--checkpoint",
        str(directories["qwen"]),
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
        for key, value in llada_jax.load(imported["causal"]).run["architecture"].items()
    ]
    config = small_config(
        tmp_path,
        data,
        directories["qwen"],
        *model,
        "objective.name = 'autoregressive'",
        "num_steps = 1",
        "schedule.learning_rate = 1e-9",
    )
    assert main(["train", "--config", config, "--workdir", str(tmp_path / "run")]) == 0
    (final,) = metric_lines(tmp_path / "run", "final")
    assert final["final"]["nll"] == pytest.approx(told["nll_nats_per_token"], rel=1e-4)


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
    "wrong index": (
        lambda d: sharded(d, lambda i: i["weight_map"].update({Q0: SECOND})),
        ["disagree about", Q0],
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
    "other network": (lambda d: config_of(d, alibi=True), ["alibi=True"]),
    "no tokenizer": (lambda d: (d / "tokenizer.json").unlink(), ["There is no tokenizer"]),
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
def whole(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("whole") / "hf"
    write_huggingface(directory, "llada", SMALL)
    return directory


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


def test_tied_copies_that_differ_are_refused(tmp_path, refused):
    write_huggingface(tmp_path / "hf", "illada", dataclasses.replace(SMALL, tie_embeddings=True))
    changed(
        tmp_path / "hf", lambda f: f.update({"lm_head.weight": f["model.embed_tokens.weight"] + 1})
    )
    argv = ["import", "--from", str(tmp_path / "hf"), "--output", str(tmp_path / "out")]
    refused(argv, ["ties head and embedding", "lm_head.weight differs", "tie_word_embeddings"])
    assert not (tmp_path / "out").exists()


def test_bad_flags_are_refused(whole, imported, tmp_path, refused, monkeypatch):
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
        (["--from", str(whole), "--output", str(imported["llada"])], ["not empty"]),
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


def test_an_output_below_a_file_is_refused(whole, tmp_path, refused):
    (tmp_path / "file").write_text("keep me")
    refused(
        ["import", "--from", str(whole), "--output", str(tmp_path / "file" / "out")],
        ["cannot be written", "file"],
    )
    assert (tmp_path / "file").read_text() == "keep me"

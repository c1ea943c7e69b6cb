"""`llada-jax export`: what is trained here loads elsewhere, is the same there, and is never there
by halves.
"""

import dataclasses
import json
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from safetensors import safe_open
from safetensors.numpy import load_file
from support.datasets import SEQUENCE_LENGTH
from support.hf_directories import random_params
from support.paths import LAUNCH, PUBLISHED
from support.runs import metric_lines
from support.transformers_versions import VERSIONS, run_python

import llada_jax
from llada_jax.__main__ import main
from llada_jax.checkpoints.record import RunRecord
from llada_jax.checkpoints.workdir import Checkpoints, find_checkpoint
from llada_jax.cluster.sharding import make_mesh, one_device_mesh
from llada_jax.config import default_config
from llada_jax.data.records import Records, read_dataset
from llada_jax.data.tokenizer import load_tokenizer
from llada_jax.errors import UserError
from llada_jax.hf import read, write
from llada_jax.hf.card import heldout_result
from llada_jax.hf.config_json import hf_config
from llada_jax.hf.convert import tensors
from llada_jax.models.model import abstract_parameters, make_model
from llada_jax.models.transformer import Architecture
from llada_jax.storage.arrays import read_chunks
from llada_jax.training.state import TrainState
from llada_jax.verbs.export import main as main_of_export

LLADA = Architecture(
    vocab_size=320,
    num_layers=3,
    d_model=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    d_ff=48,
    rope_theta=1e4,
)
ARCHITECTURES = {
    "llada": LLADA,
    "llada, tied, qk_norm full": dataclasses.replace(LLADA, tie_embeddings=True, qk_norm="full"),
    "illada, qk_norm per head": dataclasses.replace(LLADA, qk_norm="per_head"),
    "illada, biased, shifted, wide heads": dataclasses.replace(
        LLADA, attention_bias="qkvo", output_shift=True, head_dim=12, tie_embeddings=True
    ),
    "illada, scaled frequencies": dataclasses.replace(
        LLADA, rope_theta=100.0, rope_scaling=(8.0, 1.0, 4.0, 40.0)
    ),
}


def write_checkpoint(
    workdir: Path,
    a: Architecture,
    params: dict,
    *,
    step: int = 7,
    ema: dict | None = None,
    **changes,
):
    """Writes a workdir as `train` leaves it; changes are of run.json."""
    tokenizer = load_tokenizer("bytes")
    tokenizer.save(workdir / "tokenizer")
    config = default_config()
    config.data.sequence_length = 48
    config.optimizer.ema_decay = 0.5 if ema else 0.0
    run = {
        "config": config.to_dict(),
        "architecture": dataclasses.asdict(a),
        "data": [],
        "step": step,
        "tokens": 1234567,
        "tokenizer": {"kind": "bytes", "vocab_size": 260, "fingerprint": tokenizer.fingerprint},
        "versions": {},
        **changes,
    }
    record = RunRecord.from_json(json.loads(json.dumps(run)), file="test")
    saved = Checkpoints(workdir)
    # where they are, if they are on devices already
    arrays = jax.tree.map(jnp.asarray, (params, ema or {}))
    saved.save(TrainState(jnp.int32(step), arrays[0], (), arrays[1], {}), record)
    saved.close()
    return workdir


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> Path:
    """A checkpoint of LLADA with random weights and another moving average."""
    home = tmp_path_factory.mktemp("export")
    return write_checkpoint(
        home / "run", LLADA, random_params(LLADA), ema=random_params(LLADA, seed=1)
    )


def export(workdir, output, *more) -> Path:
    assert (
        main(["export", "--checkpoint", str(workdir), "--output", str(output), *map(str, more)])
        == 0
    )
    return Path(output)


def read_back(directory, a: Architecture) -> dict:
    mesh = one_device_mesh()
    return read.read_params(directory, abstract_parameters(make_model(a), mesh))


def same(ours: dict, theirs: dict) -> None:
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(ours), jax.device_get(theirs))


@pytest.fixture
def refused(capfd):
    """Runs an export that must fail; returns its one sentence. Nothing of it is left behind."""

    def refused(*words, output: Path, status: int = 2) -> str:
        before = sorted(output.parent.iterdir()) if output.parent.is_dir() else []
        capfd.readouterr()
        assert main(["export", *map(str, words), "--output", str(output)]) == status
        out, err = capfd.readouterr()
        assert out == ""
        *said, sentence = err.splitlines()
        assert all(
            line.startswith("llada-jax: layout") for line in said if "moving average" not in line
        ), said
        assert sentence.startswith("llada-jax: ")
        assert sentence.endswith((".", "?"))
        assert (sorted(output.parent.iterdir()) if output.parent.is_dir() else []) == before
        return sentence

    return refused


# ---- what is written


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
    same(read_back(out, a), params)
    rounded = jax.tree.map(
        lambda x: np.asarray(jnp.asarray(x).astype(jnp.bfloat16).astype(jnp.float32)), params
    )
    same(read_back(export(run, tmp_path / "bfloat16"), a), rounded)


def test_the_config_has_every_key_with_the_ids_of_the_tokenizer(workdir, tmp_path):
    out = export(workdir, tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    ids = {"mask_id": 256, "eos_id": 257, "bos_id": 258, "pad_id": 259}
    assert config == hf_config(LLADA, "llada", **ids, max_sequence_length=48, dtype="bfloat16")
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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_shards_hold_what_one_file_holds_and_the_index_finds_it(dtype, workdir, tmp_path):
    whole = load_file(export(workdir, tmp_path / "one", "--dtype", dtype) / "model.safetensors")
    out = export(workdir, tmp_path / "many", "--dtype", dtype, "--shard-size", "20KB")
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


def test_ema_takes_the_moving_average_and_without_it_the_run_is_told_to_keep_one(
    workdir, tmp_path, capfd
):
    out = export(workdir, tmp_path / "ema", "--ema", "--dtype", "float32")
    same(read_back(out, LLADA), random_params(LLADA, seed=1))
    assert "from the moving average of the parameters" in (out / "README.md").read_text()
    assert "keeps a moving average" not in capfd.readouterr().err
    plain = export(workdir, tmp_path / "plain", "--dtype", "float32")
    same(read_back(plain, LLADA), random_params(LLADA))
    assert (
        "keeps a moving average, which `sample` takes; --ema exports that" in capfd.readouterr().err
    )


def test_json_is_one_object_with_the_files(workdir, tmp_path, capfd):
    out = export(workdir, tmp_path / "out", "--json")
    told = json.loads(capfd.readouterr().out)
    assert told["layout"] == "llada"
    assert told["step"] == 7
    assert told["files"] == {file.name: file.stat().st_size for file in out.iterdir()}


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
        source, *(f"<|special-{i}|>" for i in range(255)), chat_template="{{ messages }}"
    )
    assert main(["import", "--from", str(source), "--output", str(tmp_path / "run")]) == 0
    out = export(tmp_path / "run", tmp_path / "out", "--dtype", "float32")
    before, after = (load_file(d / "model.safetensors") for d in (source, out))
    assert before.keys() == after.keys()
    for name, array in before.items():
        np.testing.assert_array_equal(after[name], array)
    config, ours = (json.loads((d / "config.json").read_text()) for d in (source, out))
    assert {key: ours[key] for key in config} == config
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (source / name).read_bytes()


def test_the_card_tells_what_the_run_was(workdir, tmp_path):
    (workdir / "metrics.jsonl").write_text(
        '{"step": 5, "heldout": {"nelbo": 3.5, "standard_error": 0.01, "bits_per_byte": 5.0}}\n'
        '{"step": 7, "final": {"nelbo": 3.25, "standard_error": 0.125, "bits_per_byte": 4.5}}\n'
        '{"step": 9, "heldout": {"nelbo": 1.0, "bits_per_byte": 1.0}}\n{"step": 1'
    )
    card = (export(workdir, tmp_path / "model") / "README.md").read_text()
    (workdir / "metrics.jsonl").unlink()
    assert "1,234,567 tokens seen in 7 steps" in card
    assert (
        "NELBO (an upper bound on the negative log-likelihood): 3.2500 +- 0.1250 nats per token, "
        "4.5000 bits" in card
    )
    assert 'AutoModelForCausalLM.from_pretrained("model", trust_remote_code=True)' in card
    assert 'llada_jax.load("model")' in card
    assert "| d_model | 32 |" in card
    assert "| mask | 256 | `<mask>` |" in card
    assert "layout `llada`, bfloat16" in card
    assert "Not measured." in (export(workdir, tmp_path / "other") / "README.md").read_text()


def front_matter(card: str) -> dict:
    """Returns the YAML head of a model card, which the Hub reads."""
    _, head, _ = card.split("---\n", 2)
    return yaml.safe_load(head)


def test_the_card_names_the_licence_of_the_code_and_leaves_that_of_the_weights_to_the_user(
    workdir, tmp_path
):
    card = (export(workdir, tmp_path / "open") / "README.md").read_text()
    assert "license" not in front_matter(card)
    assert "No licence has been chosen for the weights" in card
    assert "[Apache-2.0](https://www.apache.org/licenses/LICENSE-2.0)" in card
    card = (
        export(workdir, tmp_path / "chosen", "--license", "cc-by-4.0") / "README.md"
    ).read_text()
    assert front_matter(card)["license"] == "cc-by-4.0"
    assert "The weights are licensed under `cc-by-4.0`" in card
    assert "[Apache-2.0](https://www.apache.org/licenses/LICENSE-2.0)" in card


@pytest.mark.parametrize("license_id", ["Apache 2", "MIT", "", "mit\ntags: x", "a: b"])
def test_a_licence_that_the_hub_cannot_know_is_refused(workdir, tmp_path, license_id, capsys):
    words = [
        "--checkpoint",
        str(workdir),
        "--output",
        str(tmp_path / "out"),
        "--license",
        license_id,
    ]
    assert main(["export", *words]) == 2
    assert "must be an identifier of the Hub" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_result_on_the_card_is_the_last_one_up_to_the_step():
    lines = [
        {"step": 1, "train": {}},
        {"step": 2, "heldout": {"nelbo": 2.0}},
        {"step": 4, "final": {"nll": 1.0}},
    ]
    assert heldout_result(lines, 1) is None
    assert heldout_result(lines, 3)["nats"] == 2.0
    assert heldout_result(lines, 4)["name"] == "nll"


# ---- a trained model, elsewhere


ELSEWHERE = """
import json, sys
import numpy as np, torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
directory, asked, out = sys.argv[1:]
asked = np.load(asked)
model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True).eval()
assert type(AutoModel.from_pretrained(directory, trust_remote_code=True)).__name__ == type(model).__name__
assert AutoConfig.from_pretrained(directory, trust_remote_code=True).mask_token_id == int(asked["mask_id"])
tokens, noisy, p_mask = (torch.from_numpy(asked[name]) for name in ("tokens", "noisy", "p_mask"))
with torch.no_grad():
    logits = model(noisy).logits
is_masked = noisy != tokens
nll = torch.nn.functional.cross_entropy(logits[is_masked].float(), tokens[is_masked], reduction="none")
nelbo = (nll / p_mask[:, None].expand_as(tokens)[is_masked]).sum() / tokens.numel()
prompts = torch.from_numpy(asked["prompts"])
canvases = [model.generate_diffusion(prompts, gen_length=16, block_length=b, steps=s) for b, s in ((16, 16), (8, 8))]
text = AutoTokenizer.from_pretrained(directory).decode(prompts[0])
np.savez(out, logits=logits.float().numpy(), nelbo=nelbo.numpy(), canvases=torch.stack(canvases).numpy(),
         dtype=str(logits.dtype), text=text)
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
    # and the bound of the whole split stands on the card
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
    workdir, tmp_path, refused, monkeypatch
):
    def swapped(directory, shard, tensor, array, *, dtype):
        other = {"blocks/ff_gate": "up_proj", "blocks/ff_up": "ff_proj"}.get(tensor.path)
        name = f"model.transformer.blocks.{tensor.layer}.{other}.weight" if other else tensor.name
        real(directory, shard, dataclasses.replace(tensor, name=name), array, dtype=dtype)

    real = write.put
    monkeypatch.setattr("llada_jax.hf.write.put", swapped)
    sentence = refused("--checkpoint", workdir, "--verify", output=tmp_path / "out", status=3)
    assert "PyTorch's logits differ from ours" in sentence


# ---- never by halves


KILLED = """
import sys, time
from llada_jax.hf import write
from llada_jax.verbs import export
real, count = write.put, []
def put(*args, **kwargs):
    real(*args, **kwargs)
    count.append(0)
    if len(count) == 9:
        print("in the middle", flush=True)
        time.sleep(600)
write.put = put
export.main(sys.argv[1:])
"""


def test_a_killed_export_leaves_no_export_and_the_same_command_writes_a_whole_one(
    workdir, tmp_path
):
    words = ["--checkpoint", str(workdir), "--output", str(tmp_path / "out")]
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, *words], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "in the middle\n"
    process.send_signal(signal.SIGKILL)
    process.wait(60)
    process.stdout.close()
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.partial" / "model.safetensors").exists()
    with pytest.raises(UserError, match="no config.json|config.json cannot be read"):
        read.read_config(tmp_path / "out.partial")  # nobody takes it for a checkpoint
    same(
        read_back(export(workdir, tmp_path / "out", "--dtype", "float32"), LLADA),
        random_params(LLADA),
    )
    assert not (tmp_path / "out.partial").exists()


def test_two_exports_into_one_directory_are_kept_apart(workdir, tmp_path, refused):
    words = ["--checkpoint", str(workdir), "--output", str(tmp_path / "out")]
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, *words], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "in the middle\n"
        sentence = refused("--checkpoint", workdir, output=tmp_path / "out")
        assert "Another export is writing into" in sentence
    finally:
        process.kill()
        process.wait(60)
        process.stdout.close()


def test_an_export_is_replaced_only_by_force_and_then_whole(workdir, tmp_path, refused):
    out = export(workdir, tmp_path / "out", "--shard-size", "20KB")
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    assert "--force to replace it" in refused("--checkpoint", workdir, output=out)
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    export(workdir, out, "--force", "--ema", "--dtype", "float32")
    assert sorted(file.name for file in out.glob("*.safetensors*")) == ["model.safetensors"]
    same(read_back(out, LLADA), random_params(LLADA, seed=1))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_force_never_removes_what_is_no_export(workdir, tmp_path, refused):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("keep me")
    for flags in ([], ["--force"]):
        assert "does not hold an export" in refused(
            "--checkpoint", workdir, *flags, output=tmp_path / "home"
        )
    assert (tmp_path / "home" / "thesis.tex").read_text() == "keep me"
    assert "is a file" in refused("--checkpoint", workdir, output=tmp_path / "home" / "thesis.tex")
    (tmp_path / "empty").mkdir()
    assert (export(workdir, tmp_path / "empty") / "config.json").exists()


def test_an_export_that_was_killed_while_it_replaced_another_gives_that_one_back(
    workdir, tmp_path, refused
):
    out = export(workdir, tmp_path / "out")
    out.rename(tmp_path / "out.replaced")  # the moment between the two renames
    export(workdir, out, "--ema", "--dtype", "float32", "--force")
    same(read_back(out, LLADA), random_params(LLADA, seed=1))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# too small for the weights; just too small for what comes after them
@pytest.mark.parametrize("size", ["64k", "204k"])
def test_a_full_disk_is_one_sentence_and_leaves_nothing(size, workdir, mount, refused):
    disk = mount(f"size={size}")
    sentence = refused("--checkpoint", workdir, "--dtype", "float32", output=disk / "out")
    assert "No space left on device" in sentence
    assert "free some space" in sentence


def test_a_full_disk_keeps_the_export_that_was_to_be_replaced(workdir, mount, refused):
    disk = mount("size=300k")
    out = export(workdir, disk / "out")
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    assert "No space left" in refused(
        "--checkpoint", workdir, "--force", "--dtype", "float32", output=out
    )
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before


def test_a_read_only_output_is_one_sentence(workdir, tmp_path, mount, refused):
    disk = mount("ro")
    assert "Read-only file system" in refused("--checkpoint", workdir, output=disk / "out")
    (tmp_path / "file").write_text("")
    assert "Not a directory" in refused("--checkpoint", workdir, output=tmp_path / "file" / "out")


@pytest.mark.slow
def test_several_processes_write_what_one_writes(workdir, tmp_path):
    alone = export(workdir, tmp_path / "alone", "--shard-size", "20KB", "--dtype", "float32")
    launcher = LAUNCH / "local.py"
    words = [
        "--checkpoint",
        workdir,
        "--output",
        tmp_path / "together",
        "--shard-size",
        "20KB",
        "--dtype",
        "float32",
    ]
    command = [sys.executable, "-m", "llada_jax", "export", *words, "--json"]
    done = subprocess.run(
        list(
            map(
                str,
                [
                    sys.executable,
                    launcher,
                    "--processes",
                    2,
                    "--devices",
                    1,
                    "--logs",
                    tmp_path,
                    "--",
                    *command,
                ],
            )
        ),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    # gloo, which joins processes, talks on stdout
    assert json.loads(done.stdout.splitlines()[-1])["parameters"] > 0
    ours, theirs = (
        {f.name: f.read_bytes() for f in d.iterdir()} for d in (alone, tmp_path / "together")
    )
    ours["README.md"], theirs["README.md"] = b"", b""  # they are called alone and together
    assert ours == theirs
    # one that cannot write tells the others, and nothing is left
    (tmp_path / "file").write_text("")
    words[3] = tmp_path / "file" / "out"
    command = [sys.executable, "-m", "llada_jax", "export", *words]
    done = subprocess.run(
        list(
            map(
                str,
                [
                    sys.executable,
                    launcher,
                    "--processes",
                    2,
                    "--devices",
                    1,
                    "--logs",
                    tmp_path,
                    "--",
                    *command,
                ],
            )
        ),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 2
    assert "Not a directory" in done.stderr
    assert "process 0 failed; its log says why" in (tmp_path / "process-1.log").read_text()


# ---- what is refused


def test_what_cannot_be_exported_is_refused_with_the_reason(workdir, tmp_path, refused):
    out = tmp_path / "out"
    ours = ["--checkpoint", workdir]
    assert "'5 loaves' is not a size" in refused(*ours, "--shard-size", "5 loaves", output=out)
    assert "'0GB' is not a size" in refused(*ours, "--shard-size", "0GB", output=out)
    assert "cannot be written" in refused(*ours, "--layout", "llama", output=out)
    assert "no checkpoint of step 9" in refused("--checkpoint", f"{workdir}@9", output=out)
    assert "holds no checkpoints" in refused("--checkpoint", tmp_path, output=out)
    assert "is not a Jinja template" in refused(
        *ours, "--chat-template", _file(tmp_path / "bad.jinja", "{% if %}"), output=out
    )
    assert "cannot be read" in refused(*ours, "--chat-template", tmp_path / "absent", output=out)
    with pytest.raises(UserError, match="must be a local or mounted directory"):
        main_of_export(["--checkpoint", str(workdir), "--output", "gs://bucket/out"])
    plain = write_checkpoint(tmp_path / "plain", LLADA, random_params(LLADA))
    assert "kept no moving average" in refused("--checkpoint", plain, "--ema", output=out)
    per_head = ARCHITECTURES["illada, qk_norm per head"]
    other = write_checkpoint(tmp_path / "other", per_head, random_params(per_head))
    assert "qk_norm='per_head' has no place in it" in refused(
        "--checkpoint", other, "--layout", "llada", output=out
    )
    config = default_config().to_dict()
    config["objective"]["name"] = "autoregressive"
    causal = write_checkpoint(tmp_path / "causal", LLADA, random_params(LLADA), config=config)
    assert "attend in both directions" in refused("--checkpoint", causal, output=out)
    described = {"kind": "bytes", "vocab_size": 260, "fingerprint": "f" * 64}
    stranger = write_checkpoint(
        tmp_path / "stranger", LLADA, random_params(LLADA), tokenizer=described
    )
    assert "is not the tokenizer of the checkpoint" in refused("--checkpoint", stranger, output=out)


def _file(path: Path, content: str) -> Path:
    path.write_text(content)
    return path


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_no_numbers_are_refused_by_name(value, tmp_path, refused):
    params = random_params(LLADA)
    params["blocks"]["ff_up"][1, 2, 3] = value
    run = write_checkpoint(tmp_path / "run", LLADA, params)
    assert "blocks/ff_up of layer 1 holds NaN or infinity" in refused(
        "--checkpoint", run, output=tmp_path / "out"
    )


def test_a_damaged_checkpoint_is_refused(workdir, tmp_path, refused):
    import shutil

    run = Path(shutil.copytree(workdir, tmp_path / "run"))
    for file in (run / "checkpoints" / "7" / "params").rglob("d/*"):
        content = bytearray(file.read_bytes())
        for i in range(50, len(content), 101):
            content[i] ^= 0x10
        file.write_bytes(content)
    sentence = refused("--checkpoint", run, output=tmp_path / "out")
    assert "cannot be read" in sentence
    assert str(run / "checkpoints" / "7") in sentence


def test_a_flipped_number_is_found_by_its_checksum(workdir, tmp_path, refused, monkeypatch):
    def flipped(store):
        array = real(store)
        if array.ndim == 4:
            array.view(np.uint32)[1, 2, 3, 4] ^= 1 << 20
        return array

    real = read_chunks
    monkeypatch.setattr("llada_jax.checkpoints.workdir.read_chunks", flipped)
    sentence = refused("--checkpoint", workdir, output=tmp_path / "out")
    assert "params/blocks/q does not match its saved checksum" in sentence


@pytest.mark.parametrize("read_bytes", [1, 3_000, 10**9])
def test_an_array_in_many_chunks_is_read_as_it_was_written(read_bytes, tmp_path, monkeypatch):
    monkeypatch.setattr("llada_jax.storage.arrays.READ_BYTES", read_bytes)
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    places = jax.tree.map(lambda leaf: leaf.sharding, abstract_parameters(make_model(LLADA), mesh))
    params = random_params(LLADA)
    run = write_checkpoint(tmp_path / "run", LLADA, jax.device_put(params, places))
    saved, _ = find_checkpoint(str(run))
    for name in ("q", "ff_out", "attn_norm"):
        expected = params["blocks"][name]
        np.testing.assert_array_equal(
            saved.read_array(7, f"params/blocks/{name}", expected.shape), expected
        )
    np.testing.assert_array_equal(
        saved.read_array(7, "params/lm_head", (32, 320)), params["lm_head"]
    )


def test_an_array_of_one_device_is_saved_in_chunks_of_bounded_size(tmp_path, monkeypatch):
    monkeypatch.setattr("llada_jax.checkpoints.workdir.CHUNK_BYTES", 2_000)
    seen = []
    real = read_chunks
    monkeypatch.setattr(
        "llada_jax.checkpoints.workdir.read_chunks",
        lambda store: seen.append(store.chunk_layout.read_chunk.shape) or real(store),
    )
    params = random_params(LLADA)
    run = write_checkpoint(tmp_path / "run", LLADA, params)
    saved, _ = find_checkpoint(str(run))
    np.testing.assert_array_equal(
        saved.read_array(7, "params/lm_head", (32, 320)), params["lm_head"]
    )
    assert 4 * np.prod(seen) <= 2_000 < params["lm_head"].nbytes
    seen.clear()
    assert saved.restore_params(
        7,
        abstract_parameters(make_model(LLADA), make_mesh({"fsdp": -1})),
        ema=False,
    )


# ---- the hub


class FakeHub:
    """Stands where huggingface_hub.HfApi does and notes what it is asked."""

    def __init__(self, calls: list, *, fails_at: str = ""):
        self.calls, self.fails_at = calls, fails_at

    def __call__(self):
        return self

    def _note(self, name, *args, **kwargs):
        if name == self.fails_at:
            raise OSError(f"{name} answers 403 Forbidden")
        self.calls.append((name, args, kwargs))

    def whoami(self):
        self._note("whoami")

    def create_repo(self, *args, **kwargs):
        self._note("create_repo", *args, **kwargs)

    def upload_folder(self, *, folder_path, **kwargs):
        files = sorted(path.name for path in Path(folder_path).iterdir())
        self._note("upload_folder", folder_path=folder_path, files=files, **kwargs)


def test_a_dry_run_writes_and_uploads_nothing(workdir, tmp_path, capfd, monkeypatch):
    calls = []
    monkeypatch.setattr("huggingface_hub.HfApi", FakeHub(calls))
    more = ["--dry-run", "--push-to-hub", "me/model", "--shard-size", "100KB"]
    export(workdir, tmp_path / "out", *more)
    out = capfd.readouterr().out
    assert list(tmp_path.iterdir()) == []
    assert "would upload all of it to me/model" in out
    assert [name for name, _, _ in calls] == ["whoami"]
    real = export(workdir, tmp_path / "out", "--shard-size", "100KB")
    listed = {
        line.split()[1]: int(line.split()[0].replace(",", ""))
        for line in out.splitlines()
        if line.startswith("  ")
    }
    listed.pop("README.md")  # names the repository
    assert listed == {
        file.name: file.stat().st_size for file in real.iterdir() if file.name != "README.md"
    }


def test_the_hub_gets_the_whole_directory_in_a_private_repository(
    workdir, tmp_path, capfd, monkeypatch
):
    calls = []
    monkeypatch.setattr("huggingface_hub.HfApi", FakeHub(calls))
    out = export(workdir, tmp_path / "out", "--push-to-hub", "me/model")
    assert [name for name, _, _ in calls] == ["whoami", "create_repo", "upload_folder"]
    assert calls[1][1:] == (
        ("me/model",),
        {"repo_type": "model", "private": True, "exist_ok": True},
    )
    uploaded = calls[2][2]
    assert uploaded["repo_id"] == "me/model"
    assert uploaded["files"] == sorted(file.name for file in out.iterdir())
    assert 'from_pretrained("me/model"' in (out / "README.md").read_text()
    assert "uploaded to me/model" in capfd.readouterr().out


def test_a_hub_that_refuses_is_told_before_the_work_and_an_upload_that_fails_keeps_the_export(
    workdir, tmp_path, refused, monkeypatch, capfd
):
    out = tmp_path / "out"
    assert "must be a repository such as" in refused(
        "--checkpoint", workdir, "--push-to-hub", "model", output=out
    )
    monkeypatch.setattr("huggingface_hub.HfApi", FakeHub([], fails_at="whoami"))
    sentence = refused("--checkpoint", workdir, "--push-to-hub", "me/model", output=out)
    assert "you are not logged in to the Hub (whoami answers 403 Forbidden)" in sentence
    monkeypatch.setattr("huggingface_hub.HfApi", FakeHub([], fails_at="upload_folder"))
    assert (
        main(
            [
                "export",
                "--checkpoint",
                str(workdir),
                "--output",
                str(out),
                "--push-to-hub",
                "me/model",
            ]
        )
        == 2
    )
    assert f"{out} is complete, but me/model did not take it" in capfd.readouterr().err
    same(read_back(out, LLADA), read_back(export(workdir, tmp_path / "again"), LLADA))

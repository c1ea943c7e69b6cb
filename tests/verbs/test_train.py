"""Whole runs as users start them: every config and objective, what is written, and where a run may
start.
"""

import html
import json
import lzma
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from support import configs
from support.datasets import SEQUENCE_LENGTH, write_dataset
from support.paths import ROOT
from support.runs import losses, metric_lines, saved_arrays

from llada_jax.__main__ import main
from llada_jax.config import default_config, load_config
from llada_jax.run.metrics_file import read_samples
from llada_jax.run.tensorboard import as_code
from llada_jax.verbs.evaluate import write_report
from llada_jax.verbs.train import recorded_remat

SMALL = {
    "num_steps": 2,
    "num_tokens": 0,
    "data.batch_size": 8,
    "optimizer.gradient_accumulation": 2,
    "data.sequence_length": SEQUENCE_LENGTH,
    "mesh.sequence": 1,
    "model.vocab_size": 0,
    "model.num_layers": 2,
    "model.d_model": 32,
    "model.head_dim": 8,
    "model.d_ff": 64,
    "evaluation.every_steps": 1,
    "evaluation.num_batches": 1,
    "evaluation.final_num_batches": 1,
    "log.every_steps": 1,
}


def words(knobs: dict) -> list[str]:
    return [f"{key}={value}" for key, value in knobs.items()]


def kind(path: Path) -> tuple:
    """Returns what sets the program of a config apart once the network is small."""
    config = load_config(str(path))
    is_packed = not config.data.attend_across_documents
    return config.objective.name, config.optimizer.name, config.lora.rank > 0, is_packed


# One config of each kind; those of a kind differ in sizes and rates alone.
CONFIGS = list({kind(path): path for path in reversed(configs.CONFIGS)}.values())


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_kind_of_config_trains_when_it_is_made_small(config, runs, dialogues, pairs):
    workdir = runs.directory / f"config-{config.stem}"
    data = []
    # as its docstring prepares them
    rows = "padded" if "rows=padded" in config.read_text() else "packed"
    records_of = {"sft": dialogues, "vrpo": pairs}.get(load_config(str(config)).objective.name)
    if records_of:
        data = [f"data.path={records_of(rows)}", "checkpoint.init_from="]
    log = runs.train(workdir, *words(SMALL), *data, config=config)
    assert [line["step"] for line in metric_lines(workdir, "train")] == [1, 2]
    assert "final heldout" in log
    if records_of is dialogues:
        # 1 to 8 letters, and what ends them
        lengths = json.loads((workdir / "run.json").read_text())["lengths"]["answers"]
        assert (lengths["most"], lengths["longest"]) == (9, 9)


@pytest.fixture(scope="module")
def rich_run(runs, tmp_path_factory):
    """A run that uses everything at once; returns its workdir and what it said."""
    rng = np.random.default_rng(1)
    other = tmp_path_factory.mktemp("other") / "data"
    other.mkdir()
    digits = (48 + np.cumsum(rng.integers(1, 3, 9000)) % 10).astype(np.int32)
    write_dataset(other, {"train": digits[:8000], "heldout": digits[8000:]})
    workdir = runs.directory / "rich"
    log = runs.train(
        workdir,
        f"data.path={runs.dataset}=0.7,{other}=0.3",
        "optimizer.ema_decay=0.9",
        "optimizer.name=muon",
        "optimizer.gradient_accumulation=2",
        "optimizer.gradient_dtype=float32",
        "samples.every_steps=20",
        "samples.gen_length=8",
        "samples.steps=8",
        "samples.block_length=8",
        "log.tensorboard=true",
        "log.profile_at_step=12",
        "log.profile_num_steps=2",
        "objective.masking=exact_count",
        "objective.weight=none",
        "data.attend_across_documents=false",
        "model.qk_norm=per_head",
        "model.tie_embeddings=true",
    )
    return workdir, log


@pytest.mark.slow
def test_the_start_up_lines_say_what_will_be_run_with_the_arithmetic(rich_run):
    _, log = rich_run
    for piece in (
        "initialisation from seed 0",
        "16 rows * 32 = 512 tokens in 2 microbatches",
        "20 steps = 10.2k tokens",
        "12 * 2 layers * 32 * 32",
        "per device for parameters and optimizer state",
        "no MFU: the peak of 'cpu' is unknown",
        "epochs",
        "attention xla",
        "compiled",
    ):
        assert piece in log, piece
    # no terminal: no colours, and no bar
    assert "\x1b" not in log
    assert "\r" not in log


@pytest.mark.slow
def test_a_workdir_holds_the_files_of_the_tour_and_no_others(rich_run):
    workdir, _ = rich_run
    picture = re.search(r"^WORKDIR/(.+?)^```", (ROOT / "docs/tour.md").read_text(), re.M | re.S)
    first_columns = [line[:31].strip() for line in ("        " + picture[1]).splitlines()]
    named = {name.split("/")[0] for column in first_columns for name in column.split()}
    assert {path.name for path in workdir.iterdir()} == named
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["10", "20"]


@pytest.mark.slow
def test_metrics_hold_the_curve_and_keep_the_machine_apart(rich_run):
    workdir, _ = rich_run
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    train = [line for line in lines if "train" in line]
    assert [line["step"] for line in train] == list(range(1, 21))
    wanted = {
        "loss",
        "nelbo",
        "masked_accuracy",
        "bits_per_byte",
        "grad_norm",
        "param_norm",
        "learning_rate",
        "tokens",
    }
    seen = set().union(*(line["train"] for line in train))
    assert wanted | {f"nll_t{i}" for i in range(10)} == seen
    for line in train:
        # the rate of this step, and not the mean since the start
        rate = 1e-2 * min(1.0, line["step"] / 5)
        assert line["train"]["learning_rate"] == pytest.approx(rate, rel=1e-5)
        # each token is one byte
        assert line["train"]["bits_per_byte"] == pytest.approx(line["train"]["nelbo"] / np.log(2))
        assert {"tokens_per_s", "step_s", "data_wait_share", "rss_gib", "goodput"} <= set(
            line["speed"]
        )
        assert 0 <= line["speed"]["data_wait_share"] <= 1
    groups = {group for line in lines for group in line if group.startswith(("heldout", "final"))}
    assert groups == {"heldout_0_data", "heldout_1_data", "final_0_data", "final_1_data"}


@pytest.mark.slow
def test_tensorboard_opens_the_workdir(rich_run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    workdir, _ = rich_run
    board = EventAccumulator(str(workdir / "tensorboard"))
    board.Reload()
    assert {
        "1_train/loss",
        "1_train/nll_t5",
        "9_speed/tokens_per_s",
        "2_heldout_0_data/bits_per_byte",
    } <= set(board.Tags()["scalars"])
    assert [event.step for event in board.Scalars("1_train/loss")] == list(range(1, 21))
    curve = [event.value for event in board.Scalars("1_train/loss")]
    np.testing.assert_allclose(curve, losses(workdir), rtol=1e-6)
    texts = read_samples(workdir)
    assert [text["step"] for text in texts] == [20] * len(default_config().samples.prompts)
    (shown,) = board.Tensors("samples/text_summary")
    for text in texts:
        assert as_code(text["text"]) in shown.tensor_proto.string_val[0].decode()
    assert list((workdir / "profile").glob("**/*.xplane.pb"))


@pytest.mark.slow
def test_a_mixture_learns_both_of_its_sources(rich_run):
    workdir, _ = rich_run
    for number in (0, 1):
        before, after = (
            metric_lines(workdir, f"{group}_{number}_data")[0] for group in ("heldout", "final")
        )
        assert before["step"] < after["step"]
        assert after[f"final_{number}_data"]["nelbo"] < before[f"heldout_{number}_data"]["nelbo"]


@pytest.fixture(scope="module")
def small_run(runs):
    workdir = runs.directory / "small"
    runs.train(workdir)
    return workdir


@pytest.mark.slow
def test_run_json_names_what_auto_stands_for_and_a_continued_run_keeps_it(small_run, tmp_path):
    assert recorded_remat(str(tmp_path)) == "auto"
    assert recorded_remat(str(small_run)) == "dots"
    # as a run that began under another default has it
    content = json.loads((small_run / "run.json").read_text())
    content["config"]["model"]["remat"] = "none"
    (tmp_path / "run.json").write_text(json.dumps(content))
    assert recorded_remat(str(tmp_path)) == "none"


@pytest.mark.slow
def test_the_autoregressive_control_runs_on_the_same_data(runs, capsys):
    workdir = runs.directory / "autoregressive"
    runs.train(workdir, "objective.name=autoregressive")
    curve = losses(workdir)
    assert curve[-1] < curve[0] - 1
    assert "nll" in metric_lines(workdir, "train")[0]["train"]
    assert (
        main(["evaluate", "--checkpoint", str(workdir), "--data", str(runs.dataset), "--json"]) == 0
    )
    result = json.loads(capsys.readouterr().out)
    final = metric_lines(workdir, "final")[0]["final"]
    assert result["nll_nats_per_token"] == pytest.approx(final["nll"], rel=1e-4)
    words = ["sample", "--checkpoint", str(workdir), "--gen-length", "4"]
    assert main(words) == 0
    capsys.readouterr()
    assert main([*words, "--block-length", "2"]) == 2
    assert "block_length=2 is about denoising" in capsys.readouterr().err


@pytest.mark.slow
def test_restore_continues_the_whole_state_and_init_from_takes_the_weights_alone(runs, small_run):
    restored, initialised = runs.directory / "restored", runs.directory / "initialised"
    log = runs.train(restored, f"checkpoint.restore={small_run}@10")
    assert "start       step 10 of" in log
    np.testing.assert_array_equal(losses(restored), losses(small_run)[10:])
    # one step at a rate of zero: the weights are still those that it started from
    knobs = ("num_steps=1", "schedule.learning_rate=0.0", "evaluation.every_steps=0", "seed=5")
    log = runs.train(initialised, f"checkpoint.init_from={small_run}", *knobs)
    assert "start       weights of step 20 of" in log
    theirs, ours = saved_arrays(small_run, 20), saved_arrays(initialised, 1)
    assert set(theirs) == set(ours)
    counts = [name for name in ours if name.endswith(("'count']", "'step']"))]
    for name in ours:
        if name.startswith("['params']"):
            np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
    for name in counts:
        assert (int(theirs[name]), int(ours[name])) == (20, 1), name
    assert len(counts) >= 2


@pytest.mark.slow
def test_old_checkpoints_go_and_permanent_ones_stay(runs):
    workdir = runs.directory / "retention"
    runs.train(
        workdir, "checkpoint.every_steps=3", "checkpoint.keep=2", "checkpoint.keep_every_steps=6"
    )
    assert sorted(int(path.name) for path in (workdir / "checkpoints").iterdir()) == [6, 12, 18, 20]


@pytest.mark.slow
def test_evaluate_agrees_with_the_run_and_its_baselines_with_their_definitions(
    runs, small_run, capsys
):
    words = ["--checkpoint", str(small_run), "--data", str(runs.dataset)]
    assert main(["evaluate", *words, "--batch-size", "16", "--baselines", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    final = metric_lines(small_run, "final")[0]["final"]
    # the same rows in the same batches under the same masks
    assert result["nelbo_nats_per_token"] == pytest.approx(final["nelbo"], rel=1e-5)
    assert result["standard_error"] == pytest.approx(final["standard_error"], rel=1e-3)
    assert result["bits_per_byte"] == pytest.approx(final["bits_per_byte"], rel=1e-5)
    assert result["num_tokens"] == 4000
    assert result["bits_per_byte"] == pytest.approx(result["nelbo_nats_per_token"] / np.log(2))
    # the text once more, as the dataset fixture made it
    moves = np.random.default_rng(0).choice([1, 2, 5], p=[0.7, 0.2, 0.1], size=40_000)
    letters = (97 + np.cumsum(moves) % 26).astype(np.uint8)
    counts = np.bincount(letters[:36_000], minlength=260) + 1.0
    unigram = -np.log2(counts / counts.sum())[letters[36_000:]].mean()
    assert result["unigram_bits_per_byte"] == pytest.approx(unigram)
    size = lambda text: 8 * len(lzma.compress(text.tobytes(), preset=9))  # noqa: E731
    assert result["xz_bits_per_byte"] == pytest.approx(size(letters[36_000:]) / 4000)
    assert result["xz_after_train_bits_per_byte"] == pytest.approx(
        (size(letters) - size(letters[:36_000])) / 4000
    )
    assert main(["evaluate", *words, "--mc-samples", "3"]) == 0
    assert "an upper bound" in capsys.readouterr().out


@pytest.mark.slow
def test_the_page_of_a_run_has_its_curves_and_its_samples(rich_run, tmp_path):
    workdir, _ = rich_run
    write_report(SimpleNamespace(checkpoint=str(workdir), report=str(tmp_path)), {})
    page = (tmp_path / "report.html").read_text()
    titles = re.findall("<figcaption>([^<(,]*)", page)
    assert [title.strip() for title in titles] == [
        "Training loss",
        "Bound",
        "Loss by diffusion time",
        "Length of the gradient",
        "Learning rate",
        "Throughput",
    ]
    prompts = default_config().samples.prompts
    shown = re.findall("<tr><td>20</td><td><b>([^<]*)</b>", page.split("<h2>Samples</h2>")[1])
    assert shown == [html.escape(prompt) for prompt in prompts]


@pytest.mark.slow
def test_the_python_api_loads_scores_and_samples(small_run):
    import llada_jax

    model = llada_jax.load(f"{small_run}@10")
    assert model.step == 10
    assert model.config["num_steps"] == 20
    ids = model.tokenizer.encode("abcdefgh")
    logits = model.logits([ids])
    assert logits.shape == (1, 8, model.run["architecture"]["vocab_size"])
    texts = model.generate(["abc", "xyza"], gen_length=8, steps=8, block_length=8)
    assert len(texts) == 2
    assert texts == model.generate(["abc", "xyza"], gen_length=8, steps=8, block_length=8)
    canvas = model.generate_tokens(np.array([ids, ids]), gen_length=4)
    assert canvas.shape == (2, 12)
    np.testing.assert_array_equal(canvas[:, :8], [ids, ids])
    assert (canvas != model.tokenizer.mask_id).all()


@pytest.mark.slow
def test_a_second_train_in_the_same_workdir_is_refused_and_harms_nothing(runs):
    workdir = runs.directory / "twice"
    first = runs.start(workdir, "num_steps=100000", "checkpoint.every_steps=1")
    while not (workdir / "checkpoints" / "2").exists():
        assert first.poll() is None, first.stderr.read()
    second = runs.start(workdir, "num_steps=100000", "checkpoint.every_steps=1")
    _, log = second.communicate(timeout=120)
    assert second.returncode == 2
    assert f"Another train is writing into {workdir}" in log
    first.terminate()
    _, log = first.communicate(timeout=120)
    assert first.returncode == 42, log


@pytest.mark.slow
def test_fewer_steps_than_are_done_are_refused(runs, small_run):
    process = runs.start(small_run, "num_steps=5")
    _, log = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "is at step 20 and the config ends at 5" in log


def sampled_texts(workdir) -> list[str]:
    """What TensorBoard shows under "samples", oldest first."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(workdir / "tensorboard"))
    board.Reload()
    return [
        event.tensor_proto.string_val[0].decode() for event in board.Tensors("samples/text_summary")
    ]


@pytest.mark.slow
def test_several_processes_sample_while_they_train_what_one_samples(runs):
    # many steps: when all of them were dispatched at once, they hung
    lengths = [f"samples.{name}=48" for name in ("gen_length", "steps", "block_length")]
    knobs = (
        "num_steps=6",
        "schedule.name=cosine",
        "samples.every_steps=6",
        "log.tensorboard=true",
        *lengths,
    )
    alone, together = runs.directory / "samples-of-one", runs.directory / "samples-of-two"
    runs.train(alone, *knobs)
    runs.train(together, *knobs, num_devices=4, num_processes=2)
    texts = sampled_texts(alone)
    assert len(texts) == 1
    assert len(texts[0]) > 4
    assert sampled_texts(together) == texts

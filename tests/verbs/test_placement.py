"""`sample` and `evaluate` over a mesh and in bfloat16: what they say on one device."""

import json
import os
import re
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.datasets import lines_dataset
from support.exports import LLADA, write_checkpoint
from support.fork_server import SERVER
from support.hf_directories import random_params, write_huggingface
from support.paths import PUBLISHED
from support.runs import free_port

import llada_jax
from llada_jax.__main__ import main
from llada_jax.cluster.sharding import make_mesh
from llada_jax.models.model import in_compute_dtype

# Eight devices: rows and parameters split four ways, heads two ways.
MESH = ["--mesh", "fsdp=2,sequence=2,tensor=2"]
SAMPLE = ["--prompt", "it is", "a", "--gen-length", "16", "--block-length", "8", "--steps", "4"]


@pytest.fixture
def said(capfd):
    """Returns said(verb, *words) -> the object that a command prints with --json."""

    def call(*words) -> dict:
        capfd.readouterr()
        assert main([*map(str, words), "--json"]) == 0
        return json.loads(capfd.readouterr().out)

    return call


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    return lines_dataset(tmp_path_factory.mktemp("lines"), num_lines=100, sequence_length=48)


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--commit", "threshold=0.01", "--revise", "wino=0.5"]])
def test_samples_over_a_mesh_are_those_of_one_device(random_checkpoint, said, more):
    words = ["sample", "--checkpoint", random_checkpoint, *SAMPLE, *more]
    alone, together = said(*words), said(*words, *MESH)
    assert [s["tokens"] for s in together["samples"]] == [s["tokens"] for s in alone["samples"]]


def by_two_processes(*words) -> dict:
    """Returns the object that the first of two processes prints with --json."""
    team = {
        "JAX_COORDINATOR_ADDRESS": f"localhost:{free_port()}",
        "JAX_NUM_PROCESSES": "2",
        "JAX_NUM_CPU_DEVICES": "4",
    }
    processes = [
        SERVER.start(
            [*map(str, words), *MESH, "--json"],
            {**os.environ, **team, "JAX_PROCESS_ID": str(number)},
        )
        for number in range(2)
    ]
    outputs = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    # the library of the collectives on CPUs writes to stdout too
    results = [[line for line in out.splitlines() if line.startswith("{")] for out, _ in outputs]
    assert results[1] == []
    return json.loads(results[0][0])


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [["--temperature", "0.8", "--show"], ["--cache", "dual", "--refresh", "1", "--append"]],
)
def test_samples_of_two_processes_are_those_of_one(random_checkpoint, said, more):
    words = ["sample", "--checkpoint", random_checkpoint, *SAMPLE, *more]
    alone, together = said(*words), by_two_processes(*words)
    assert [s["tokens"] for s in together["samples"]] == [s["tokens"] for s in alone["samples"]]


def revealed(page: Path) -> list[tuple[int, int, float]]:
    """Returns (column, token, confidence) of what a page of `sample --html` reveals, in order."""
    (recording,) = re.findall(r'id="recording">(.*?)</script>', page.read_text())
    samples = json.loads(recording)["samples"]
    return [
        tuple(entry)
        for sample in samples
        for frame in sample["frames"]
        for entry in frame["revealed"]
    ]


@pytest.mark.slow
def test_two_processes_write_the_page_that_one_writes(random_checkpoint, said, tmp_path):
    words = ["sample", "--checkpoint", random_checkpoint, *SAMPLE, "--html"]
    said(*words, tmp_path / "alone.html")
    by_two_processes(*words, tmp_path / "together.html")
    alone, together = (revealed(tmp_path / name) for name in ("alone.html", "together.html"))
    assert [entry[:2] for entry in together] == [entry[:2] for entry in alone]
    np.testing.assert_allclose(
        [confidence for *_, confidence in together],
        [confidence for *_, confidence in alone],
        atol=2e-3,
    )


@pytest.mark.slow
def test_scores_of_two_processes_are_those_of_one(random_checkpoint, records, said, tmp_path):
    (tmp_path / "tasks.jsonl").write_text('{"prompt": "line 4", "answer": " of the text"}\n')
    of_data, of_tasks = ["--data", records], ["--tasks", tmp_path / "tasks.jsonl"]
    for more in ([*of_data, "--batch-size", "8"], [*of_tasks, "--mc-samples", "8"]):
        words = ["evaluate", "--checkpoint", random_checkpoint, *more]
        alone, together = said(*words), by_two_processes(*words)
        assert together.keys() == alone.keys()
        numbers = [key for key, value in alone.items() if isinstance(value, float)]
        for key in numbers:
            assert together[key] == pytest.approx(alone[key], rel=1e-4, abs=1e-5), key


def start_two(commands, *, folders=(".", ".")) -> list:
    """Starts two processes of one run with one device each; commands: of each; folders: where."""
    team = {"JAX_COORDINATOR_ADDRESS": f"localhost:{free_port()}", "JAX_NUM_PROCESSES": "2"}
    processes, here = [], os.getcwd()
    for number, (words, folder) in enumerate(zip(commands, folders, strict=True)):
        environment = {**os.environ, **team, "JAX_PROCESS_ID": str(number)}
        os.chdir(folder)
        try:
            processes.append(
                SERVER.start(
                    [*map(str, words)], {**environment, "JAX_NUM_CPU_DEVICES": "1", "COLUMNS": "80"}
                )
            )
        finally:
            os.chdir(here)
    return processes


@pytest.fixture(scope="module")
def two_folders(random_checkpoint, records, tmp_path_factory):
    """Two folders with entries of the same names, none of which is the same."""
    home = tmp_path_factory.mktemp("folders")
    other = write_checkpoint(home / "run", LLADA, random_params(LLADA, seed=2))
    others = lines_dataset(home, num_lines=90, sequence_length=48)
    folders = [home / "host0", home / "host1"]
    for folder, run, data, word in zip(
        folders, (random_checkpoint, other), (records, others), "ab"
    ):
        folder.mkdir()
        (folder / "run").symlink_to(run)
        (folder / "data").symlink_to(data)
        write_huggingface(folder / "hf", "llada", LLADA, seed=ord(word))
        (folder / "prompts.txt").write_text(word)
        (folder / "tasks.jsonl").write_text(json.dumps({"prompt": "line", "answer": word}))
    return folders


EVALUATE = ["evaluate", "--mesh", "fsdp=2", "--checkpoint"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "differs"),
    [
        (
            [*EVALUATE, "{shared}", "--data", "data", "--seed", "{number}"],
            "--seed is 0 on process 0 and 1 on process 1",
        ),
        (["export", "--checkpoint", "run", "--output", "out"], "the checkpoint is step 7 ("),
        (
            ["import", "--from", "hf{number}", "--output", "imported"],
            "--from is hf0 on process 0 and hf1 on process 1",
        ),
        (["import", "--from", "hf", "--output", "imported"], "the checkpoint is step 0 ("),
        (
            ["import", "--from", "{published}", "--output", "imported"],
            "the folder of --output is one folder on process 0 and another on process 1",
        ),
        (["sample", "--mesh", "fsdp=2", "--checkpoint", "run", *SAMPLE], "the checkpoint is"),
        (
            ["sample", "--mesh", "fsdp=2", "--checkpoint", "{shared}"]
            + ["--prompt-file", "prompts.txt", "--gen-length", "8"],
            "the list of prompts is ['a'] on process 0 and ['b'] on process 1",
        ),
        ([*EVALUATE, "{shared}", "--data", "data"], "the dataset is"),
        ([*EVALUATE, "{shared}", "--tasks", "tasks.jsonl"], "the file of questions is"),
    ],
)
def test_processes_that_are_asked_for_different_things_are_refused(
    random_checkpoint, two_folders, words, differs
):
    commands = [
        [
            word.format(shared=random_checkpoint, published=PUBLISHED, number=number)
            for word in words
        ]
        for number in range(2)
    ]
    processes = start_two(commands, folders=two_folders)
    outputs = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [2, 2], outputs
    for _, log in outputs:
        assert f"The processes of this run differ: {differs}" in log.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sent", "status"), [(signal.SIGKILL, -9), (signal.SIGTERM, -15), (signal.SIGINT, 130)]
)
def test_a_process_that_ends_takes_the_others_with_it(random_checkpoint, sent, status):
    words = ["sample", "--checkpoint", random_checkpoint, *SAMPLE, "--mesh", "fsdp=2"]
    processes = start_two([[*words, "--batch-size", "2", "--num-samples", "5000"]] * 2)
    for line in processes[1].stderr:  # until the model is loaded
        if "repeats the same text" in line:
            break
    processes[1].send_signal(sent)
    _, log = processes[0].communicate(timeout=60)
    assert (processes[0].returncode, processes[1].wait(60)) == (42, status), log
    assert "Another process of this run is gone (" in log or "has ended this process" in log
    assert "start the same command again on all hosts" in log.splitlines()[-1]
    processes[1].communicate()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_bound_over_a_mesh_is_that_of_one_device(random_checkpoint, records, said, dtype):
    """With a batch that the devices do not divide."""
    words = ["evaluate", "--checkpoint", random_checkpoint, "--data", records, "--dtype", dtype]
    alone = said(*words, "--batch-size", "8")
    together = said(*words, "--batch-size", "7", *MESH)  # rounded up
    assert together["num_tokens"] == alone["num_tokens"] > 0
    tolerance = 1e-5 if dtype == "float32" else 2e-3
    assert together["nelbo_nats_per_token"] == pytest.approx(
        alone["nelbo_nats_per_token"], rel=tolerance
    )


@pytest.mark.slow
def test_matrices_in_bfloat16_change_no_logits_and_a_mesh_only_rounds_them(random_checkpoint):
    tokens_BT = np.arange(24).reshape(2, 12)
    kept = llada_jax.load(str(random_checkpoint), dtype="bfloat16")
    cast = llada_jax.load(str(random_checkpoint), dtype="bfloat16", keep_float32=False)
    split = llada_jax.load(
        str(random_checkpoint),
        dtype="bfloat16",
        keep_float32=False,
        mesh=make_mesh({"fsdp": 4, "tensor": 2}),
    )
    assert len(split.params["blocks"]["q"].sharding.device_set) == 8
    np.testing.assert_allclose(split.logits(tokens_BT), kept.logits(tokens_BT), atol=0.05)
    assert cast.params["blocks"]["q"].dtype == jnp.bfloat16
    assert cast.params["blocks"]["attn_norm"].dtype == jnp.float32
    np.testing.assert_array_equal(cast.logits(tokens_BT), kept.logits(tokens_BT))


def test_a_cast_keeps_norms_biases_and_shards():
    mesh = make_mesh({"fsdp": 8})
    shards = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
    ones = jax.device_put(jnp.ones(8), shards)
    params = {"embed": ones, "final_norm": ones, "blocks": {"q": ones, "q_bias": ones}}
    cast = in_compute_dtype(params, jnp.bfloat16)
    dtypes = jax.tree.map(lambda leaf: leaf.dtype.name, cast)
    assert dtypes == {
        "embed": "bfloat16",
        "final_norm": "float32",
        "blocks": {"q": "bfloat16", "q_bias": "float32"},
    }
    assert cast["embed"].sharding == shards


@pytest.mark.parametrize("verb", ["sample", "evaluate"])
@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--mesh", "fdsp=8"], "there is no axis 'fdsp'. Did you mean 'fsdp'?"),
        (["--mesh", "fsdp=3"], "needs 3 devices, and there are 8"),
        (["--mesh", "tensor=8"], "query heads=4 cannot be split 8 ways"),
        (["--dtype", "float16"], "invalid choice: 'float16'"),
    ],
)
def test_impossible_places_are_refused(random_checkpoint, capfd, tmp_path, verb, words, sentence):
    (tmp_path / "q.jsonl").write_text('{"prompt": "a", "answer": "b"}\n')
    about = ["--tasks", str(tmp_path / "q.jsonl")] if verb == "evaluate" else []
    status = main([verb, "--checkpoint", str(random_checkpoint), *about, *words])
    assert status == 2
    assert sentence in capfd.readouterr().err

"""Every mistake and every mishap of the Errors paragraph, provoked as a user would meet it.

Each ends with one sentence that holds the value, the constraint and the remedy, with the exit
status that launchers act on, without a traceback, and with every byte of the data set and of the
run where it was.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from support.runs import losses, metric_lines

import llada_jax
from llada_jax.__main__ import main
from llada_jax.checkpoints.workdir import Checkpoints
from llada_jax.data.tokenizer import load_tokenizer
from llada_jax.errors import UserError

CONFIG = """
from llada_jax.config import default_config


def get_config():
    config = default_config()
    config.num_steps = 4
    config.data.path = {data!r}
    config.data.batch_size = 8
    config.data.sequence_length = 16
    config.data.num_threads = 1
    config.data.prefetch = 1
    config.model.num_layers = 1
    config.model.d_model = 16
    config.model.num_heads = config.model.num_kv_heads = 1
    config.model.head_dim = 16
    config.model.d_ff = 16
    config.model.nll_chunk = 16
    config.schedule.name = "constant"
    config.schedule.learning_rate = 1e-3
    config.schedule.warmup_steps = 0
    config.evaluation.every_steps = 0
    config.evaluation.final_num_batches = 1
    config.checkpoint.every_steps = 2
    config.log.every_steps = 2
    config.log.tensorboard = False
    {change}
    return config
"""

WORDS = [
    "truth",
    "universally",
    "acknowledged",
    "single",
    "man",
    "possession",
    "of",
    "a",
    "good",
    "fortune",
]

# What train says on stderr before a mishap in the middle of a run; everything else must be the one
# sentence.
PLAN_LINE = re.compile(
    r"(start|model|step|run|FLOPs|mesh|memory|compute|data|compiled|saving|final) .*|the run is "
    r"complete.*|prepare: .*"
)


# ---- what tests stand on


@pytest.fixture(autouse=True)
def _no_mesh_after_a_test():
    yield
    jax.set_mesh(None)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A directory with text.txt, the data sets data/ (bytes) and spm/ (SentencePiece), tiny.py and
    the run run/.
    """
    home = tmp_path_factory.mktemp("errors")
    rng = np.random.default_rng(0)
    lines = [" ".join(rng.choice(WORDS, size=rng.integers(3, 12))) for _ in range(600)]
    (home / "text.txt").write_text("\n".join(lines) + "\n")
    for name, tokenizer in (("data", "bytes"), ("spm", "spm:300")):
        argv = prepare_argv(
            home / "text.txt", home / name, "--documents", "line", "--heldout", "0.1"
        )
        assert main([word if word != "bytes" else tokenizer for word in argv]) == 0
    write_config(home)
    assert main(train_argv(home, home / "run")) == 0
    assert Checkpoints(home / "run").steps == [2, 4]
    return home


def prepare_argv(source, output, *more: str) -> list[str]:
    words = ["prepare", "--input", str(source), "--output", str(output), "--sequence-length", "16"]
    return [*words, "--tokenizer", "bytes", "--workers", "1", *more]


def write_config(home: Path, change: str = "", name: str = "tiny.py") -> Path:
    path = home / name
    path.write_text(CONFIG.format(data=str(home / "data"), change=change))
    return path


def train_argv(home: Path, workdir, *overrides: str, config: str = "tiny.py") -> list[str]:
    flags = [f"--config.{override}" for override in overrides]
    return ["train", "--config", str(home / config), "--workdir", str(workdir), *flags]


def copy(source: Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target))


def tree(path: Path) -> dict[str, bytes]:
    """Every file below a path with its bytes; of a path that does not exist, nothing."""
    return {
        str(f.relative_to(path)): f.read_bytes() for f in sorted(path.rglob("*")) if f.is_file()
    }


@pytest.fixture
def refused(capfd):
    """Runs a command that must fail; returns its one sentence.

    keeps: directories in which no byte may change. creates: a path that must not exist afterwards.
    is_late: the mishap comes after the run has begun, so that the lines of the plan may stand
    before the sentence.
    """

    def refused(argv, *, says, status=2, keeps=(), creates=None, is_late=False) -> str:
        before = [tree(path) for path in keeps]
        capfd.readouterr()
        assert main([str(word) for word in argv]) == status
        out, err = capfd.readouterr()
        *said_before, sentence = err.splitlines()
        assert out == ""
        assert [line for line in said_before if not (is_late and PLAN_LINE.fullmatch(line))] == []
        check_sentence(sentence, says)
        assert [tree(path) for path in keeps] == before
        assert creates is None or not Path(creates).exists()
        return sentence

    return refused


def check_sentence(sentence: str, says) -> None:
    """One sentence, short enough to be read, that holds all of `says`; a question or the list of
    names may follow.
    """
    assert sentence.startswith("llada-jax: ")
    assert sentence.endswith((".", "?"))
    assert len(sentence) < 700, len(sentence)
    assert not re.search(r"[.?!] (?!Did you mean|Known:)[A-Z]", sentence), sentence
    assert "object at 0x" not in sentence
    assert "<class" not in sentence
    missing = [words for words in says if words not in sentence]
    assert not missing, (missing, sentence)


def flip(path: Path, *, every: int | None = None) -> None:
    """Inverts one bit in the middle of a file, or one in every so many bytes."""
    content = bytearray(path.read_bytes())
    for i in range(every // 2, len(content), every) if every else [len(content) // 2]:
        content[i] ^= 0x10
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


# ---- the config


OVERRIDES = {
    "misspelt knob": (
        ["schedule.learning_rte=1"],
        ["schedule.learning_rte", "Did you mean 'schedule.learning_rate'?"],
    ),
    "misspelt group": (["optimzer.b2=0.9"], ["optimzer", "Did you mean 'optimizer'?"]),
    "a group as a knob": (["optimizer=adamw"], ["no knob 'optimizer'", "Did you mean 'optimizer."]),
    "no value": (["optimizer.b2"], ["optimizer.b2 has no value", "=VALUE"]),
    "text for an integer": (["num_steps=many"], ["num_steps=many is not of type int", "default is 4"]),
    "fraction for an integer": (["num_steps=1.5"], ["num_steps=1.5 is not of type int"]),
    "text for a number": (["schedule.learning_rate=fast"], ["learning_rate=fast is not of type float"]),
    "no boolean": (["model.tie_embeddings=yes"], ["tie_embeddings=yes is not of type bool", "False"]),
    "no tuple": (["samples.prompts=Once"], ["samples.prompts=Once is not of type tuple"]),
    "unhashable": (["num_steps={[]}"], ["num_steps={[]} is not of type int"]),
    "unknown choice": (["objective.masking=bernouli"], ["'bernouli'", "Did you mean 'bernoulli'?"]),
    "too small": (["checkpoint.every_steps=0"], ["checkpoint.every_steps=0", "at least 1"]),
    "negative steps": (["num_steps=-5", "num_tokens=1000"], ["num_steps=-5", "at least 0"]),
    "negative interval": (
        ["evaluation.every_steps=-1"],
        ["evaluation.every_steps=-1", "at least 0"],
    ),
    "negative seed": (["seed=-1"], ["seed", "-1"]),
    "infinite rate": (
        ["schedule.learning_rate=1e999"],
        ["schedule.learning_rate", "inf", "finite"],
    ),
    "steps and tokens": (["num_tokens=1000"], ["num_steps=4", "num_tokens=1000", "exactly one"]),
    "heads": (
        ["model.num_heads=3", "model.num_kv_heads=2"],
        ["num_heads=3", "multiple of num_kv_heads=2"],
    ),
    "accumulation": (
        ["optimizer.gradient_accumulation=3"],
        ["batch_size=8", "gradient_accumulation=3"],
    ),
    "samples": (
        ["samples.every_steps=2", "samples.gen_length=5", "samples.block_length=2"],
        ["block_length=2", "divide"],
    ),
    "no prompts": (["samples.prompts=()"], ["samples.prompts=()", "at least one"]),
    "prompts of numbers": (["samples.prompts=(1, 2)"], ["samples.prompts=(1, 2)", "texts"]),
    "a rule that is no pair": (
        ["optimizer.weight_decay_multipliers=('.*',)"],
        ["weight_decay_multipliers", "(regex, factor)"],
    ),
    "a factor of text": (
        ["optimizer.learning_rate_multipliers=(('.*', 'x'),)"],
        ["('.*', 'x')", "(regex, factor)"],
    ),
    "no regex": (
        ["optimizer.learning_rate_multipliers=(('(', 1.0),)"],
        ["learning_rate_multipliers", "regular expression"],
    ),
    "a rate of text": (
        ["schedule.name=llada", "schedule.stages=((1e9, 'a', 1),)"],
        ["schedule.stages", "'a'", "rate"],
    ),
    "huge seed": (["seed=4294967296"], ["seed=4294967296", "2**32"]),
    "kernel of a GPU": (
        ["model.attention=cudnn"],
        ["'cudnn'", "gpu", "the mesh is of cpu", "config.model.attention"],
    ),
    "kernel of a TPU": (
        ["model.attention=splash"],
        ["'splash'", "tpu", "the mesh is of cpu", "config.model.attention"],
    ),
    "samples without masks": (
        ["objective.name=autoregressive", "samples.every_steps=2", "samples.block_length=1"],
        ["samples.every_steps=2", "masked_diffusion"],
    ),
    "restore and init": (
        ["checkpoint.restore=a", "checkpoint.init_from=b"],
        ["restore", "init_from", "keep one"],
    ),
    "batch on the mesh": (
        ["data.batch_size=12"],
        ["data.batch_size", "12", "8 ways", "multiple of 8"],
    ),
    "microbatch on the mesh": (
        ["optimizer.gradient_accumulation=2"],
        ["gradient_accumulation=4", "8 ways"],
    ),
    "width on the mesh": (
        ["model.d_model=12"],
        ["config.model.d_model=12", "8 ways", "multiple of 8"],
    ),
    "mesh and devices": (
        ["mesh.fsdp=16"],
        ["fsdp=16", "16 devices", "there are 8", "change config.mesh"],
    ),
    "mesh remainder": (
        ["mesh.data=3"],
        ["data=3", "multiple of 3", "there are 8", "change config.mesh"],
    ),
    "mesh of nothing": (["mesh.fsdp=0"], ["fsdp=0", "at least 1"]),
    "mesh of two rests": (["mesh.data=-1"], ["data=-1", "fsdp=-1", "at most one is -1"]),
    "vocabulary": (["model.vocab_size=64"], ["vocab_size=64", "260", "set it to 0"]),
    "uncovered parameter": (
        ["optimizer.learning_rate_multipliers=(('embed', 2.0),)"],
        ["learning_rate_multipliers", "covers", "('.*', value)"],
    ),
}


@pytest.mark.parametrize("case", OVERRIDES)
def test_an_impossible_override_is_refused(case, home, tmp_path, refused):
    overrides, says = OVERRIDES[case]
    refused(
        train_argv(home, tmp_path / "run", *overrides),
        says=says,
        creates=tmp_path / "run",
        keeps=[home / "data"],
    )


CONFIG_FILES = {
    "misspelt knob": (
        "config.schedule.learning_rte = 1",
        ["learning_rte", "id you mean", "learning_rate"],
    ),
    "misspelt group": ("config.optimzer.b2 = 0.9", ["optimzer", "id you mean", "optimizer"]),
    "wrong type": ("config.num_steps = 'ten'", ["num_steps", "ten", "int"]),
    "syntax": ("config.num_steps = = 3", ["SyntaxError"]),
    "exception": ("1 / 0", ["ZeroDivisionError", "division by zero"]),
    "nothing returned": ("return", ["get_config()", "NoneType", "default_config()"]),
    "another config": (
        "from ml_collections import ConfigDict; config = ConfigDict({'num_steps': 3})",
        ["get_config()", "default_config()"],
    ),
}


@pytest.mark.parametrize("case", CONFIG_FILES)
def test_a_broken_config_file_is_refused(case, home, tmp_path, refused):
    change, says = CONFIG_FILES[case]
    write_config(home, change, name="broken.py")
    argv = train_argv(home, tmp_path / "run", config="broken.py")
    refused(argv, says=["broken.py", *says], creates=tmp_path / "run")


def test_a_config_file_that_is_missing_or_defines_nothing_is_refused(home, tmp_path, refused):
    (home / "empty.py").write_text("")
    says = {"absent.py": "There is no config file", "empty.py": "defines no get_config()"}
    for name, words in says.items():
        refused(
            train_argv(home, tmp_path / "run", config=name),
            says=[words, name],
            creates=tmp_path / "run",
        )


# ---- the data


def no_directory(data: Path):
    shutil.rmtree(data)


def other_json(data: Path):
    shutil.rmtree(data)
    data.mkdir()
    (data / "config.json").write_text('{"model_type": "llama"}')


def foreign_dataset(data: Path):
    (data / "dataset.json").write_text('{"name": "wikitext", "splits": ["train"]}')


def foreign_list(data: Path):
    (data / "dataset.json").write_text('[{"text": "Once upon a time"}]')


def foreign_format(data: Path):
    content = json.loads((data / "dataset.json").read_text())
    (data / "dataset.json").write_text(json.dumps({**content, "format": 7}))


def half_a_manifest(data: Path):
    truncate(data / "dataset.json")


def no_shard(data: Path):
    (data / "train-00000.arrayrecord").unlink()


def truncated_shard(data: Path):
    truncate(data / "train-00000.arrayrecord")


def no_tokenizer(data: Path):
    shutil.rmtree(data / "tokenizer")


def damaged_tokenizer(data: Path):
    truncate(data / "tokenizer" / "special_ids.json")


def other_special_ids(data: Path):
    """The tokenizer of another data set, of the same size, in the place of this one's."""
    path = data / "tokenizer" / "special_ids.json"
    path.write_text(
        path.read_text().replace('"mask": 256', '"mask": 259').replace('"pad": 259', '"pad": 256')
    )


DATASETS = {
    no_directory: ["data", "holds no dataset.json", "prepare"],
    other_json: ["holds no dataset.json", "prepare"],
    foreign_dataset: ["dataset.json", "not written by llada-jax prepare"],
    foreign_list: ["dataset.json", "not written by llada-jax prepare"],
    foreign_format: ["format 7", "reads format 1", "prepare the text again"],
    half_a_manifest: ["dataset.json", "not valid JSON", "prepare again"],
    no_shard: ["train-00000.arrayrecord", "is missing", "run prepare again"],
    truncated_shard: [
        "train-00000.arrayrecord",
        "bytes instead of",
        "delete it and run prepare again",
    ],
    no_tokenizer: ["no tokenizer at", "tokenizer"],
    damaged_tokenizer: ["tokenizer", "is damaged", "prepare the data again"],
    other_special_ids: ["data/tokenizer", "not the tokenizer of the records", "put that one back"],
}


@pytest.mark.parametrize("damage", DATASETS, ids=lambda damage: damage.__name__)
def test_a_missing_foreign_or_damaged_dataset_is_refused(damage, home, tmp_path, refused):
    data = copy(home / "data", tmp_path / "data")
    damage(data)
    argv = train_argv(home, tmp_path / "run", f"data.path={data}")
    refused(argv, says=DATASETS[damage], keeps=[tmp_path], creates=tmp_path / "run")


def test_datasets_that_do_not_fit_the_config_are_refused(home, tmp_path, refused):
    cases = {
        "data.path=": ["config.data.path=", "names no directory", "--config.data.path=DIR"],
        f"data.path={home / 'data'}=much": ["'much' is not a weight", "dir_a=0.7,dir_b=0.3"],
        f"data.path={home / 'data'}=-1": ["weight -1.0", "positive"],
        f"data.path={home / 'data'}=0.5,{home / 'spm'}=0.5": [
            "different tokenizers",
            "prepare both",
        ],
        "data.sequence_length=32": [
            "sequence_length 16",
            "32 is asked for",
            "--sequence-length 32",
        ],
    }
    for override, says in cases.items():
        argv = train_argv(home, tmp_path / "run", override)
        refused(argv, says=says, creates=tmp_path / "run", keeps=[home / "data", home / "spm"])


def test_a_corrupted_record_stops_training_and_keeps_the_run(home, tmp_path, refused):
    data, run = copy(home / "data", tmp_path / "data"), copy(home / "run", tmp_path / "run")
    flip(data / "train-00000.arrayrecord", every=64)
    argv = train_argv(home, run, f"data.path={data}", "num_steps=8")
    says = ["Record ", "train-00000.arrayrecord", "is damaged", "run prepare again"]
    refused(argv, says=says, keeps=[data, run / "checkpoints"], is_late=True)


def test_a_corrupted_held_out_record_stops_the_evaluation_and_keeps_the_run(
    home, tmp_path, refused
):
    data, run = copy(home / "data", tmp_path / "data"), copy(home / "run", tmp_path / "run")
    flip(data / "heldout-00000.arrayrecord", every=64)
    (run / "metrics.jsonl").write_text("")  # so that the last evaluation is due again
    argv = train_argv(home, run, f"data.path={data}")
    says = ["Record ", "heldout-00000.arrayrecord", "is damaged"]
    refused(argv, says=says, keeps=[data, run / "checkpoints"], is_late=True)


# ---- prepare


CORPORA = {
    "nothing at all": (None, ["matches no file", "--input"]),
    "an empty file": (b"", ["hold no text", "give files with text"]),
    "white space": (b" \n\t\n  \n", ["hold no text", "give files with text"]),
    "not UTF-8": (b"caf\xe9 noir\n" * 3, ["not valid UTF-8", "byte 3", "line 1", "iconv"]),
    "UTF-8 cut short": (
        "one line\ntwo caf\u00e9".encode()[:-1],
        ["not valid UTF-8", "line 2", "iconv"],
    ),
    "UTF-16": ("Once upon a time".encode("utf-16"), ["not valid UTF-8", "byte 0", "iconv"]),
}


@pytest.mark.parametrize("case", CORPORA)
def test_a_corpus_without_text_or_of_another_encoding_is_refused(case, tmp_path, refused):
    content, says = CORPORA[case]
    corpus = tmp_path / "corpus.txt"
    if content is not None:
        corpus.write_bytes(content)
    refused(prepare_argv(corpus, tmp_path / "data"), says=says, is_late=True)
    assert not (tmp_path / "data" / "dataset.json").exists()


def test_an_unusable_jsonl_or_gzip_is_refused(tmp_path, refused):
    cases = {
        "bad.jsonl": (
            b'{"text": "fine"}\n{"text": \n',
            ["bad.jsonl:2", "not valid JSON", "mend or remove"],
        ),
        "field.jsonl": (
            b'{"body": "fine"}\n',
            ["field.jsonl:1", "no field 'text'", "body", "--text-field"],
        ),
        "cut.txt.gz": (b"\x1f\x8b\x08\x00", ["cut.txt.gz", "truncated", "again"]),
        "text.csv": (b"a,b\n", ["text.csv", "no known format", ".jsonl"]),
    }
    for name, (content, says) in cases.items():
        (tmp_path / name).write_bytes(content)
        refused(prepare_argv(tmp_path / name, tmp_path / "data" / name), says=says, is_late=True)


def test_preparing_into_a_directory_of_something_else_keeps_it(home, tmp_path, refused):
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "train-00000.arrayrecord").write_text("not ours")
    refused(
        prepare_argv(home / "text.txt", photos),
        says=["not empty", "give a new directory"],
        keeps=[photos],
    )


def test_preparing_over_a_finished_dataset_with_other_settings_keeps_it(home, refused):
    argv = [
        word if word != "16" else "32" for word in prepare_argv(home / "text.txt", home / "data")
    ]
    argv += ["--documents", "line", "--heldout", "0.1"]
    says = ["--sequence-length 16", "says 32", "another --output"]
    refused(argv, says=says, keeps=[home / "data"])


# ---- the checkpoint


ANOTHER_RUN = {
    "width": (
        ["model.d_ff=32"],
        ["another architecture", "d_ff is 32 here and 16 there", "config.model"],
    ),
    "layers": (
        ["model.num_layers=2"],
        ["another architecture", "num_layers is 2 here and 1 there", "--workdir"],
    ),
    "batch": (
        ["data.batch_size=16"],
        ["config.data.batch_size is 16 here and 8 there", "undo the change"],
    ),
    "seed": (["seed=1"], ["config.seed is 1 here and 0 there", "undo the change"]),
    "optimizer": (
        ["optimizer.name=lion"],
        ["config.optimizer.name is 'lion' here and 'adamw' there"],
    ),
    "average": (["optimizer.ema_decay=0.9"], ["EMA is True here and False there"]),
}


@pytest.mark.parametrize("case", ANOTHER_RUN)
def test_a_checkpoint_of_another_architecture_or_run_is_refused(case, home, refused):
    overrides, says = ANOTHER_RUN[case]
    refused(train_argv(home, home / "run", *overrides), says=says, keeps=[home / "run"])


def test_a_checkpoint_of_another_tokenizer_is_refused(home, tmp_path, refused):
    other = [f"data.path={home / 'spm'}", "model.vocab_size=320"]
    says = ["another tokenizer", "sentencepiece", "bytes", "WORKDIR/tokenizer"]
    refused(train_argv(home, home / "run", *other), says=says, keeps=[home / "run", home / "spm"])
    for knob in ("restore", "init_from"):
        argv = train_argv(home, tmp_path / "new", *other, f"checkpoint.{knob}={home / 'run'}")
        refused(argv, says=says, keeps=[home / "run", home / "spm"])
        assert tree(tmp_path / "new") == {}


def test_other_data_of_the_same_tokenizer_does_not_continue_a_run(home, tmp_path, refused):
    (tmp_path / "more.txt").write_text("Another book.\n" * 400)
    assert main(prepare_argv(tmp_path / "more.txt", tmp_path / "data", "--documents", "line")) == 0
    argv = train_argv(home, home / "run", f"data.path={tmp_path / 'data'}")
    refused(argv, says=["other data", "init_from"], keeps=[home / "run", tmp_path / "data"])


def test_a_replaced_tokenizer_in_the_workdir_is_refused_by_load_and_sample(home, tmp_path, refused):
    run = copy(home / "run", tmp_path / "run")
    shutil.rmtree(run / "tokenizer")
    copy(home / "spm" / "tokenizer", run / "tokenizer")
    says = ["tokenizer", str(run), load_tokenizer(home / "data" / "tokenizer").fingerprint[:12]]
    refused(["sample", "--checkpoint", run, "--gen-length", "4"], says=says, keeps=[run])
    with pytest.raises(UserError, match="tokenizer"):
        llada_jax.load(run)


def test_a_replaced_tokenizer_in_the_workdir_stops_train(home, tmp_path, refused):
    run = copy(home / "run", tmp_path / "run")
    shutil.rmtree(run / "tokenizer")
    copy(home / "spm" / "tokenizer", run / "tokenizer")
    refused(
        train_argv(home, run, "num_steps=8"),
        says=[f"{run}/tokenizer", "not the tokenizer of the records"],
        keeps=[run],
    )


def test_evaluating_on_records_that_do_not_fit_is_refused(home, tmp_path, refused):
    cases = {
        str(home / "spm"): ["spm", "another tokenizer", "--tokenizer"],
        str(home / "absent"): ["holds no dataset.json", "prepare"],
    }
    for data, says in cases.items():
        argv = ["evaluate", "--checkpoint", home / "run", "--data", data]
        refused(argv, says=says, keeps=[home / "run", home / "spm"])
    argv = [
        "evaluate",
        "--checkpoint",
        home / "run",
        "--data",
        home / "data",
        "--split",
        "held-out",
    ]
    refused(argv, says=["'held-out'", "Did you mean 'heldout'?"])


def test_a_workdir_without_the_wanted_checkpoint_is_refused(home, tmp_path, refused):
    cases = {
        str(tmp_path / "absent"): ["absent", "holds no checkpoints", "llada-jax train"],
        str(home / "data"): ["data", "holds no checkpoints", "llada-jax train"],
        f"{home / 'run'}@3": ["no checkpoint of step 3", "it has 2, 4"],
        f"{home / 'run'}@last": ["must be a step number", "@1000"],
    }
    for checkpoint, says in cases.items():
        refused(
            ["sample", "--checkpoint", checkpoint, "--gen-length", "4"],
            says=says,
            keeps=[home / "run"],
        )
        argv = train_argv(home, tmp_path / "new", f"checkpoint.init_from={checkpoint}")
        refused(argv, says=says, keeps=[home / "run"])
        assert tree(tmp_path / "new") == {}


def deleted(path: Path):
    path.unlink()


def emptied(path: Path):
    path.write_bytes(b"")


# the kinds of file in a step, by pattern; {} is "params" or "train". The numbers themselves lie in
# ocdbt.process_0/d/*.
FILES = {
    "metadata": "_CHECKPOINT_METADATA",
    "tree": "{}/_METADATA",
    "manifest": "{}/manifest.ocdbt",
    "index": "{}/d/*",
    "numbers": "{}/ocdbt.process_0/d/*",
}
DAMAGES = {
    ("metadata", truncate),
    ("metadata", deleted),
    ("metadata", emptied),
    ("tree", truncate),
    ("tree", deleted),
    ("manifest", truncate),
    ("manifest", flip),
    ("manifest", deleted),
    ("index", flip),
    ("index", deleted),
    ("numbers", flip),
    ("numbers", truncate),
    ("numbers", deleted),
}


def damaged_step(run: Path, file: str, item: str, damage) -> None:
    (path,) = (run / "checkpoints" / "4").glob(FILES[file].format(item))
    damage(path)


@pytest.mark.parametrize(
    ("file", "damage"), sorted(DAMAGES, key=str), ids=lambda x: getattr(x, "__name__", x)
)
def test_a_damaged_checkpoint_is_refused_and_the_step_before_it_continues(
    file, damage, home, tmp_path, refused
):
    run = copy(home / "run", tmp_path / "run")
    damaged_step(run, file, "params", damage)
    says = [str(run / "checkpoints" / "4"), "move that folder away"]
    refused(train_argv(home, run), says=[*says, "step 2"], keeps=[run])
    refused(["sample", "--checkpoint", run, "--gen-length", "4"], says=says, keeps=[run])
    with pytest.raises(UserError, match="checkpoints/4"):
        llada_jax.load(run)


def test_the_remedy_for_a_damaged_checkpoint_gives_the_run_that_was_lost(home, tmp_path, capfd):
    run = copy(home / "run", tmp_path / "run")
    damaged_step(run, "numbers", "params", truncate)
    shutil.move(run / "checkpoints" / "4", tmp_path / "damaged")
    assert main(train_argv(home, run)) == 0
    assert f"start       step 2 of {run}" in capfd.readouterr().err
    again, before = llada_jax.load(run).params, llada_jax.load(home / "run").params
    jax.tree.map(np.testing.assert_array_equal, again, before)


@pytest.mark.parametrize("damage", [flip, truncate], ids=lambda damage: damage.__name__)
def test_damaged_optimizer_state_stops_training(damage, home, tmp_path, refused):
    run = copy(home / "run", tmp_path / "run")
    damaged_step(run, "numbers", "train", damage)
    says = [str(run / "checkpoints" / "4"), "move that folder away", "step 2"]
    refused(train_argv(home, run), says=says, keeps=[run])


def test_a_damaged_only_checkpoint_is_never_replaced_by_a_fresh_start(home, tmp_path, refused):
    run = copy(home / "run", tmp_path / "run")
    shutil.rmtree(run / "checkpoints" / "2")
    damaged_step(run, "manifest", "params", truncate)
    refused(
        train_argv(home, run),
        says=["checkpoints/4", "move that folder away to train again"],
        keeps=[run],
    )


def test_reading_a_workdir_leaves_the_save_of_a_running_train_alone(home, tmp_path, capfd):
    run = copy(home / "run", tmp_path / "run")
    half_written = run / "checkpoints" / "6.orbax-checkpoint-tmp"
    half_written.mkdir()
    (half_written / "params").write_text("on its way")
    before = tree(run)
    assert main(["sample", "--checkpoint", str(run), "--gen-length", "4"]) == 0
    assert main(train_argv(home, tmp_path / "new", f"checkpoint.init_from={run}")) == 0
    assert tree(run) == before


def test_a_half_written_step_is_never_read(home, tmp_path, capfd):
    run = copy(home / "run", tmp_path / "run")
    copy(run / "checkpoints" / "4", run / "checkpoints" / "6.orbax-checkpoint-tmp")
    shutil.rmtree(run / "checkpoints" / "4")
    assert llada_jax.load(run).step == 2
    assert main(train_argv(home, run)) == 0
    assert f"start       step 2 of {run}" in capfd.readouterr().err


def test_train_gives_back_the_mesh_of_its_caller(home, tmp_path):
    assert main(train_argv(home, home / "run")) == 0
    assert jax.sharding.get_abstract_mesh().empty
    assert llada_jax.load(home / "run").logits(np.zeros((1, 8), np.int32)).shape == (1, 8, 320)


def test_metrics_of_something_else_in_the_workdir_are_kept(home, tmp_path, refused):
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text("my own notes\n")
    refused(
        train_argv(home, run), says=["metrics.jsonl line 1", "move it away", "another --workdir"]
    )
    assert (run / "metrics.jsonl").read_text() == "my own notes\n"


# ---- the disk


def test_a_workdir_or_output_below_a_file_is_refused(home, tmp_path, refused):
    (tmp_path / "file").write_text("keep me")
    below = tmp_path / "file" / "run"
    says = [str(below), "cannot be written", "Not a directory", "another --workdir"]
    refused(train_argv(home, below), says=says, keeps=[tmp_path])
    says = ["cannot be written", "another --output"]
    refused(prepare_argv(home / "text.txt", below), says=says, keeps=[tmp_path])


def fill(disk: Path, *, leave: int) -> Path:
    """Fills a disk but for so many bytes; returns the file to delete for room."""
    filler = disk / "filler"
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_bsize
    filler.write_bytes(b"\0" * (free - leave))
    return filler


def test_a_read_only_workdir_or_output_is_refused_and_can_be_read(home, tmp_path, mount, refused):
    run = copy(home / "run", tmp_path / "run")
    read_only = mount("bind", run)
    subprocess.run(["mount", "-o", "remount,bind,ro", str(read_only)], check=True)
    says = [str(read_only), "cannot be written", "Read-only file system", "another --workdir"]
    refused(train_argv(home, read_only), says=says, keeps=[run])
    refused(train_argv(home, read_only / "new"), says=says[1:], keeps=[run])
    says = ["cannot be written", "Read-only file system", "another --output"]
    refused(prepare_argv(home / "text.txt", read_only / "data"), says=says, keeps=[run])
    assert llada_jax.load(read_only).step == 4


def test_a_full_disk_stops_prepare_and_the_same_command_finishes_with_room(
    home, tmp_path, mount, refused
):
    disk = mount("size=2m")
    filler = fill(disk, leave=24 * 1024)
    argv = prepare_argv(home / "text.txt", disk / "data", "--documents", "line", "--heldout", "0.1")
    sentence = refused(argv, says=["could not be written", "run prepare again"], is_late=True)
    assert "space" in sentence
    assert not (disk / "data" / "dataset.json").exists()
    filler.unlink()
    assert main(argv) == 0
    ours, straight = (
        {n: b for n, b in tree(d).items() if "receipts" not in n}
        for d in (disk / "data", home / "data")
    )
    assert ours == straight


def test_a_full_disk_stops_the_first_start_of_a_run(home, mount, refused):
    disk = mount("size=64k")
    fill(disk, leave=0)
    refused(
        train_argv(home, disk / "run"), says=["disk0/run", "No space left", "free"], is_late=True
    )


def test_a_full_disk_never_costs_the_run_its_tokenizer_or_record(home, mount, refused):
    disk = mount("size=2m")
    run = copy(home / "run", disk / "run")
    argv = train_argv(home, run, "num_steps=60", "checkpoint.every_steps=60", "log.every_steps=1")
    # Without any room the run cannot even begin again; with one page it can, and comes as far as
    # the metrics.
    cases = {
        0: ["No space left", "free"],
        4096: ["full while writing metrics", "free some space", "same command"],
    }
    for leave, says in cases.items():
        filler = fill(disk, leave=leave)
        refused(
            argv, says=["disk", *says], keeps=[run / "checkpoints", run / "tokenizer"], is_late=True
        )
        assert json.loads((run / "run.json").read_text())["tokenizer"]["kind"] == "bytes"
        filler.unlink()
    assert main(argv) == 0
    assert sorted({line["step"] for line in metric_lines(run)}) == [2, 4, *range(5, 61)]


def test_a_full_disk_stops_a_save_and_the_same_command_continues_with_room(
    home, tmp_path, mount, refused
):
    straight = tmp_path / "straight"
    assert main(train_argv(home, straight, "num_steps=8")) == 0
    disk = mount("size=2m")
    run = copy(home / "run", disk / "run")
    filler = fill(disk, leave=40 * 1024)
    argv = train_argv(home, run, "num_steps=8")
    says = ["Step 6 could not be saved", "last good step is 4", "free space", "same command again"]
    refused(
        argv, says=says, keeps=[run / "checkpoints" / "4", run / "checkpoints" / "2"], is_late=True
    )
    assert llada_jax.load(run).step == 4
    filler.unlink()
    assert main(argv) == 0
    jax.tree.map(
        np.testing.assert_array_equal, llada_jax.load(run).params, llada_jax.load(straight).params
    )


# ---- the numbers


def exploding(home: Path, tmp_path: Path, rate: str) -> list[str]:
    """A run whose learning rate jumps from 1e-3 after step 4; every step is saved."""
    stages = f"config.schedule.name = 'llada'; config.schedule.stages = ((512, 1e-3, 1e-3), (1e9, {rate}, {rate}))"
    write_config(home, stages, name="exploding.py")
    every = ["num_steps=12", "checkpoint.every_steps=1", "log.every_steps=3"]
    return train_argv(home, tmp_path / "run", *every, config="exploding.py")


@pytest.mark.slow
@pytest.mark.parametrize("rate", ["1e25", "1e39"])
def test_not_a_number_exits_3_with_the_interval_and_a_last_good_step_that_is_good(
    rate, home, tmp_path, refused
):
    argv = exploding(home, tmp_path, rate)
    says = ["lower config.schedule.learning_rate", "start the same command again"]
    sentence = refused(argv, status=3, says=says, is_late=True)
    first, last, good = map(
        int, re.search(r"steps (\d+) to (\d+);.* step (\d+)[: ]", sentence).groups()
    )
    assert first <= last
    assert (
        last == 5
    )  # the first with the wild rate: its own loss is finite, what its update leaves behind is not
    assert good == 4
    params = llada_jax.load(tmp_path / "run").params
    assert Checkpoints(tmp_path / "run").steps[-1] == good
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
    # the remedy works
    exploding(home, tmp_path, "1e-3")
    assert main(argv) == 0
    assert len(losses(tmp_path / "run")) == 4
    assert np.isfinite(losses(tmp_path / "run")).all()


def test_not_a_number_before_the_first_save_says_that_there_is_none(home, tmp_path, refused):
    argv = train_argv(
        home, tmp_path / "run", "schedule.learning_rate=1e25", "checkpoint.every_steps=4"
    )
    says = ["steps 1 to 2", "no checkpoint was saved yet", "config.schedule.learning_rate"]
    refused(argv, status=3, says=says, is_late=True)
    assert Checkpoints(tmp_path / "run").steps == []


def test_skipped_updates_are_counted_over_log_lines_that_have_nothing_to_say(
    home, tmp_path, refused
):
    argv = exploding(home, tmp_path, "1e16")  # after step 5 no gradient is finite any more
    argv += ["--config.log.every_steps=1", "--config.optimizer.max_skipped_updates=3"]
    says = ["4 updates in steps 6 to 9 were not finite", "allows 3", "llada-jax rollback"]
    refused(argv, status=3, says=says, is_late=True)
    lines = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [line["step"] for line in lines if "train" in line] == [1, 2, 3, 4, 5]


# ---- the signals


class Run:
    """`llada-jax train` in a process of its own, with the lines of its stderr as they come."""

    def __init__(self, argv: list[str]):
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "llada_jax", *argv],
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.lines = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self):
        for line in self.process.stderr:
            self.lines.append(line.rstrip("\n"))

    def wait_for(self, beginning: str) -> None:
        deadline = time.monotonic() + 120
        while not any(line.startswith(beginning) for line in list(self.lines)):
            assert time.monotonic() < deadline, self.lines
            assert self.process.poll() is None, self.lines
            time.sleep(0.01)

    def end(self) -> int:
        status = self.process.wait(120)
        self._reader.join()
        assert self.process.stdout.read() == ""
        self.process.stdout.close()
        self.process.stderr.close()
        assert "Traceback" not in "\n".join(self.lines), self.lines
        return status


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_the_step_and_the_same_command_continues_to_the_end(number, home, tmp_path):
    run = tmp_path / "run"
    argv = train_argv(
        home, run, "num_steps=500", "checkpoint.every_steps=100000", "log.every_steps=50"
    )
    stopped = Run(argv)
    stopped.wait_for("step 50/500")
    stopped.process.send_signal(number)
    assert stopped.end() == 42
    says = ["asked to stop", "of 500 is saved", "the same command continues"]
    check_sentence(stopped.lines[-1], says)
    step = int(re.search(r"step (\d+) of 500", stopped.lines[-1]).group(1))
    assert Checkpoints(run).steps == [step]
    assert 50 <= step < 500

    continued = Run(argv)
    assert continued.end() == 0
    assert continued.lines[0] == f"start       step {step} of {run}"
    assert Checkpoints(run).steps == [step, 500]
    assert [line["step"] for line in metric_lines(run, "train")] == list(range(50, 501, 50))


@pytest.mark.slow
def test_a_signal_before_the_first_step_asks_to_be_started_again(home, tmp_path):
    # Without a cache, so that there is time for a signal while the step is compiled.
    stopped = Run(train_argv(home, tmp_path / "run", "num_steps=500", "log.compilation_cache="))
    stopped.wait_for("start ")
    stopped.process.send_signal(signal.SIGTERM)
    assert stopped.end() == 42
    check_sentence(stopped.lines[-1], ["asked to stop", "the same command"])


@pytest.mark.slow
def test_a_second_interrupt_ends_at_once_and_the_last_saved_step_continues(home, tmp_path):
    run = copy(home / "run", tmp_path / "run")
    # The step is slow enough that two signals reach the same one.
    argv = train_argv(
        home, run, "num_steps=500", "checkpoint.every_steps=100000", "log.every_steps=1"
    )
    stopped = Run(argv)
    stopped.wait_for("step 5/500")
    stopped.process.send_signal(signal.SIGINT)
    stopped.process.send_signal(signal.SIGINT)
    status = stopped.end()
    assert status in (42, 130)  # 42 when the first was answered before the second came
    assert Checkpoints(run).steps[0] in (2, 4)
    assert main(train_argv(home, run, "num_steps=6")) == 0


@pytest.mark.slow
def test_a_refusal_in_a_process_of_its_own_is_one_line(home, tmp_path):
    run = copy(home / "run", tmp_path / "run")
    damaged_step(run, "numbers", "params", truncate)
    for argv in (["sample", "--checkpoint", str(run), "--gen-length", "4"], train_argv(home, run)):
        refused = Run(argv)
        assert refused.end() == 2
        assert len(refused.lines) == 1, refused.lines
        check_sentence(refused.lines[0], [str(run / "checkpoints" / "4"), "move that folder away"])

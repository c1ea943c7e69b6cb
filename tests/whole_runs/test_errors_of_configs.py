"""Knobs on the command line and config files that cannot be used: each is refused by a sentence."""

import pytest
from support.mishaps import train_argv, write_config

OVERRIDES = {
    "misspelt knob": (
        ["schedule.learning_rte=1"],
        ["schedule.learning_rte", "Did you mean 'schedule.learning_rate'?"],
    ),
    "misspelt group": (["optimzer.b2=0.9"], ["optimzer", "Did you mean 'optimizer'?"]),
    "a group as a knob": (["optimizer=adamw"], ["no knob 'optimizer'", "set one of optimizer."]),
    "no value": (["optimizer.b2"], ["optimizer.b2 has no value", "=VALUE"]),
    "text for an integer": (
        ["num_steps=many"],
        ["num_steps=many is not of type int", "default is 4"],
    ),
    "fraction for an integer": (["num_steps=1.5"], ["num_steps=1.5 is not of type int"]),
    "text for a number": (
        ["schedule.learning_rate=fast"],
        ["learning_rate=fast is not of type float"],
    ),
    "no boolean": (
        ["model.tie_embeddings=yes"],
        ["tie_embeddings=yes is not of type bool", "False"],
    ),
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
    "no prompts": (["samples.prompts=()"], ["samples.prompts=()", "one text or more"]),
    "prompts of numbers": (
        ["samples.prompts=(1, 2)"],
        ["samples.prompts=(1, 2)", "one text or more"],
    ),
    "a rule that is not a pair": (
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
    "huge seed": (["seed=4294967296"], ["seed=4294967296", "at most 4294967295"]),
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
    "mesh of two rests": (["mesh.data=-1"], ["data=-1", "fsdp=-1", "at most one of them is -1"]),
    "vocabulary": (["model.vocab_size=64"], ["vocab_size=64", "260", "set it to 0"]),
    "uncovered parameter": (
        ["optimizer.learning_rate_multipliers=(('embed', 2.0),)"],
        ["learning_rate_multipliers", "covers", "('.*', value)"],
    ),
}


@pytest.mark.slow
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

"""The command `llada-jax plan`: what it prints, and how it answers mistakes."""

import json
import re

import pytest
from support.paths import ROOT
from support.plans import GIB, LLADA_8B, compile_in_a_process, estimated

from llada_jax.__main__ import main
from llada_jax.verbs import plan


def test_json_is_one_object_and_the_text_says_the_same(capsys):
    words = ["plan", "--config", LLADA_8B, "--topology", "v5p-128", "--config.data.batch_size=256"]
    assert main([*words, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "8.02B parameters" in out
    assert (
        f"{report['memory']['state'] / GIB:.2f} GiB parameters and optimizer state (exact)" in out
    )
    assert (
        "256 rows * 4096 = 1,048,576 tokens in 1 microbatch: 4 rows, 16,384 tokens per device"
        in out
    )
    assert "compiled" not in out


def test_the_output_in_the_docs_is_the_one_of_the_command(capsys):
    page = (ROOT / "docs/plan.md").read_text()
    command, output = re.search(r"\n    llada-jax (plan .*)\n\n((?:    .*\n)+)", page).groups()
    choices = re.findall(r"\n    (choice .*)", page)
    assert len(choices) > 4
    words = [str(ROOT / word) if word.startswith("configs/") else word for word in command.split()]
    assert main([*words, "--search"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(re.sub("^    ", "", output, flags=re.MULTILINE))
    assert [line for line in choices if line not in printed.splitlines()] == []


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--topology", "v5p-127"], "There is no slice 'v5p-127': choose one of v5p-8, "),
        (
            ["--topology", "12xh100"],
            "12xh100 is not a whole number of hosts: each host has 8 h100; choose a multiple of 8.",
        ),
        (["--topology", "8xh1000"], "Unknown GPU 'h1000'. Did you mean 'h100'?"),
        (
            ["--topology", "v5p-128", "--slices", "0"],
            "--slices 0 must be at least 1.",
        ),
        (
            ["--topology", "v5p-128", "--slices", "2"],
            "config.mesh.data=1 is not a multiple of the 2 slices",
        ),
        (
            ["--topology", "v5p-128", "--config.model.vocab_size=0"],
            "and a plan reads no data; give --vocab-size.",
        ),
        (["--topology", "v5p-128", "--config.mesh.fsdp=63"], "needs 63 devices, and there are 64"),
        (["--topology", "v5p-128", "--config.data.batch_size=65"], "=65 cannot be split 64 ways"),
        (
            ["--topology", "v5p-128", "--flags", "v5"],
            "Unknown preset of compiler flags 'v5'. Did you mean 'v5p'?",
        ),
    ],
)
def test_mistakes_end_with_one_sentence(words, sentence, capsys):
    assert main(["plan", "--config", LLADA_8B, *words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert sentence in err
    assert len(err.splitlines()) == 1


def test_the_network_and_the_price_are_said(capsys):
    words = ["plan", "--config", LLADA_8B, "--topology", "64xh100", "--price", "2.5"]
    assert main([*words, "--network-gbps", "200"]) == 0
    out = capsys.readouterr().out
    assert "70% of the links and of 200 Gbit/s per GPU between hosts" in out
    assert main([*words, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    for case, hours in report["chip_hours"].items():
        assert report["cost"][case] == pytest.approx(2.5 * hours)
    assert "of the links" in "\n".join(plan.describe(estimated("8xh100")))
    assert "one axis of links" in "\n".join(plan.describe(estimated()))


def test_a_config_that_does_not_fit_is_answered_with_the_fastest_that_does(capsys):
    words = ["plan", "--config", LLADA_8B, "--topology", "v5p-128", "--config.model.remat=none"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "estimated not to fit" in out
    assert re.search(r"the fastest that fits: (--config\.\S+=\S+ ?)+\n", out)
    assert main([*words[:-1], "--config.data.batch_size=256"]) == 0
    assert "the fastest that fits" not in capsys.readouterr().out


TOO_LARGE = """
from llada_jax.config import default_config
def get_config():
    config = default_config()
    config.num_steps = 10
    config.data.batch_size, config.data.sequence_length = 8192, 256
    config.model.vocab_size, config.model.num_layers, config.model.d_model = 512, 2, 512
    config.model.num_heads = config.model.num_kv_heads = 4
    config.model.attention, config.model.remat = "xla", "none"
    config.model.head_dim, config.model.d_ff = 128, 2048
    return config
"""


@pytest.mark.slow
def test_a_program_that_does_not_fit_is_answered_with_the_compilers_number_and_remedies(
    tmp_path,
):
    (tmp_path / "large.py").write_text(TOO_LARGE)
    words = ("--config", str(tmp_path / "large.py"), "--topology", "v5e-4")
    done = compile_in_a_process(tmp_path, *words, level="UNKNOWN")
    assert done.returncode == 2, done.stderr
    assert json.loads(done.stdout)["compiled"]["fits"] is False
    sentence = done.stderr.splitlines()[-1]
    needed = re.search(
        r"The train step needs ([\d.]+) GiB and a v5e device has 15.8 GiB: try ", sentence
    )
    assert float(needed.group(1)) > 15.8
    assert (
        "--config.model.remat=full, then --config.optimizer.gradient_accumulation=2, then "
        in sentence
    )

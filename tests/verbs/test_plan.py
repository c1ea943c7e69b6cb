"""The command `llada-jax plan`: what it prints, and how it answers mistakes."""

import json
import re

import pytest
from support.paths import ROOT
from support.plans import GIB, LLADA_8B, compile_in_a_process, estimated

from llada_jax.__main__ import main
from llada_jax.verbs import plan

ODD_BLOCKS = [f"--config.samples.{n}={v}" for n, v in (("gen_length", 60), ("block_length", 48))]


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
            ["--topology", "64xh100", "--network-gbps", "0"],
            "--network-gbps 0.0 must be at least 0.001",
        ),
        (
            ["--topology", "v5p-128", "--network-gbps", "200"],
            "--network-gbps 200 changes nothing, because it is the rate of GPUs to other hosts, "
            "and v5p-128 has TPUs; leave out --network-gbps.",
        ),
        (
            ["--topology", "8xh100", "--network-gbps", "400"],
            "and 8xh100 is one host; leave out --network-gbps.",
        ),
        (
            ["--topology", "v5p-128", "--slices", "2"],
            "config.mesh.data=1 is not a multiple of the 2 slices",
        ),
        (
            ["--topology", "8xh100", "--slices", "2"],
            "--slices 2: 8xh100 comes in hosts, not in slices; leave it out and write 16xh100.",
        ),
        (
            ["--topology", "3xh100", "--slices", "3"],
            "3xh100 comes in hosts, not in slices; leave it out and write 24xh100.",
        ),
        (
            ["--topology", "8xh100", "--config.samples.every_steps=9", *ODD_BLOCKS],
            "block_length=48 must divide gen_length=60; nearest: 60.",
        ),
        (
            ["--topology", "v5p-128", "--config.model.vocab_size=0"],
            "and a plan reads no data; give --vocab-size.",
        ),
        (
            ["--topology", "v5p-128", "--vocab-size", "50000"],
            "--vocab-size 50000 changes nothing, because config.model.vocab_size is 126464; leave",
        ),
        (["--topology", "v5p-128", "--config.mesh.fsdp=63"], "needs 63 devices, and there are 64"),
        (["--topology", "v5p-128", "--config.data.batch_size=65"], "=65 cannot be split 64 ways"),
        # as train does
        (
            [
                "--topology=1xh200",
                "--config.objective.complementary=True",
                "--config.objective.weight=none",
                "--config.data.batch_size=7",
            ],
            "config.data.batch_size=7 must be a multiple of 2, because the objective asks for 2 ro",
        ),
        (
            ["--topology", "v5p-128", "--flags", "v5"],
            "Unknown preset of compiler flags 'v5'. Did you mean 'v5p'?",
        ),
        (["--topology", "v5p-128", "--flags", "v5p"], "changes nothing without --compile; add"),
        (
            ["--topology", "64xh100", "--flags", "v5p", "--compile"],
            "sets LIBTPU_INIT_ARGS, which the compiler for GPUs does not read; choose among gpu, h",
        ),
    ],
)
def test_mistakes_end_with_one_sentence(words, sentence, capsys):
    assert main(["plan", "--config", LLADA_8B, *words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert sentence in err
    assert len(err.splitlines()) == 1


def test_a_small_run_has_numbers_that_are_not_rounded_to_zero(capsys):
    words = [
        "plan",
        "--config",
        str(ROOT / "configs/debug.py"),
        "--vocab-size",
        "320",
        "--topology",
        "1xh100",
    ]
    assert main([*words, "--price", "2.5"]) == 0
    out = capsys.readouterr().out
    assert main([*words, "--price", "2.5", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    for pattern, unit, known in (
        (r"time +(\S+)ms to (\S+)ms per step", 1000, report["seconds_per_step"]),
        (r"tokens: (\S+) to (\S+) days", 1, report["days"]),
        (r"days, (\S+) to (\S+) chip-hours", 1, report["chip_hours"]),
        (r"cost +(\S+) to (\S+) at 2.5 per chip-hour", 1, report["cost"]),
    ):
        said = [float(number) for number in re.search(pattern, out).groups()]
        assert said == pytest.approx([unit * known["fast"], unit * known["slow"]], rel=0.06)


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


@pytest.mark.parametrize(
    ("words", "slices", "said"),
    [
        (["objective.name=autoregressive"], 1, "6 * 7.50B + 6 * 32 layers * 4096 * 4096 = 48.2B "),
        (
            ["objective.name=vrpo", "objective.num_times=4"],
            1,
            "5.33 passes * (6 * 7.50B + 12 * 32 layers * 4096 * 4096) = 274B per token",
        ),
        (["mesh.data=2"], 2, "2 x v5p-128: 128 chips, 32 hosts, 128 devices of 459 TFLOP/s"),
        # 1280 rows of 4096 tokens, on two slices and in two microbatches
        (
            ["mesh.data=2", "optimizer.gradient_accumulation=2"],
            2,
            "1,310,720 tokens per slice; computing hides the network between slices above 73,440",
        ),
        (["optimizer.gradient_accumulation=2"], 1, "tokens in 2 microbatches: 10 rows, "),
        (["objective.t_sampling=mirrored"], 1, "; logits of 51% of the positions"),
        # 7.98B frozen parameters in 4 bytes, on 64 devices
        (["lora.rank=16", "checkpoint.init_from=base"], 1, "(exact), 479 MiB of it frozen"),
    ],
)
def test_a_report_says_what_is_special_about_a_run(words, slices, said):
    assert said in "\n".join(plan.describe(estimated("v5p-128", *words, slices=slices)))


def test_collectives_are_summed_by_kind_and_axes_with_the_largest_first():
    def one(kind: str, axes: str, times: int, mebibytes: int, **more: bool) -> dict:
        flags = {"spans_slices": False, "is_overlapped": False, **more}
        return {
            "kind": kind,
            "axes": axes,
            "times": times,
            "total_bytes": mebibytes * 2**20,
            **flags,
        }

    lines = plan.describe_compiled(
        {
            "fits": True,
            "usable_bytes": 95 * GIB,
            "peak_bytes": 40 * GIB,
            "seconds": 90,
            "collectives": [
                one("all-reduce", "data", 2, 10, spans_slices=True),
                one("all-gather", "fsdp", 30, 600, is_overlapped=True),
                one("all-gather", "fsdp", 3, 60),
                one("all-gather", "tensor", 4, 900),
            ],
            "layout_copies": {"total_bytes": 5 * 2**20, "times": 6},
            "kernels": {"b": 2, "a": 1},
            "checks": [
                {"ok": True, "what": "memory", "words": "as planned"},
                {"ok": False, "what": "gathers", "words": "twice"},
            ],
        }
    )
    assert [re.sub(" +", " ", line) for line in lines] == [
        "compiled in 1m30s: 40.0 GiB of 95.0 GiB per device at the peak",
        " 900 MiB per step in 4 x all-gather over tensor, 0 of them around a product",
        " 660 MiB per step in 33 x all-gather over fsdp, 30 of them around a product",
        " 10.0 MiB per step in 2 x all-reduce between slices, 0 of them around a product",
        " 5.00 MiB per step in 6 x copy to another layout",
        " kernels: a x 1, b x 2",
        " ok memory: as planned",
        " LOOK gathers: twice",
    ]


def test_a_choice_is_one_line_with_what_the_compiler_has_found():
    choice = {
        "mesh": {"data": 1, "fsdp": 32, "tensor": 2},
        "remat": "full",
        "microbatches": 4,
        "peak": 10 * GIB,
        "seconds_per_step": {"fast": 10.0, "slow": 20.0},
    }
    words = "fsdp 32 x tensor 2, remat full, 4 microbatches: 10s to 20s per step, about 10.0 GiB"
    assert plan.describe_choice(choice) == f"{words} per device"
    for fits, found in ((True, "11.0 GiB"), (False, "does not fit")):
        compiled = {"fits": fits, "peak_bytes": 11 * GIB}
        assert plan.describe_choice({**choice, "compiled": compiled}) == (
            f"{words} per device (compiled: {found})"
        )


def test_a_config_that_does_not_fit_is_answered_with_the_fastest_that_does(capsys):
    words = ["plan", "--config", LLADA_8B, "--topology", "v5p-128", "--config.model.remat=none"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "estimated not to fit" in out
    assert re.search(r"the fastest that fits: (--config\.\S+=\S+ ?)+\n", out)
    assert main([*words[:-1], "--config.data.batch_size=256"]) == 0
    assert "the fastest that fits" not in capsys.readouterr().out
    assert main(["plan", "--config", LLADA_8B, "--topology", "v5e-4"]) == 0
    out = capsys.readouterr().out
    assert "no other mesh, remat policy or microbatches fit these machines\n" in out
    assert "the fastest that fits" not in out


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

"""What the documents say in more than one place, or in prose about the code, is one fact."""

import dataclasses
import re

from support.paths import ROOT

from llada_jax.masks import BIDIRECTIONAL
from llada_jax.models.attention import choose
from llada_jax.objectives.objective import Objective


def section(page: str, heading: str) -> str:
    """Returns the text below a heading of a page, up to the next heading."""
    text = (ROOT / page).read_text()
    return text.partition(f"{heading}\n")[2].partition("\n#")[0]


def test_the_pages_agree_on_the_largest_storm_of_kills():
    counts = {
        "README.md": r"([\d,]+) random kills",
        "docs/comparison.md": r"([\d,]+) random kills",
        "docs/operations.md": r"one storm sent ([\d,]+) kills",
    }
    said = [(page, re.findall(words, (ROOT / page).read_text())) for page, words in counts.items()]
    assert all(len(numbers) == 1 for _, numbers in said), said
    assert len({numbers[0] for _, numbers in said}) == 1, said


def test_the_table_of_the_objective_has_its_fields():
    rows = re.findall(r"^\| (`.+?`) \|", section("docs/extend.md", "## Objective"), re.MULTILINE)
    named = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    assert sorted(named) == sorted(field.name for field in dataclasses.fields(Objective))


def test_auto_takes_a_kernel_from_the_numbers_on_that_the_page_gives():
    page = section("docs/config.md", "### Which attention kernel auto chooses")
    (tpu_multiple,) = re.findall(r"`splash` if .+ is a multiple of (\d+)\.", page)
    gpu = re.findall(
        r"GPU kernel if .+ is a multiple of (\d+), .+ has (\d+) bits, .+ multiple of (\d+) and at "
        r"most (\d+),",
        page,
    )
    ((gpu_multiple, bits, head_multiple, widest),) = gpu
    (from_tokens,) = re.findall(r"at least (\d+) tokens of a row", page)

    def chosen(platform: str, length, *, head_dim=64, dtype=f"float{bits}", packed=False) -> str:
        request = {"head_dim": int(head_dim), "dtype": dtype, "packed": packed}
        return choose(
            "auto",
            platform=platform,
            mask=BIDIRECTIONAL,
            sequence_length=int(length),
            **request,
        )

    assert chosen("tpu", tpu_multiple) == "splash"
    assert chosen("tpu", int(tpu_multiple) // 2) == "xla"
    assert chosen("gpu", gpu_multiple) == "cudnn"
    assert chosen("gpu", gpu_multiple, packed=True) == "triton"
    assert chosen("gpu", int(gpu_multiple) // 2) == "xla"
    assert chosen("gpu", gpu_multiple, dtype="float32") == "xla"
    assert chosen("gpu", gpu_multiple, head_dim=widest) == "cudnn"
    assert chosen("gpu", gpu_multiple, head_dim=int(widest) + int(head_multiple)) == "xla"
    assert chosen("gpu", gpu_multiple, head_dim=head_multiple) == "cudnn"
    assert chosen("gpu", gpu_multiple, head_dim=int(head_multiple) // 2) == "xla"
    assert chosen("cpu", from_tokens) == "xla_by_head"
    assert chosen("cpu", int(from_tokens) - 1) == "xla"

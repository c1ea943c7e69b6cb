"""What hosts consume, in docs/benchmarks.md, follows from the estimate of `llada-jax plan`.

The rates of the loader were measured, and are those of the page's own tables.
"""

import re

import pytest
from support.paths import CONFIGS, ROOT

from llada_jax.cluster.hardware import machines_named
from llada_jax.config import load_config
from llada_jax.verbs.plan import Asked, estimate

SECTION = re.search(
    r"^## Records from a bucket.*?(?=^## )",
    (ROOT / "docs" / "benchmarks.md").read_text(),
    re.MULTILINE | re.DOTALL,
)[0]
CONFIG_OF = {"LLaDA-8B": "llada_8b", "`llada_1b`": "llada_1b"}


def seconds_and_rows(config_name: str, machine: str) -> tuple[float, float]:
    """Returns seconds per step, and the rows that one host reads in a second of it."""
    config = load_config(str(CONFIGS / f"{config_name}.py"), ["data.path=x"])
    machines = machines_named(machine)
    report = estimate(Asked(config, machines, 1, config.model.vocab_size))
    seconds = report["seconds_per_step"]["fast"]
    return seconds, config.data.batch_size / seconds / machines.num_tpu_vm_hosts


def rates() -> dict[tuple[str, int], float]:
    """Returns {(where the records are, threads): rows/s} as the first table gives them."""
    rows = re.findall(r"^\| (disk|bucket)\b[^|]*\| (\d+)[^|]*\| ([\d,]+) \|", SECTION, re.MULTILINE)
    return {(place, int(threads)): float(rate.replace(",", "")) for place, threads, rate in rows}


def shown(number: float) -> str:
    return f"{number:,.0f}" if number >= 10 else f"{number:.2g}"


ROW = re.compile(
    r"^\| (?P<run>\S+) on (?P<machine>[\w-]+) \("
    r"(?:(?P<hosts>\w+) hosts? of (?P<chips>\d+) chips, )?"
    r"(?P<seconds>\d+) s(?: per step of (?P<batch>\d+) rows)?\) \| (?P<numbers>.*) \|$",
    re.MULTILINE,
)
ROWS = {f"{row['run']} on {row['machine']}": row for row in ROW.finditer(SECTION)}


def test_the_table_is_found():
    assert len(ROWS) == 3
    assert set(rates()) == {(p, n) for p in ("disk", "bucket") for n in (1, 4, 16, 64)}


@pytest.mark.parametrize("name", ROWS)
def test_a_host_consumes_what_the_estimate_says_and_the_loader_is_so_many_times_ahead(name):
    row = ROWS[name]
    config_name, machines = CONFIG_OF[row["run"]], machines_named(row["machine"])
    seconds, consumed = seconds_and_rows(config_name, row["machine"])
    rate = rates()
    assert row["seconds"] == shown(seconds)
    times = {key: shown(rate[key] / consumed) for key in rate}
    assert row["numbers"].split(" | ") == [
        shown(consumed),
        f"{times['disk', 4]} and {times['disk', 1]}",
        f"{times['bucket', 4]} and {times['bucket', 16]}",
    ]
    if row["hosts"]:
        num_hosts = {"one": 1}.get(row["hosts"]) or int(row["hosts"])
        assert num_hosts == machines.num_tpu_vm_hosts
        assert int(row["chips"]) == machines.num_chips // num_hosts
    if row["batch"]:
        config = load_config(str(CONFIGS / f"{config_name}.py"), ["data.path=x"])
        assert int(row["batch"]) == config.data.batch_size


def test_the_slower_machine_is_so_many_times_ahead():
    (found,) = re.findall(
        r"read ([\d,]+) rows/s .* four threads and ([\d,]+) with one: (\d+) and (\d+) times what "
        r"`(\w+)` consumes on ([\w-]+)\.",
        SECTION,
    )
    *numbers, config_name, machine = found
    of_four, of_one, *times = (float(number.replace(",", "")) for number in numbers)
    _, consumed = seconds_and_rows(config_name, machine)
    assert times == [round(of_four / consumed), round(of_one / consumed)]

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
CONFIG_OF = {"LLaDA-8B": "llada_8b", "`llada_1b`": "llada_1b", "`llada_160m`": "llada_160m"}
# The tokenizer decides where a config leaves it open; this is that of its docstring.
VOCAB_SIZE_OF = {"llada_160m": 50_000}
HOSTS_OF_8_CHIPS = ("v5litepod-8", "v6e-8", "8xh100", "8xh200")


def seconds_and_rows(config_name: str, machine: str) -> tuple[float, float]:
    """Returns seconds per step, and the rows that one host reads in a second of it."""
    config = load_config(str(CONFIGS / f"{config_name}.py"), ["data.path=x"])
    machines = machines_named(machine)
    vocab_size = config.model.vocab_size or VOCAB_SIZE_OF[config_name]
    report = estimate(Asked(config, machines, 1, vocab_size))
    seconds = report["seconds_per_step"]["fast"]
    is_tpu = machines.accelerator.platform == "tpu"
    num_hosts = machines.num_tpu_vm_hosts if is_tpu else machines.num_hosts
    return seconds, config.data.batch_size / seconds / num_hosts


def rates() -> dict[tuple[str, int], float]:
    """Returns {(where the records are, threads): rows/s} as the first table gives them."""
    rows = re.findall(r"^\| (disk|bucket)\b[^|]*\| (\d+)[^|]*\| ([\d,]+) \|", SECTION, re.MULTILINE)
    return {(place, int(threads)): float(rate.replace(",", "")) for place, threads, rate in rows}


def shown(number: float) -> str:
    return f"{number:,.0f}" if number >= 10 else f"{number:.2g}"


ROW = re.compile(
    r"^\| (?P<run>\S+) on (?P<machine>[\w-]+) \("
    r"(?:(?P<hosts>\w+) hosts? of (?P<chips>\d+) chips, )?"
    r"(?P<seconds>[\d.]+) s(?: per step of (?P<batch>\d+) rows(?: of (?P<length>\d+) tokens)?)?\) "
    r"\| (?P<numbers>.*) \|$",
    re.MULTILINE,
)
ROWS = {f"{row['run']} on {row['machine']}": row for row in ROW.finditer(SECTION)}


def test_the_table_is_found():
    assert len(ROWS) == 4
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
        # where nothing is said, that of the rows which were measured
        assert int(row["length"] or 4096) == config.data.sequence_length


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


@pytest.mark.parametrize("machine", HOSTS_OF_8_CHIPS)
@pytest.mark.parametrize("config_name", ["llada_8b", "llada_1b"])
def test_the_loader_is_20_times_ahead_of_a_host_of_8_chips(config_name, machine):
    _, consumed = seconds_and_rows(config_name, machine)
    assert rates()["disk", 4] >= 20 * consumed


def test_a_bucket_is_ahead_of_the_8b_on_v5p_128():
    _, consumed = seconds_and_rows("llada_8b", "v5p-128")
    assert rates()["bucket", 4] > consumed


def test_the_page_says_where_the_loader_is_less_than_20_times_ahead():
    assert "LLaDA-8B and `llada_1b` consume.\nThat does not hold for smaller models" in SECTION
    _, of_b200 = seconds_and_rows("llada_1b", "8xb200")
    rate = rates()
    ((four, one),) = re.findall(
        r"eight B200 \((\d+) times with four threads, (\d+) with one\)", SECTION
    )
    assert (four, one) == (shown(rate["disk", 4] / of_b200), shown(rate["disk", 1] / of_b200))
    _, of_160m = seconds_and_rows("llada_160m", "v5litepod-8")
    (ahead,) = re.findall(r"and 64 are ([\d.]+) times ahead", SECTION)
    assert ahead == shown(rate["bucket", 64] / of_160m)
    assert rate["bucket", 4] < of_160m < rate["bucket", 16]

"""The numbers of docs/pod.md are those that `llada-jax plan` and the store of records compute."""

import re

import pytest
from support.paths import CONFIGS, ROOT

from llada_jax.cluster.hardware import machines_named
from llada_jax.config import load_config
from llada_jax.data.records import record_size
from llada_jax.data.shards import stored_size
from llada_jax.verbs.plan import Asked, estimate

PAGE = (ROOT / "docs" / "pod.md").read_text()
ROW = stored_size(record_size(sequence_length=4096, vocab_size=126_464))


def numbers_of(pattern: str) -> list[float]:
    (found,) = re.findall(pattern.replace("#", r"([\d,.]*\d)"), PAGE)
    return [float(number.replace(",", "")) for number in found]


def report_of(*changes: str) -> dict:
    config = load_config(str(CONFIGS / "llada_8b.py"), ["data.path=x", *changes])
    return estimate(Asked(config, machines_named("v5p-128"), 1, config.model.vocab_size))


def test_the_plan_is_what_plan_says():
    report = report_of()
    *found, num_chips = numbers_of(
        r"# to # s per step, # to # days and # to # chip-hours on # chips"
    )
    units = {"seconds_per_step": 1, "days": 1, "chip_hours": 1000}
    expected = [
        round(report[name][case] / unit) * unit
        for name, unit in units.items()
        for case in ("fast", "slow")
    ]
    assert found == expected
    assert num_chips == machines_named("v5p-128").num_chips
    days = report_of("num_tokens=1e11")["days"]
    assert numbers_of(r"`\) the same command prints # to # days") == [
        pytest.approx(days[case], abs=0.05) for case in ("fast", "slow")
    ]


def test_the_records_take_the_space_and_the_requests_that_the_page_says():
    assert numbers_of(r"A row of (4096) tokens takes # bytes") == [4096, ROW]
    table = re.findall(
        r"^\| ([\d.]+) (billion|trillion) \| ([\d.]+) million \| ([\d.]+) TB \|$",
        PAGE,
        re.MULTILINE,
    )
    assert table
    for tokens, unit, millions, terabytes in table:
        rows = float(tokens) * {"billion": 1e9, "trillion": 1e12}[unit] / 4096
        assert rows / 1e6 == pytest.approx(float(millions), rel=5e-3)
        assert rows * ROW / 1e12 == pytest.approx(float(terabytes), rel=1e-2)
    rows, megabytes, seconds, _, rate, hosts = numbers_of(
        r"needs # rows, # MB, .* every # s on # chips, so # rows per second on each of the # hosts"
    )
    assert rows == load_config(str(CONFIGS / "llada_8b.py"), ["data.path=x"]).data.batch_size
    assert rows * ROW / 1e6 == pytest.approx(megabytes, abs=0.5)
    assert seconds == round(report_of()["seconds_per_step"]["fast"])
    assert hosts == machines_named("v5p-128").num_hosts
    assert rows / seconds / hosts == pytest.approx(rate, abs=0.5)

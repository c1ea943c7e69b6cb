"""The descriptions of GPUs that XLA compiles for."""

import pytest

from llada_jax.cluster import hardware
from llada_jax.errors import UserError
from llada_jax.planning.gpu_targets import CARDS, target_config

# float32 without tensor cores, in TFLOP/s, as NVIDIA's data sheets print it
DATA_SHEETS = {"a100-80gb": 19.5, "h100": 67, "h100-pcie": 51, "h200": 67, "l40s": 91.6, "l4": 30.3}


@pytest.mark.parametrize(("name", "teraflops"), DATA_SHEETS.items())
def test_units_and_clock_multiply_to_the_rate_of_the_data_sheet(name, teraflops):
    card = CARDS[name]
    units = card.multiprocessors * card.capability.fp32_units
    # a multiplication and an addition in each cycle
    assert 2 * units * card.clock / 1000 == pytest.approx(teraflops, rel=0.02)


def test_every_gpu_of_the_table_is_described():
    gpus = [chip for chip in hardware.ACCELERATORS.values() if chip.platform == "gpu"]
    assert {chip.name for chip in gpus} == set(CARDS)
    for chip in gpus:
        text = target_config(chip)
        assert text.count("{") == text.count("}") == 4
        assert f'"{chip.device_kinds[0]}"' in text
        assert f"device_memory_size: {chip.hbm_bytes}" in text


def test_a_card_that_is_not_described_is_refused():
    with pytest.raises(
        UserError, match="--compile does not support v5p: choose one of a100-40gb, "
    ):
        target_config(hardware.ACCELERATORS["v5p"])

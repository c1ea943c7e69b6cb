"""Sampling speed: passes per token of known modes, and what is timed."""

import types

import numpy as np
import pytest
from support.datasets import write_dataset
from support.recital import BYTES, letters, recite

from llada_jax.data.records import read_dataset
from llada_jax.evaluation import speed
from llada_jax.masks import BIDIRECTIONAL

PROMPTS = [letters("it i").tolist(), letters("it i").tolist()]
MODES = {"schedule": {}, "threshold": {"commit": "threshold=0.9"}}


def speed_of(
    logits_fn, *, longest: int, modes=MODES, output_shift: bool = False
) -> dict[str, speed.Speed]:
    architecture = types.SimpleNamespace(output_shift=output_shift)
    model = types.SimpleNamespace(logits_fn=logits_fn, cached_fn=None, architecture=architecture)
    return speed.sampling_speed(
        model,
        letters("it is a truth"),
        PROMPTS,
        mask=BIDIRECTIONAL,
        ids=BYTES,
        longest=longest,
        modes=modes,
    )


@pytest.mark.parametrize(("longest", "num_tokens", "block_length"), [(500, 64, 32), (24, 20, 20)])
def test_a_sure_model_takes_one_pass_per_token_or_per_block(longest, num_tokens, block_length):
    found = speed_of(recite, longest=longest)
    assert found["schedule"].passes_per_token == 1
    assert found["threshold"].passes_per_token == 1 / block_length
    for one in found.values():
        assert one.num_tokens == 2 * num_tokens
        assert one.tokens_per_s == pytest.approx(one.num_tokens / one.seconds)
        assert one.seconds > 0


def test_a_network_with_a_shifted_output_has_no_mode_with_a_cache():
    found = speed_of(recite, longest=24, modes=speed.MODES, output_shift=True)
    assert set(found) == {"schedule", "threshold"}


def test_compilation_is_not_timed(monkeypatch):
    traced, read = [], []

    def traces(*arguments, **window):
        traced.append(1)
        return recite(*arguments, **window)

    def now() -> float:
        read.append(len(traced))
        return float(len(read))

    monkeypatch.setattr(speed, "time", types.SimpleNamespace(perf_counter=now))
    found = speed_of(traces, longest=24)
    (began, ended), (began_next, ended_next) = read[:2], read[2:]
    assert 0 < began == ended
    assert began_next == ended_next
    assert {one.seconds for one in found.values()} == {1.0}


def test_prompts_are_beginnings_of_rows_from_the_whole_split(tmp_path):
    tokens = (97 + (np.arange(40 * 64) // 64) % 26).astype(np.int32)
    write_dataset(tmp_path, {"train": tokens, "heldout": tokens})
    info = read_dataset(tmp_path)
    prompts = speed.first_tokens(info, split="heldout")
    assert len(prompts) == 16
    assert {len(prompt) for prompt in prompts} == {min(16, info.sequence_length // 2)}
    assert prompts[0][0] == 97 != prompts[-1][0]

"""The clock: every second under one activity, and the speed that follows."""

import numpy as np
import pytest

from llada_jax.run.clock import Clock, host_rss_bytes, speed_metrics


class FakeTime:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now

    def passes(self, seconds):
        self.now += seconds


def test_every_second_belongs_to_one_activity():
    passing = FakeTime()
    clock = Clock(now=passing)
    passing.passes(3)
    with clock.span("compile"):
        passing.passes(10)
    clock.start_training()
    passing.passes(20)
    with clock.span("evaluation"):
        passing.passes(4)
        with clock.span("data"):  # takes its second from evaluation
            passing.passes(1)
        passing.passes(2)
    passing.passes(60)
    assert clock.seconds() == {"init": 3, "compile": 10, "step": 80, "evaluation": 6, "data": 1}
    assert sum(clock.seconds().values()) == passing.now - 100


def test_a_span_that_fails_is_accounted_too():
    passing = FakeTime()
    clock = Clock(now=passing)

    @clock.span("checkpoint")
    def fail():
        passing.passes(5)
        raise KeyError

    with pytest.raises(KeyError):
        fail()
    passing.passes(1)
    assert clock.seconds() == {"init": 1, "checkpoint": 5}


def test_speed_is_over_the_interval_and_leaves_out_what_is_no_training():
    passing = FakeTime()
    clock = Clock(now=passing)
    passing.passes(1000)
    clock.start_training()
    clock.interval()
    for _ in range(2):  # two intervals of the same length report the same numbers
        with clock.span("data"):
            passing.passes(1)
        passing.passes(9)
        with clock.span("checkpoint"):
            passing.passes(50)
        speed = speed_metrics(
            clock,
            num_steps=20,
            tokens_per_step=512,
            flops_per_token=1e9,
            num_devices=4,
            peak_flops=1e12,
        )
        assert speed["tokens_per_s"] == pytest.approx(1024)
        assert speed["step_s"] == pytest.approx(0.5)
        assert speed["data_wait_share"] == pytest.approx(0.1)
        assert speed["tflops_per_device"] == pytest.approx(0.256)
        assert speed["mfu"] == pytest.approx(0.256)
        assert speed["rss_gib"] > 0.01


def test_no_utilisation_is_reported_for_unknown_hardware():
    clock = Clock()
    clock.start_training()
    speed = speed_metrics(
        clock, num_steps=1, tokens_per_step=1, flops_per_token=1.0, num_devices=1, peak_flops=None
    )
    assert "mfu" not in speed
    assert None not in speed.values()


def test_memory_of_the_process_grows_by_what_is_allocated():
    before = host_rss_bytes()
    block = np.ones(64 * 2**20, np.uint8)
    grown = host_rss_bytes() - before
    assert block.nbytes * 0.8 < grown < block.nbytes * 2

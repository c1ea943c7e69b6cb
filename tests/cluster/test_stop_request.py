"""Signals that ask a run to stop."""

import signal

import pytest

from llada_jax.cluster import stop_request
from llada_jax.cluster.stop_request import StopRequest


@pytest.fixture(autouse=True)
def default_handlers():
    """As in a terminal: the tests may run under nohup themselves."""
    numbers = (signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, signal.SIG_DFL) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_is_a_request_to_stop(number):
    with StopRequest() as stop:
        assert not stop.reached(1)
        signal.raise_signal(number)
        assert stop.reached(2)
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL


def test_a_closed_terminal_of_one_of_several_processes_is_told_to_all_as_sigterm(monkeypatch):
    monkeypatch.setattr(stop_request.jax, "process_count", lambda: 2)
    came = []
    # stands in for JAX's preemption service, which catches SIGTERM there
    signal.signal(signal.SIGTERM, lambda number, frame: came.append(number))
    with StopRequest():
        signal.raise_signal(signal.SIGHUP)
    assert came == [signal.SIGTERM]


def test_a_run_under_nohup_outlives_its_terminal():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGHUP)
        assert not stop.reached(1)

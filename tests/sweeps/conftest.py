"""The fixtures of the tests of sweeps."""

from support.sweeps import call_sweep, fake_train, start_sweep, write_config

__all__ = ["call_sweep", "fake_train", "start_sweep", "write_config"]

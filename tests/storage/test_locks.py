"""Who may hold a directory at the same time."""

import errno
import fcntl

import pytest

from llada_jax.errors import UserError
from llada_jax.storage.locks import only_run_in, only_sweep_in


def test_a_workdir_has_one_train_at_a_time(tmp_path):
    workdir = str(tmp_path)
    for _ in range(2):
        with (
            only_run_in(workdir),
            pytest.raises(UserError, match="Another train is writing"),
            only_run_in(workdir),
        ):
            pass


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("second", [True, False])
def test_tasks_of_an_array_share_a_directory_and_a_whole_sweep_does_not(tmp_path, first, second):
    with only_sweep_in(str(tmp_path), shared=first):
        if first and second:
            with only_sweep_in(str(tmp_path), shared=second) as held:
                assert len(held) == 1
            return
        with (
            pytest.raises(UserError, match="Another sweep"),
            only_sweep_in(str(tmp_path), shared=second),
        ):
            pass


def test_a_file_system_without_locks_is_used_without_them(tmp_path, monkeypatch):
    def flock(file, how):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", flock)
    with only_run_in(str(tmp_path)), only_run_in(str(tmp_path)):
        pass

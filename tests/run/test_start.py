"""How a run begins, and what a start that is refused leaves."""

import pytest

from llada_jax.errors import UserError
from llada_jax.run.start import missing_folders, removed_if_refused


def test_a_refused_start_removes_what_any_process_created_and_nothing_else(tmp_path):
    workdir = tmp_path / "new" / "run"
    folders = missing_folders(str(workdir))
    # the second process comes first
    workdir.mkdir(parents=True)
    with pytest.raises(UserError), removed_if_refused(folders):
        raise UserError("refused.")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError), removed_if_refused(missing_folders(str(tmp_path))):
        raise UserError("refused.")
    assert tmp_path.exists()
    assert missing_folders("gs://bucket/run") == []

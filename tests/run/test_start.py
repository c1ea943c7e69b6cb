"""How a run begins, and what a start that is refused leaves."""

import pytest

from llada_jax.checkpoints.record import read_run
from llada_jax.errors import UserError
from llada_jax.run import start
from llada_jax.run.start import missing_folders, removed_if_refused, run_id_of
from llada_jax.storage.locks import only_run_in
from llada_jax.verbs.train import recorded_remat


def test_a_refused_start_removes_what_any_process_created_and_nothing_else(tmp_path):
    workdir = tmp_path / "new" / "run"
    folders = missing_folders(str(workdir))
    # the second process comes first
    workdir.mkdir(parents=True)
    with pytest.raises(UserError), removed_if_refused(folders):
        raise UserError("refused.")
    assert list(tmp_path.iterdir()) == []
    # another run is in it, which has started together with this one
    folders = missing_folders(str(workdir))
    workdir.mkdir(parents=True)
    (workdir / "run.json").write_text("{}")
    with (
        only_run_in(str(workdir)),
        pytest.raises(UserError, match="Another train"),
        removed_if_refused(folders),
        only_run_in(str(workdir)),
    ):
        pass
    assert (workdir / "run.json").exists()
    with pytest.raises(UserError), removed_if_refused(missing_folders(str(tmp_path))):
        raise UserError("refused.")
    assert tmp_path.exists()
    assert missing_folders("gs://bucket/run") == []


def test_a_workdir_in_which_files_cannot_be_removed_is_refused(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    with start.made_workdir(str(tmp_path)) as mark:
        assert mark.exists()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match="Permission denied"), start.made_workdir(str(tmp_path)):
        monkeypatch.setattr(type(mark), "unlink", refuse)
    # what ends the block comes first
    with pytest.raises(UserError, match="in use"), start.made_workdir(str(tmp_path)):
        raise UserError("in use.")


def test_the_mark_of_a_workdir_is_there_before_any_process_looks_for_it(tmp_path, monkeypatch):
    """NFS goes on to say for half a minute that a file is absent."""
    there = []
    monkeypatch.setattr(
        start, "check_same_everywhere", lambda facts: there.append(list(tmp_path.iterdir()))
    )
    with start.made_workdir(str(tmp_path)) as mark:
        assert there == [[tmp_path / mark.name]]
        assert start.seen(mark) == "one folder"
    monkeypatch.setattr(start, "VISIBLE_S", 0.0)
    assert start.seen(mark) == "another"


@pytest.mark.parametrize("content", ["", '{"a', "[]", "{}", b"\xff"])
def test_the_remedy_for_a_damaged_run_json_is_one_that_train_obeys(tmp_path, content):
    file = tmp_path / "run.json"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    for reader in (read_run, recorded_remat, run_id_of):
        with pytest.raises(UserError, match="remove it and start the run again, which goes on"):
            reader(tmp_path)
    file.unlink()
    assert recorded_remat(tmp_path) == "auto"
    assert run_id_of(tmp_path) > 0

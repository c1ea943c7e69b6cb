"""What a path means that a user writes."""

import os

import pytest
from etils import epath
from support.errors import error_of

from llada_jax.checkpoints.workdir import Checkpoints
from llada_jax.paths import check_savable, split_step, user_path


def test_only_a_tilde_at_the_beginning_is_a_home_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_path("~/run") == f"{tmp_path}/run"
    assert user_path("~") == str(tmp_path)
    for path in ("run", "", "a/~/b", "gs://bucket/~x", "./run", "-"):
        assert user_path(path) == path
    assert "does not know" in error_of(user_path, "~nobody-of-that-name/run")


@pytest.mark.parametrize("path", ["a" * 300, "runs/" + "é" * 300, "~/" + "a" * 300, "ab/" * 2000])
def test_a_path_that_the_system_takes_for_too_long_is_refused(path):
    assert "write a shorter one" in error_of(user_path, path)
    assert "write a shorter one" in error_of(split_step, f"{path}@3")
    assert user_path(f"gs://bucket/{path}") == f"gs://bucket/{path}"


def test_a_directory_that_is_called_a_tilde_is_in_no_home_directory(monkeypatch, tmp_path):
    """pathlib takes the ./ away that keeps them apart, and Orbax is handed such a path."""
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    for path in ("./~/run", "./~", ".//~/run", "a/../~/run"):
        meant = user_path(path)
        assert os.path.expanduser(str(epath.Path(meant))) == os.path.normpath(here / path)
    saved = Checkpoints(user_path("./~/run"))
    saved.close()
    assert (here / "~" / "run").exists()
    assert list(home.iterdir()) == []


@pytest.mark.parametrize(
    ("checkpoint", "parts"),
    [
        ("run", ("run", None)),
        ("run@12", ("run", 12)),
        ("me@home/run", ("me@home/run", None)),
        ("me@home/run@7", ("me@home/run", 7)),
        ("s3://key@bucket/run", ("s3://key@bucket/run", None)),
    ],
)
def test_an_at_sign_within_the_path_belongs_to_the_path(checkpoint, parts):
    assert split_step(checkpoint) == parts


def test_an_existing_directory_may_end_in_an_at_sign_and_words(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("run@best", "run@5"):
        (tmp_path / name).mkdir()
        for text in (f"{tmp_path}/{name}", f"~/{name}"):
            assert split_step(text) == (f"{tmp_path}/{name}", None)
    # where both exist, it is a step
    (tmp_path / "run").mkdir()
    assert split_step("~/run@5") == (f"{tmp_path}/run", 5)
    for wrong in ("run@best", "run@", "run@-1", "run@١"):
        assert "must be a step number" in error_of(split_step, wrong)


@pytest.mark.parametrize("name", ["lr[1e-3]", "a*b", "what?", "a\\b", os.fsdecode(b"a\xe9b")])
def test_a_name_that_checkpoints_cannot_be_read_from_is_refused_before_training(name, tmp_path):
    says = error_of(check_savable, str(tmp_path / name / "run"))
    assert name.encode(errors="backslashreplace").decode() in says
    assert "choose a" in says
    check_savable("gs://bucket/" + name)
    check_savable(str(tmp_path / "lr=1e-3,me@home (2)"))


def test_the_current_directory_counts_too(tmp_path, monkeypatch):
    (tmp_path / "a[b]").mkdir()
    monkeypatch.chdir(tmp_path / "a[b]")
    assert os.getcwd() in error_of(check_savable, "run")

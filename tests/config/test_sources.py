"""Data sets and mixtures in config.data.path."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llada_jax.config import (
    parse_sources,
)
from llada_jax.errors import UserError

# "/" after "=" makes the sign a part of the path, and a ~ in front names a home directory
DIRECTORIES = st.text(
    st.characters(blacklist_characters=",=~", blacklist_categories=("Cs", "Z", "Cc")), min_size=1
)
WEIGHTS = st.floats(min_value=1e-6, max_value=1e6)


@given(st.lists(st.tuples(DIRECTORIES, WEIGHTS), min_size=1))
def test_a_mixture_reads_back_as_written(sources):
    path = ",".join(f"{directory}={weight!r}" for directory, weight in sources)
    assert parse_sources(path) == tuple(sources)


@given(DIRECTORIES)
def test_one_directory_needs_no_weight(directory):
    assert parse_sources(directory) == ((directory, 1.0),)


@pytest.mark.parametrize(
    ("path", "sources"),
    [
        ("a, b", (("a", 1.0), ("b", 1.0))),
        ("runs/x=1/data=0.5", (("runs/x=1/data", 0.5),)),
        ("lr=0.1/data", (("lr=0.1/data", 1.0),)),
        ("lr=0.1/data=2", (("lr=0.1/data", 2.0),)),
        ("a=2,b", (("a", 2.0), ("b", 1.0))),
        ("a=.5,b=1e-1", (("a", 0.5), ("b", 0.1))),
    ],
)
def test_sources_as_people_write_them(path, sources):
    assert parse_sources(path) == sources


@pytest.mark.parametrize("path", ["", "a=", "a=half", "a=1,", ",", "=0.5", "a,,b", " "])
def test_a_mixture_with_a_hole_is_refused(path):
    with pytest.raises(UserError, match="config.data.path"):
        parse_sources(path)


def test_a_tilde_names_the_home_directory_in_every_source(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    sources = parse_sources("~/a=2,~/b")
    assert sources == ((f"{tmp_path}/a", 2.0), (f"{tmp_path}/b", 1.0))

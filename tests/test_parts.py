"""Parts that a config names as module:attribute: how they are found, called and blamed."""

import hashlib
import sys

import pytest

from llada_jax.errors import UserError
from llada_jax.parts import add_to_path, call_part, is_own, load_part, provenance

OURS = {"fast": lambda: 1, "slow": lambda: 2}


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a module and returns nothing; the module is forgotten after the test."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)
    names = []

    def write(name: str, code: str) -> None:
        (tmp_path / f"{name}.py").write_text(code)
        names.append(name)

    yield write
    for name in names:
        sys.modules.pop(name, None)


def test_a_word_names_a_part_of_ours_and_a_typo_names_the_one_that_was_meant():
    assert load_part("fast", "gear", OURS) is OURS["fast"]
    with pytest.raises(UserError, match="Unknown gear 'fats'. Did you mean 'fast'"):
        load_part("fats", "gear", OURS)


def test_module_and_attribute_name_a_part_in_the_current_directory(module):
    module("gears_here", "class Box:\n    def reverse(): return -1\n")
    assert is_own("gears_here:Box.reverse")
    assert load_part("gears_here:Box.reverse", "gear", OURS)() == -1


def test_a_directory_is_searched_after_everything_else(module, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "json.py").write_text("def loads(): return 'not the standard library'\n")
    (elsewhere / "gears_elsewhere.py").write_text("def first(): return 1\n")
    add_to_path(elsewhere)
    assert load_part("gears_elsewhere:first", "gear", OURS)() == 1
    assert load_part("json:loads", "gear", OURS)("[1]") == [1]
    sys.modules.pop("gears_elsewhere")


@pytest.mark.parametrize(
    ("code", "attribute", "said"),
    [
        ("", "firts", "has no 'firts'"),
        ("first = 1", "firts", "Did you mean 'first'"),
        ("first = 1", "first", "has the type int; name a function"),
        ("import no_such_library", "first", "line 1 (ModuleNotFoundError"),
        ("x = 1\nx / 0", "first", "line 2 (ZeroDivisionError"),
        ("def first(:", "first", "SyntaxError"),
    ],
)
def test_a_part_that_cannot_be_loaded_is_the_users_mistake(module, code, attribute, said):
    module("gears_broken", code)
    with pytest.raises(UserError) as caught:
        load_part(f"gears_broken:{attribute}", "gear", OURS)
    assert f"The gear 'gears_broken:{attribute}'" in str(caught.value)
    assert said in str(caught.value)


def test_a_module_that_is_not_there_says_where_it_was_looked_for():
    with pytest.raises(UserError, match="no module 'no_gears' in the current directory"):
        load_part("no_gears:first", "gear", OURS)


def test_a_signature_is_compared_with_what_a_part_is_given():
    assert call_part(lambda a, *, b=1: a + b, "m:f", "gear", 1, b=2) == 3
    with pytest.raises(UserError, match=r"called with \(speed=\).* signature \(\) does not take"):
        call_part(lambda: 1, "m:f", "gear", speed=1)
    with pytest.raises(UserError, match="missing a required argument: 'a'"):
        call_part(lambda a: 1, "m:f", "gear")


def test_an_error_within_a_part_names_its_line():
    def stalls():
        raise ValueError("stalled\nwith a second line")

    with pytest.raises(UserError, match=r"test_parts.py, line \d+ \(ValueError: stalled\)"):
        call_part(stalls, "m:f", "gear")


def test_provenance_has_the_file_of_an_own_part_and_its_hash(module, tmp_path):
    code = "def first(): return 1\n"
    module("gears_kept", code)
    load_part("gears_kept:first", "gear", OURS)
    assert provenance({"gear.name": "gears_kept:first", "other.name": "fast"}) == {
        "gear.name": {
            "name": "gears_kept:first",
            "file": str(tmp_path / "gears_kept.py"),
            "sha256": hashlib.sha256(code.encode()).hexdigest(),
        }
    }

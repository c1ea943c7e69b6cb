"""The Python interface: explicit typed signatures, and mistakes that are named as the caller wrote
them.
"""

import inspect
import typing
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
import pytest
from support.exports import LLADA, write_checkpoint
from support.hf_directories import random_params

import llada_jax
from llada_jax import pretrained
from llada_jax.arguments import checked
from llada_jax.errors import UserError
from llada_jax.evaluation import harness
from llada_jax.loaded_model import Pretrained
from llada_jax.verbs import evaluate, train


def public_members(owner) -> dict:
    found = inspect.getmembers(owner, inspect.isfunction)
    return {name: member for name, member in found if not name.startswith("_")}


PUBLIC = {
    **{f"llada_jax.{name}": function for name, function in public_members(llada_jax).items()},
    **{f"Pretrained.{name}": method for name, method in public_members(Pretrained).items()},
    "HarnessModel": harness.HarnessModel.__init__,
    "harness.run": harness.run,
}


def test_the_interface_is_what_the_documents_say():
    documented = {"load", "train", "evaluate", "evaluate_tasks"}
    assert set(public_members(llada_jax)) == documented
    methods = "logits generate complete best_of infill generate_tokens score score_text"
    assert set(public_members(Pretrained)) == set(methods.split())


@pytest.mark.parametrize("name", PUBLIC)
def test_every_parameter_has_a_name_and_a_type(name):
    function = PUBLIC[name]
    signature = inspect.signature(function)
    for parameter in signature.parameters.values():
        if parameter.name == "self":
            continue
        assert parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL), parameter
        assert parameter.annotation is not parameter.empty, parameter
    if name != "HarnessModel":
        assert signature.return_annotation is not signature.empty
        assert inspect.getdoc(function)


@pytest.mark.parametrize(
    ("face", "behind"),
    [
        (llada_jax.load, pretrained.load),
        (llada_jax.train, train.train),
        (llada_jax.evaluate, evaluate.evaluate),
        (llada_jax.evaluate_tasks, evaluate.evaluate_tasks),
        (Pretrained.generate, Pretrained.complete),
    ],
    ids=lambda function: function.__name__,
)
def test_a_function_has_the_parameters_of_the_one_that_it_calls(face, behind):
    theirs = inspect.signature(behind).parameters
    ours = inspect.signature(face).parameters
    # whether text is needed is for verbs to say
    assert set(theirs) - set(ours) <= {"needs_text"}
    for name, parameter in ours.items():
        assert parameter.default == theirs[name].default, name
        assert parameter.kind == theirs[name].kind, name


# ---- mistakes


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Pretrained:
    run = tmp_path_factory.mktemp("interface") / "run"
    return llada_jax.load(write_checkpoint(run, LLADA, random_params(LLADA)))


MISTAKES = {
    "gen_length='8' is a str; give a whole number": lambda m: m.generate(["a"], gen_length="8"),
    "gen_length=8.0 is a float; give a whole number": lambda m: m.complete(["a"], gen_length=8.0),
    "steps=True is a bool; give a whole number or None": lambda m: m.infill(["[MASK]"], steps=True),
    "temperature='hot' is a str; give a number": lambda m: m.generate(["a"], temperature="hot"),
    "stop_at_eos=1 is a int; give True or False": lambda m: m.generate(["a"], stop_at_eos=1),
    "remasking=None is a NoneType; give a text": lambda m: m.generate(["a"], remasking=None),
    "top_k=-1 must not be negative": lambda m: m.generate(["a"], top_k=-1),
    "suppress=5 is a int; give a list of whole": lambda m: m.generate(["a"], suppress=5),
    r"suppress=\{5\} is a set; give": lambda m: m.generate_tokens([[1]], suppress={5}),
    "suppress='5' is a str; give a list": lambda m: m.infill(["[MASK]"], suppress="5"),
    "suppress=None is a NoneType; give": lambda m: m.complete(["a"], suppress=None),
    r"suppress=array\(5\) is a ndarray": lambda m: m.generate(["a"], suppress=np.array(5)),
    "eos_id='5' is a str; give a whole number or a list of whole numbers or None": (
        lambda m: m.generate_tokens([[1]], eos_id="5")
    ),
    "mc_samples=0 must be at least 1": lambda m: m.score([("a", "b")], mc_samples=0),
    "mc_samples=-2 must be at least 1": lambda m: m.score_text(["a"], mc_samples=-2),
    "seed=-1 must lie between": lambda m: m.generate_tokens([[1]], seed=-1),
    "batch_size=0 must be at least 1": lambda m: m.infill(["[MASK]"], batch_size=0),
    "num=2 must .* divide the number of completions, 1": lambda m: m.best_of([None], 2),
    "texts='a' is one text; pass a list, as in score_text": lambda m: m.score_text("a"),
    "prompts=None is not a list; pass one, as in generate": lambda m: m.generate(None),
    r"texts\[1\] is a int; give a text": lambda m: m.infill(["[MASK]", 3]),
    r"'a\\ud800' holds half of a surrogate pair at character 1": lambda m: m.generate(["a\ud800"]),
    r"'\\udc80' holds half of a surrogate": lambda m: m.infill(["\udc80[MASK]"]),
    r"'\\udc80' holds half of": lambda m: m.score_text(["\udc80"]),
    r"'\\udc80b' holds half of": lambda m: m.score([("\udc80", "b")]),
    r"\('a', None\) is not a pair": lambda m: m.score([("a", None)]),
    "3 is not a pair; pass a list of": lambda m: m.score([3]),
    "dtype='float16' is unknown": lambda m: llada_jax.load("runs/absent", dtype="float16"),
    "ema='yes' is a str; give True or False or None": lambda m: llada_jax.load("x", ema="yes"),
    "mc_samples=0 must be": lambda m: llada_jax.evaluate("x", "y", mc_samples=0),
    "batch_size='a' is a str": lambda m: llada_jax.evaluate("x", "y", batch_size="a"),
    "No direction of a question|direction of a question": lambda m: llada_jax.evaluate_tasks(
        "x", "y.jsonl", ask=["sideways"]
    ),
}


@pytest.mark.parametrize("says", MISTAKES)
def test_a_wrong_argument_is_named_as_it_was_written(says, model):
    with pytest.raises(UserError, match=says):
        MISTAKES[says](model)


def test_an_argument_that_does_not_exist_is_named(model):
    with pytest.raises(TypeError, match="temprature"):
        model.generate(["a"], temprature=1.0)
    with pytest.raises(TypeError, match="remask"):
        model.infill(["[MASK]"], remask="random")


# ---- the check of types


@checked
def example(count: int, share: float = 0.5, name: str | None = None, other: object = None) -> str:
    """Returns what it was given."""
    return f"{count} {share} {name} {other}"


def test_numbers_of_numpy_and_values_of_other_annotations_are_accepted():
    assert example(np.int32(3), share=np.float32(0.5)) == "3 0.5 None None"
    assert example(3, share=1, name="a", other=[1]) == "3 1 a [1]"
    assert example.__doc__ == "Returns what it was given."
    assert typing.get_type_hints(example)["name"] == str | None


@checked
def row_example(ids: Sequence[int] = ()) -> list[int]:
    """Returns what it was given."""
    return list(ids)


@pytest.mark.parametrize("ids", [[5, 6], (5, 6), range(5, 7), np.array([5, 6]), jnp.array([5, 6])])
def test_rows_of_any_kind_are_accepted(ids):
    assert row_example(ids) == [5, 6]


@pytest.mark.parametrize("value", ["3", 3.0, True, None])
def test_what_is_not_a_whole_number_is_refused(value):
    with pytest.raises(UserError, match=r"^count=.* give a whole number\.$"):
        example(value)


# ---- what a notebook shows


def test_a_model_is_shown_in_a_line_without_its_parameters(model):
    assert repr(model) == (
        f"Pretrained(tokenizer={model.tokenizer!r}, step={model.step}, mesh={model.mesh!r})"
    )

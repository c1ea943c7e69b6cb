"""The face of `llada-jax`: the table of verbs, help that fits a screen, flags that scripts rely on,
and mistakes that are answered in one line.
"""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.paths import ROOT

import llada_jax
from llada_jax import errors
from llada_jax.__main__ import VERBS, main
from llada_jax.errors import UserError
from llada_jax.verbs.command_line import Parser, json_text, take_overrides

LINES, COLUMNS = 24, 100

# What scripts and documents say. A flag may be added here; taking one away, or renaming it, breaks
# the scripts of users.
FLAGS = {
    "prepare": """--input --output --sequence-length --tokenizer --text-field --documents
        --document-start --heldout --workers --add-mask-token --json --format --chat
        --drop-duplicates --part --join""",
    "train": "--config --workdir --config.KEY",
    "rollback": "--workdir --to --skip",
    "sample": """--checkpoint --prompt --prompt-file --gen-length --block-length --steps
        --temperature --seed --ema --show --json --infill --append --num-samples --best-of
        --batch-size --remasking --commit --cfg-scale --top-k --top-p --eos --ignore-eos --suppress
        --cache --refresh --revise --lookahead --mesh --dtype --tokenizer --html""",
    "chat": """--checkpoint --system --gen-length --block-length --steps --temperature --seed --ema
        --append --remasking --commit --cfg-scale --top-k --top-p --eos --suppress --cache --refresh
        --revise --lookahead --mesh --dtype --tokenizer""",
    "evaluate": """--checkpoint --data --split --mc-samples --batch-size --seed --baselines --ema
        --json --tasks --ask --cfg-scale --breakdown --preset --harness --report --tokenizer --mesh
        --dtype --gen-length --estimator --speed""",
    "import": "--from --output --mesh --mask-token --causal --json --tokenizer",
    "export": """--checkpoint --output --dtype --shard-size --ema --layout --chat-template --force
        --verify --push-to-hub --dry-run --license --adapters --json --tokenizer""",
    "plan": """--config --topology --slices --vocab-size --compile --search --flags --json
        --network-gbps --price
        --config.KEY""",
    "sweep": """--config --workdir --list --index --run --optuna --table --fit --parallel --plot
        --dry-run --json --config.KEY""",
}

# Flags whose value is a path, whatever their help shows as their value.
PATH_FLAGS = """--input --output --tokenizer --join --config --workdir --checkpoint --prompt-file
    --html --data --report --from --chat-template --plot"""

REQUIRED = {
    "prepare": ["--input", "x", "--output", "y", "--sequence-length", "16", "--tokenizer", "bytes"],
    "train": ["--config", "x.py", "--workdir", "y"],
    "rollback": ["--workdir", "x", "--to", "1"],
    "sample": ["--checkpoint", "x"],
    "chat": ["--checkpoint", "x"],
    "evaluate": ["--checkpoint", "x"],
    "import": ["--from", "x", "--output", "y"],
    "export": ["--checkpoint", "x", "--output", "y"],
    "plan": ["--config", "x.py", "--topology", "v5p-8"],
    "sweep": ["--config", "x.py", "--workdir", "y"],
}


@pytest.fixture
def says(capsys):
    """Returns says(*argv) -> the one line on stderr of a command that exits 2."""

    def says(*argv: str) -> str:
        assert main(list(argv)) == 2
        out, err = capsys.readouterr()
        assert out == ""
        (line,) = err.splitlines()
        assert line.startswith("llada-jax: ")
        assert line.endswith((".", "?"))
        return line

    return says


@pytest.fixture
def help_of(capsys, monkeypatch):
    """Returns help_of(verb) -> the text of `llada-jax VERB --help` on a screen of 100 columns."""
    monkeypatch.setenv("COLUMNS", str(COLUMNS))

    def help_of(verb: str) -> str:
        with pytest.raises(SystemExit) as ended:
            main([verb, "--help"])
        assert ended.value.code == 0
        out, err = capsys.readouterr()
        assert err == ""
        return out

    return help_of


# ---- the table of verbs


def test_every_verb_is_tested_here():
    assert set(FLAGS) == set(REQUIRED) == set(VERBS)


def test_without_a_verb_the_verbs_are_listed_and_the_status_is_that_of_a_mistake(capsys):
    assert main([]) == 2
    out = capsys.readouterr().out
    assert out.startswith("usage: llada-jax VERB")
    for verb, (_, summary) in VERBS.items():
        assert re.search(rf"^  {verb} +{re.escape(summary)}$", out, flags=re.MULTILINE)
    fits_a_screen(out)


@pytest.mark.parametrize("word", ["--help", "-h", "help"])
def test_help_lists_the_verbs(word, capsys):
    assert main([word]) == 0
    out, err = capsys.readouterr()
    assert all(verb in out for verb in VERBS)
    assert err == ""
    fits_a_screen(out)


def test_version_is_the_packages(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"{llada_jax.__version__}\n"
    assert re.fullmatch(r"\d+\.\d+\.\d+", llada_jax.__version__)


def test_an_unknown_verb_names_the_one_that_was_meant(says):
    assert says("trian") == "llada-jax: Unknown verb 'trian'. Did you mean 'train'?"
    assert (
        says("preprare", "--help") == "llada-jax: Unknown verb 'preprare'. Did you mean 'prepare'?"
    )
    assert says("--workdir", "x").startswith(
        "llada-jax: Unknown verb '--workdir'. Known: chat, evaluate, "
    )


@pytest.mark.slow
def test_the_module_and_the_console_script_are_the_same_command():
    words = ["sample", "--chekpoint", "x"]
    script = f"{sys.prefix}/bin/llada-jax"
    done = [
        subprocess.run([*command, *words], capture_output=True, text=True, check=False)
        for command in ([sys.executable, "-m", "llada_jax"], [script])
    ]
    assert [d.returncode for d in done] == [2, 2]
    assert done[0].stderr == done[1].stderr
    assert done[0].stdout == done[1].stdout == ""


def test_a_reader_that_has_gone_is_not_an_error():
    command = f"{sys.executable} -m llada_jax prepare --help | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.stdout == "0\n"
    assert done.stderr == ""


# ---- the help


def fits_a_screen(text: str) -> None:
    lines = text.splitlines()
    assert len(lines) <= LINES
    assert max(map(len, lines)) <= COLUMNS


@pytest.mark.parametrize("verb", VERBS)
def test_help_fits_a_screen_and_ends_with_an_example(verb, help_of):
    text = help_of(verb)
    fits_a_screen(text)
    *_, heading, example = text.splitlines()
    assert heading == "example:"
    assert example.startswith(f"  llada-jax {verb} --")
    assert text.startswith(f"usage: llada-jax {verb}")


@pytest.mark.parametrize("verb", VERBS)
def test_the_example_of_the_help_is_accepted(verb, help_of, monkeypatch):
    import shlex

    example = help_of(verb).splitlines()[-1]
    parsed = []

    def stop(self, argv):
        parsed.append(Parser.__mro__[1].parse_args(self, argv))
        raise KeyboardInterrupt

    monkeypatch.setattr(Parser, "parse_args", stop)
    assert main(shlex.split(example)[1:]) == 130
    assert len(parsed) == 1


def parts_of(text: str) -> tuple[str, set[str]]:
    """Returns the lines of a help that explain a flag each, and the flags after "more flags", which
    a document explains.
    """
    text, _, more = text.split("example:")[0].partition("more flags, explained in docs/")
    return text, set(re.findall(r"--[\w-]+", more))


@pytest.mark.parametrize("verb", VERBS)
def test_the_flags_are_those_that_scripts_rely_on(verb, help_of):
    text, more = parts_of(help_of(verb))
    listed = set(re.findall(r"^  (?:-\w, )?(--[\w.-]+)", text, flags=re.MULTILINE)) - {"--help"}
    assert listed | more == set(FLAGS[verb].split())
    assert not listed & more


@pytest.mark.parametrize("verb", VERBS)
def test_every_flag_has_a_line_that_says_what_it_does(verb, help_of):
    text, more = parts_of(help_of(verb))
    named = re.search(r"more flags, explained in (\S+):", help_of(verb))
    page = (ROOT / named[1]).read_text() if named else ""
    for flag in FLAGS[verb].split():
        if flag in more:
            assert f"`{flag}" in page, flag
            continue
        # on its own line, or on the next one where the flag is too long for the column
        assert re.search(
            rf"^  {re.escape(flag)}\b[^\n]*?(  |\n {{20,}})\S", text, flags=re.MULTILINE
        ), flag


# ---- mistakes


@pytest.mark.parametrize("verb", VERBS)
def test_every_misspelt_flag_names_the_one_that_was_meant(verb, says):
    for flag in FLAGS[verb].split():
        if len(flag) > 8 and flag != "--config.KEY":
            typo = flag[:-2] + flag[-1]
            line = says(verb, *REQUIRED[verb], f"{typo}=3")
            assert (
                line == f"llada-jax: llada-jax {verb}: there is no {typo!r}. Did you mean {flag!r}?"
            )


@pytest.mark.parametrize("verb", VERBS)
def test_a_missing_flag_is_named(verb, says):
    required = [word for word in REQUIRED[verb] if word.startswith("--")]
    line = says(verb)
    assert all(flag in line for flag in required)
    assert f"see llada-jax {verb} --help" in line


@pytest.mark.parametrize("verb", VERBS)
def test_a_flag_is_never_guessed_from_its_beginning(verb, says):
    first = REQUIRED[verb][0]
    assert first in says(verb, first[:-1], *REQUIRED[verb][1:])


def test_a_word_for_a_number_is_named(says):
    line = says("sample", "--checkpoint", "x", "--gen-length", "ten")
    assert "--gen-length" in line
    assert "'ten'" in line
    line = says("prepare", *REQUIRED["prepare"], "--documents", "page")
    assert "--documents" in line
    assert "'page'" in line
    assert "record" in line


def test_a_knob_is_written_with_an_equals_sign_or_with_a_space_as_the_help_writes_it():
    words = ["--config.seed=3", "--workdir", "w", "--config.optimizer.b2", "0.98", "--json"]
    assert take_overrides(words) == (
        ["--workdir", "w", "--json"],
        ["seed=3", "optimizer.b2=0.98"],
    )
    # what follows an equals sign is the value, whatever it holds; a negative number is one too
    assert take_overrides(["--config.data.path=a=0.7,b=0.3"])[1] == ["data.path=a=0.7,b=0.3"]
    assert take_overrides(["--config.mesh.fsdp", "-1"])[1] == ["mesh.fsdp=-1"]
    assert take_overrides(["--config.log.compilation_cache="])[1] == ["log.compilation_cache="]


@pytest.mark.parametrize("verb", ["train", "plan", "sweep"])
def test_both_ways_to_write_a_knob_reach_the_config(verb, says, tmp_path):
    file = tmp_path / "c.py"
    file.write_text("from llada_jax.config import default_config as get_config\n")
    words = [verb, "--config", str(file), *REQUIRED[verb][2:]]
    words += ["--list"] if verb == "sweep" else []
    for knob in (["--config.num_steps=x"], ["--config.num_steps", "x"]):
        assert "num_steps=x is" in says(*words, *knob)


@pytest.mark.parametrize("verb", ["train", "plan", "sweep"])
def test_a_knob_without_a_value_is_a_mistake(verb, says):
    for words in (["--config.seed"], ["--config.seed", "--config.num_steps=3"]):
        assert "--config.seed has no value; write --config.seed=VALUE" in says(
            verb, *REQUIRED[verb], *words
        )


def test_a_flag_in_the_place_of_a_value_is_a_mistake(says):
    assert "--workdir" in says("train", "--config", "x.py", "--workdir", "--config.seed=3")


@pytest.mark.parametrize("verb", VERBS)
def test_a_tilde_in_any_flag_with_a_path_is_the_home_directory(verb, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    parser = importlib.import_module(f"llada_jax.verbs.{VERBS[verb][0]}").make_parser()
    for flag in set(PATH_FLAGS.split()) & set(FLAGS[verb].split()):
        parsed = parser.parse_args([*REQUIRED[verb], flag, "~/x"])
        (name,) = (action.dest for action in parser._actions if flag in action.option_strings)
        value = getattr(parsed, name)
        assert (value[-1] if isinstance(value, list) else value) == "/home/me/x", flag


@pytest.mark.parametrize("verb", ["sample", "chat", "evaluate"])
@pytest.mark.parametrize(("words", "ema"), [([], None), (["--ema"], True), (["--no-ema"], False)])
def test_the_weights_that_are_asked_for_are_those_that_are_loaded(verb, words, ema, monkeypatch):
    asked = []

    def load(checkpoint, **options):
        asked.append((checkpoint, options["ema"]))
        raise KeyboardInterrupt

    monkeypatch.setattr("llada_jax.pretrained.load", load)
    monkeypatch.setattr(f"llada_jax.verbs.{verb}.load", load, raising=False)
    more = ["--data", "y"] if verb == "evaluate" else []
    assert main([verb, "--checkpoint", "x", *more, *words]) == 130
    assert asked == [("x", ema)]


def test_the_parser_raises_instead_of_leaving_the_process():
    parser = Parser("verb", "Does.", "llada-jax verb --flag 1")
    parser.add_argument("--flag", type=int)
    with pytest.raises(UserError, match="there is no '--flog'. Did you mean '--flag'"):
        parser.parse_args(["--flog", "1"])


MEMORY = """
import sys
import numpy as np
import jax, jax.numpy as jnp
from llada_jax import __main__
from llada_jax.verbs import sample

for allocate in (
    lambda argv: jnp.zeros((2**21, 2**21)),
    lambda argv: jax.jit(lambda: jnp.ones((2**21, 2**21)))(),
    lambda argv: np.zeros((2**24, 2**24)),
    lambda argv: bytearray(2**50),
):
    sample.main = allocate
    print(__main__.main(["sample"]))
"""


@pytest.mark.slow
def test_what_the_memory_does_not_hold_ends_in_one_sentence():
    """On a device, in a compiled program, in numpy and in Python."""
    done = subprocess.run(
        [sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["2"] * 4
    assert len(done.stderr.splitlines()) == 4
    for sentence in done.stderr.splitlines():
        assert "The memory of this machine is not enough (" in sentence


def test_an_interrupt_outside_of_training_has_a_status_of_its_own_and_no_traceback(
    capsys, monkeypatch
):
    def interrupted(self, argv):
        raise KeyboardInterrupt

    monkeypatch.setattr(Parser, "parse_args", interrupted)
    for verb in VERBS:
        assert main([verb]) == 130
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("llada-jax: interrupted")


def test_a_current_directory_that_is_gone_is_named(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    tmp_path.rmdir()
    monkeypatch.setattr(Parser, "parse_args", lambda self, argv: Path("run").absolute())
    assert main(["rollback"]) == 2
    assert "llada-jax: The current directory has been removed" in capsys.readouterr().err


@pytest.mark.parametrize(
    "kind", [kind for kind in vars(errors).values() if hasattr(kind, "exit_status")]
)
def test_an_error_with_an_exit_status_is_printed_in_one_line_and_sets_that_status(
    kind, capsys, monkeypatch
):
    def fails(self, argv):
        raise kind("it ended.")

    monkeypatch.setattr(Parser, "parse_args", fails)
    assert main(["rollback"]) == kind.exit_status
    assert capsys.readouterr().err == "llada-jax: it ended.\n"


def test_json_has_no_nan_and_no_infinity():
    value = {"a": float("nan"), "b": [1.5, float("-inf"), ("x", None)], "c": True}
    assert json_text(value) == '{"a": null, "b": [1.5, null, ["x", null]], "c": true}'

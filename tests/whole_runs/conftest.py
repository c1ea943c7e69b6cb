"""What the tests of errors share: a home with data and a run, and a check of refusals."""

from pathlib import Path

import jax
import numpy as np
import pytest
from support.mishaps import (
    STARTUP_LINE,
    WORDS,
    check_sentence,
    prepare_argv,
    train_argv,
    tree,
    write_config,
)

from llada_jax.__main__ import main
from llada_jax.checkpoints.workdir import Checkpoints


@pytest.fixture(autouse=True)
def _no_mesh_after_a_test():
    yield
    jax.set_mesh(None)


@pytest.fixture(scope="session")
def home(tmp_path_factory) -> Path:
    """A directory with text.txt, the datasets data/ (bytes) and spm/ (SentencePiece), the config
    tiny.py and its complete run run/. Tests copy what they damage.
    """
    home = tmp_path_factory.mktemp("errors")
    rng = np.random.default_rng(0)
    lines = [" ".join(rng.choice(WORDS, size=rng.integers(3, 12))) for _ in range(600)]
    (home / "text.txt").write_text("\n".join(lines) + "\n")
    for name, tokenizer in (("data", "bytes"), ("spm", "spm:300")):
        argv = prepare_argv(
            home / "text.txt", home / name, "--documents", "line", "--heldout", "0.1"
        )
        assert main([word if word != "bytes" else tokenizer for word in argv]) == 0
    write_config(home)
    assert main(train_argv(home, home / "run")) == 0
    assert Checkpoints(home / "run").steps == [2, 4]
    return home


@pytest.fixture
def refused(capfd):
    """Returns refused(argv, says=...) -> the one sentence of a command that must fail.

    keeps: directories in which no byte may change. creates: a path that must not exist afterwards.
    is_late: the mishap comes after the run has begun, and so the start-up lines may stand before
    the sentence.
    """

    def refused(argv, *, says, status=2, keeps=(), creates=None, is_late=False) -> str:
        before = [tree(path) for path in keeps]
        capfd.readouterr()
        assert main([str(word) for word in argv]) == status
        out, err = capfd.readouterr()
        *said_before, sentence = err.splitlines()
        assert out == ""
        assert [
            line for line in said_before if not (is_late and STARTUP_LINE.fullmatch(line))
        ] == []
        check_sentence(sentence, says)
        assert [tree(path) for path in keeps] == before
        assert creates is None or not Path(creates).exists()
        return sentence

    return refused

"""What a wrong name in a config or an override is answered with: the line, and what was meant."""

import pytest

from llada_jax.config import load_config
from llada_jax.errors import UserError

FILE = """from llada_jax.config import default_config
def get_config():
    config = default_config()
    config.num_steps = 3
    {line}
    return config
"""


def error_of(tmp_path, line: str, *overrides: str) -> str:
    (tmp_path / "own.py").write_text(FILE.format(line=line))
    with pytest.raises(UserError) as refused:
        load_config(str(tmp_path / "own.py"), overrides)
    message = str(refused.value)
    assert len(message.splitlines()) == 1
    return message


@pytest.mark.parametrize(
    ("line", "says"),
    [
        # a knob of the top, or of another group, is not suggested as itself
        (
            "config.optimizer.num_steps = 3",
            "line 5 (config.optimizer.num_steps = 3): the config has no 'optimizer.num_steps'. "
            "Did you mean 'num_steps'?",
        ),
        ("config.learning_rate = 1.0", "no 'learning_rate'. Did you mean 'schedule.learning_rate'"),
        (
            "config.optimizer.learning_rate = 1.0",
            "no 'optimizer.learning_rate'. Did you mean 'schedule.learning_rate'?",
        ),
        (
            "config.model.eps = 1.0",
            "no 'model.eps'. Did you mean 'objective.eps' or 'optimizer.eps'?",
        ),
        (
            "config.optimizer.b3 = 1.0",
            "no 'optimizer.b3'. Did you mean 'optimizer.b2'?",
        ),
        ("config.modle.d_model = 1", "no 'modle'. Did you mean 'model'?"),
        ("config['optimizer']['num_stepz'] = 1", "line 5 (config['optimizer']['num_stepz'] = 1)"),
        ("config.seed = = 3", "line 5 (config.seed = = 3): SyntaxError: invalid syntax"),
        ("config.seed = 1 / 0", "line 5 (config.seed = 1 / 0): ZeroDivisionError"),
        ("config.seed = 'x'", "line 5 (config.seed = 'x'): it sets seed to x, which is not of"),
        ("import absent_module", "line 5 (import absent_module): ModuleNotFoundError"),
    ],
)
def test_a_mistake_in_a_file_is_answered_with_its_line_and_with_what_was_meant(
    tmp_path, line, says
):
    assert says in error_of(tmp_path, line)


def test_a_mistake_next_to_the_config_is_answered_with_the_name_of_its_file(tmp_path):
    (tmp_path / "sizes.py").write_text("WIDTH = 128\nDEPTH = = 2\n")
    message = error_of(tmp_path, "import sizes")
    assert "own.py cannot be used: line 2 of sizes.py (DEPTH = = 2): SyntaxError" in message
    (tmp_path / "sizes.py").write_text("WIDTH = 1 / 0\n")
    assert "line 5 (import sizes): ZeroDivisionError" in error_of(tmp_path, "import sizes")


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("learning_rate=1", "Did you mean 'schedule.learning_rate'?"),
        ("optimizer.learning_rate=1", "Did you mean 'schedule.learning_rate'?"),
        ("optimizer.num_steps=1", "Did you mean 'num_steps'?"),
        ("batch_size=1", "Did you mean 'data.batch_size'?"),
        ("eps=1", "Did you mean 'objective.eps' or 'optimizer.eps'?"),
        ("data.batchsize=1", "Did you mean 'data.batch_size'?"),
        ("schedule.lr=1", "Known: schedule.arguments, "),
        ("lr=1", "Known: num_steps, num_tokens, seed, checkpoint, data, "),
        ("model=1", "'model', which is a group of knobs; set one of model.attention, "),
        ("modle.d_model=1", "no group 'modle' (in --config.modle.d_model). Did you mean 'model'?"),
    ],
)
def test_a_wrong_override_is_answered_with_what_was_meant(tmp_path, override, says):
    message = error_of(tmp_path, "pass", override)
    assert says in message
    assert len(message) < 600

"""Configs for tests: the defaults, the files of the repository, and changed copies."""

from ml_collections import ConfigDict

from llada_jax.config import default_config
from llada_jax.validation import knobs, validate
from support.paths import ROOT

CONFIGS = sorted((ROOT / "configs").glob("*.py"))
DEFAULT = default_config()
PATHS = knobs(DEFAULT)


def valid(**changes) -> ConfigDict:
    """A valid config with knobs changed: valid(**{"data.batch_size": 3})."""
    config = default_config()
    config.num_steps = 10
    for path, value in changes.items():
        *groups, key = path.split(".")
        node = config
        for group in groups:
            node = node[group]
        node[key] = value
    return config


def check(config) -> None:
    """Raises UserError if a config is impossible."""
    validate(config, DEFAULT)

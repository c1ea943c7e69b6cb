"""The config that `import` writes into a workdir: it continues from the imported weights."""

from llada_jax.models.transformer import Architecture

# Proposals, which docs/continue-8b.md explains: the rates are those of the published fine-tuning
# (arXiv 2502.09992, appendix B).
_TEXT = '''\
"""Continues to train {source}.

    llada-jax train --config {file} --workdir runs/more --config.data.path=DATA

DATA is a directory that `llada-jax prepare --tokenizer {tokenizer}` has written.
{note}The network is that of the weights and must stay; everything else is a proposal
(docs/continue-8b.md). Copy this file to where your configs are, and change it there.
"""

from llada_jax.config import default_config


def get_config():
    config = default_config()
    config.num_tokens = 1_000_000_000
    config.checkpoint.init_from = {output!r}
{model}
    config.model.remat = "full"
    config.model.nll_chunk = 256
    config.data.batch_size = 256
    config.schedule.name = "wsd"
    config.schedule.learning_rate = 2.5e-5
    config.schedule.final_learning_rate = 2.5e-6
    config.schedule.warmup_steps = 100
    return config
'''

NAME = "continue.py"
_NO_TOKENIZER = "TOKENIZER is that of the weights, which came without one.\n"


def starting_config(
    architecture: Architecture, *, source: str, output: str, has_tokenizer: bool
) -> str:
    """Returns the text of a config file.

    Args:
        source: what was imported. output: the workdir that holds it.
        has_tokenizer: whether a tokenizer lies there too.
    """
    model = "\n".join(
        f"    config.model.{name} = {value!r}" for name, value in vars(architecture).items()
    )
    # in a docstring, where a backslash or a quotation mark of a path would end it
    shown = source.encode("unicode_escape").decode().replace('"', "'")
    named = output.encode("unicode_escape").decode().replace('"', "'")
    # not str.format, for which a brace in a path would begin a field
    return (
        _TEXT.replace("{model}", model)
        .replace("{tokenizer}", "{output}/tokenizer" if has_tokenizer else "TOKENIZER")
        .replace("{note}", "" if has_tokenizer else _NO_TOKENIZER)
        .replace("{source}", shown)
        .replace("{file}", f"{named}/{NAME}")
        .replace("{output!r}", repr(output))
        .replace("{output}", named)
    )

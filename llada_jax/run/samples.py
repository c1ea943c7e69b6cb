"""The texts that a run samples while it trains."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from llada_jax.run.tensorboard import as_code

if TYPE_CHECKING:
    from llada_jax.samplers.text import Completion


def as_markdown(completions: "Sequence[Completion]") -> str:
    """Returns what the model writes after each prompt, as Markdown that shows them as they are."""
    return "\n\n---\n\n".join(
        f"prompt\n\n{as_code(c.prompt)}\n\ncompletion\n\n{as_code(c.text)}" for c in completions
    )

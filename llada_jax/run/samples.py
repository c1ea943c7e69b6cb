"""The texts that a run samples while it trains."""

from collections.abc import Callable

from llada_jax.run.tensorboard import as_code
from llada_jax.samplers.text import generate_text


def sample_markdown(
    model, params, tokenizer, *, prompts: list[str], on_step: Callable, **settings
) -> str:
    """Returns what the model writes after each prompt, as Markdown that shows them as they are.

    Args:
        model: with the reference attention, which takes a canvas of any length.
        settings: of llada_jax.samplers.text.generate_text.
    """
    completions = generate_text(
        model.logits_fn, params, tokenizer, prompts, on_step=on_step, **settings
    )
    return "\n\n---\n\n".join(
        f"prompt\n\n{as_code(c.prompt)}\n\ncompletion\n\n{as_code(c.text)}" for c in completions
    )

"""llada_jax: pretraining of LLaDA, the masked diffusion language model, in JAX.

Letters of array dims, carried as suffixes of array names (tokens_BT):
    B batch, T positions (queries), S positions attended to, D width, N query heads, K key/value
    heads, H head width, F feed-forward width, V vocabulary, L layers.
"""

__version__ = "0.1.0"


def load(checkpoint, **kwargs):
    """Loads a trained model for sampling and scoring; see llada_jax.pretrained.load."""
    from llada_jax.pretrained import (
        load as load_pretrained,  # importing the package alone must not import jax
    )

    return load_pretrained(checkpoint, **kwargs)

"""llada_jax: pretraining of LLaDA, the masked diffusion language model, in JAX.

Letters of array dims, carried as suffixes of array names (tokens_BT):
    B batch, T positions (queries), S positions attended to, D width, N query heads, K key/value
    heads, H head width, F feed-forward width, V vocabulary, L layers.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from llada_jax.pretrained import Pretrained

__version__ = "0.1.0"


def load(
    checkpoint: str,
    *,
    dtype: str = "auto",
    mesh: "Mesh | None" = None,
    ema: bool | None = None,
    keep_float32: bool = True,
) -> "Pretrained":
    """Loads a trained model for sampling and scoring.

    Args:
        checkpoint: WORKDIR, WORKDIR@STEP, or a Hugging Face directory.
        dtype: of the matrix products: "auto" (float32 on CPU, bfloat16 elsewhere), "float32" or
            "bfloat16".
        mesh: where to put the parameters; None: the first device.
        ema: True loads the moving average of the parameters, False the parameters themselves; None
            loads the average where the run kept one.
        keep_float32: False keeps the matrices in `dtype`, which changes no score and no sample.

    See llada_jax.pretrained.load, which this calls.
    """
    # Imported here, because importing the package alone must not import jax.
    from llada_jax.pretrained import load as load_pretrained

    return load_pretrained(checkpoint, dtype=dtype, mesh=mesh, ema=ema, keep_float32=keep_float32)

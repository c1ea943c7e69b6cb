"""llada_jax: pretraining of LLaDA, the masked diffusion language model, in JAX.

Letters of array dims, carried as suffixes of array names (tokens_BT):
    B batch, T positions (queries), S positions attended to, D width, N query heads, K key/value
    heads, H head width, F feed-forward width, V vocabulary, L layers.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence

    from jax.sharding import Mesh
    from ml_collections import ConfigDict

    from llada_jax.pretrained import Pretrained
    from llada_jax.run.results import TrainedRun

__version__ = "0.1.0"


def load(
    checkpoint: "str | os.PathLike[str]",
    *,
    dtype: str = "auto",
    mesh: "Mesh | None" = None,
    ema: bool | None = None,
    tokenizer: "str | os.PathLike[str]" = "",
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
        tokenizer: where the tokenizer is, for weights that came without one; "" takes the
            checkpoint's. Weights alone give `logits` and `generate_tokens`.
        keep_float32: False keeps the matrices in `dtype`, which changes no score and no sample.

    See llada_jax.pretrained.load, which this calls.
    """
    # Imported here, because importing the package alone must not import jax.
    from llada_jax import pretrained

    return pretrained.load(
        checkpoint,
        dtype=dtype,
        mesh=mesh,
        ema=ema,
        tokenizer=tokenizer,
        keep_float32=keep_float32,
    )


def train(
    config: "ConfigDict | str | os.PathLike[str]",
    workdir: "str | os.PathLike[str]",
    *,
    changes: "Mapping[str, Any] | None" = None,
) -> "TrainedRun":
    """Trains a model, or continues the run that the workdir holds; returns its last metrics.

    Args:
        config: a Python file with get_config(), or a changed llada_jax.config.default_config().
        workdir: where the run lives.
        changes: knobs and their values, such as {"num_steps": 200, "optimizer.b2": 0.98}.

    See llada_jax.verbs.train.train, which this calls.
    """
    from llada_jax.verbs import train

    return train.train(config, workdir, changes=changes)


def evaluate(
    checkpoint: "str | os.PathLike[str]",
    data: "str | os.PathLike[str]",
    *,
    split: str = "heldout",
    mc_samples: int = 1,
    batch_size: int = 64,
    seed: int = 0,
    baselines: bool = False,
    breakdown: bool = False,
    speed: bool = False,
    ema: bool | None = None,
    tokenizer: "str | os.PathLike[str]" = "",
    dtype: str = "auto",
    mesh: "Mesh | None" = None,
    keep_float32: bool = True,
) -> dict[str, Any]:
    """Returns the bound on the likelihood of a split, as `llada-jax evaluate --json` prints it.

    See llada_jax.verbs.evaluate.evaluate, which this calls, for the arguments.
    """
    from llada_jax.verbs import evaluate

    return evaluate.evaluate(
        checkpoint,
        data,
        split=split,
        mc_samples=mc_samples,
        batch_size=batch_size,
        seed=seed,
        baselines=baselines,
        breakdown=breakdown,
        speed=speed,
        ema=ema,
        tokenizer=tokenizer,
        dtype=dtype,
        mesh=mesh,
        keep_float32=keep_float32,
    )


def evaluate_tasks(
    checkpoint: "str | os.PathLike[str]",
    tasks: "str | os.PathLike[str]",
    *,
    ask: "Sequence[str] | None" = None,
    mc_samples: int = 128,
    gen_length: int | None = None,
    estimator: str = "exact_count",
    cfg_scale: float = 0.0,
    batch_size: int = 64,
    seed: int = 0,
    ema: bool | None = None,
    tokenizer: "str | os.PathLike[str]" = "",
    dtype: str = "auto",
    mesh: "Mesh | None" = None,
    keep_float32: bool = True,
) -> dict[str, Any]:
    """Returns how the questions of a .jsonl file are answered, as `llada-jax evaluate --tasks FILE
    --json` prints it.

    See llada_jax.verbs.evaluate.evaluate_tasks, which this calls, for the arguments.
    """
    from llada_jax.verbs import evaluate

    return evaluate.evaluate_tasks(
        checkpoint,
        tasks,
        ask=ask,
        mc_samples=mc_samples,
        gen_length=gen_length,
        estimator=estimator,
        cfg_scale=cfg_scale,
        batch_size=batch_size,
        seed=seed,
        ema=ema,
        tokenizer=tokenizer,
        dtype=dtype,
        mesh=mesh,
        keep_float32=keep_float32,
    )

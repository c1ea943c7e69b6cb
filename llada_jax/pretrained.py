"""`llada_jax.load("runs/tiny/run")`: a checkpoint becomes a model in memory."""

import os

from jax.sharding import Mesh

from llada_jax.arguments import checked
from llada_jax.checkpoints.huggingface import find_weights, tokenizer_of
from llada_jax.checkpoints.record import reads_ema
from llada_jax.checkpoints.workdir import identity
from llada_jax.cluster import sharding
from llada_jax.cluster.agreement import check_same_everywhere
from llada_jax.errors import UserError
from llada_jax.loaded_model import Pretrained
from llada_jax.masks import Mask
from llada_jax.models.attention import choose, choose_for_canvases
from llada_jax.models.layers import by_layer
from llada_jax.models.model import (
    Model,
    abstract_parameters,
    check_mesh,
    compute_dtype,
    in_compute_dtype,
    make_model,
)
from llada_jax.models.transformer import Architecture


@checked
def load(
    checkpoint: str | os.PathLike[str],
    *,
    dtype: str = "auto",
    mesh: Mesh | None = None,
    ema: bool | None = None,
    tokenizer: str | os.PathLike[str] = "",
    keep_float32: bool = True,
    needs_text: bool = False,
) -> Pretrained:
    """Loads a checkpoint for sampling and scoring.

    Args:
        checkpoint: WORKDIR, WORKDIR@STEP, or a Hugging Face directory. Llama and Qwen are loaded as
            what they are, causal.
        dtype: of the matrix products: "auto" (float32 on CPU, bfloat16 elsewhere), "float32" or
            "bfloat16".
        mesh: where to put the parameters (llada_jax.cluster.sharding.make_mesh); None: the first
            device.
        ema: True loads the moving average of the parameters, False the parameters themselves; None
            loads the average where the run kept one.
        tokenizer: where the tokenizer is, for weights that came without one: "bytes", a
            SentencePiece .model file, or a folder; "" takes the checkpoint's. Without any, `logits`
            and `generate_tokens` work, and what needs text raises UserError.
        keep_float32: False keeps the matrices in the dtype of the products, which changes no score
            and no sample; in bfloat16 they take half of the memory.
        needs_text: whether weights without a tokenizer are refused at once, and not when text is
            asked for.

    Raises:
        UserError: there is no checkpoint, it cannot be read, its run kept no moving average, the
            tokenizer is not that of the checkpoint, the mesh does not divide the network, or the
            processes of the mesh find different checkpoints.
    """
    if dtype not in ("auto", "float32", "bfloat16"):
        raise UserError(f"dtype={dtype!r} is unknown; give auto, float32 or bfloat16.")
    found, step = find_weights(checkpoint, causal=True, tokenizer=tokenizer)
    record = found.record(step)
    words = tokenizer_of(found, record, given=tokenizer)
    if needs_text:
        words.encode("")
    if mesh is None:
        mesh = sharding.one_device_mesh()
    # Without a mesh, each process may load another model.
    if mesh.is_multi_process:
        check_same_everywhere(
            {"the checkpoint": identity(found, [step]), "the tokenizer": words.fingerprint}
        )
    check_mesh(record.architecture, mesh)
    model = network_for_canvases(record.architecture, record.mask, mesh, dtype=dtype)
    params = found.restore_params(
        step, abstract_parameters(model, mesh), ema=reads_ema(record, ema, checkpoint)
    )
    if not keep_float32:
        params = in_compute_dtype(params, compute_dtype(dtype, sharding.platform(mesh)))
        params = by_layer(params) if model.is_unrolled else params
    run = record.to_json()
    return Pretrained(words, run["config"], params, step, model, run, mesh)


def network_for_canvases(a: Architecture, mask: Mask, mesh: Mesh, *, dtype: str) -> Model:
    """Returns the network that samples, and scores answers.

    A canvas has any length and one segment, and its padding is on the left: the kernels of training
    want multiples of 128, or padding on the right. GPUs do without a loop over the layers, which
    would copy the weights of each in every pass; where the mesh gathers weights, the loop bounds
    how many layers are whole at a time.
    """
    platform = sharding.platform(mesh)
    computed = compute_dtype(dtype, platform)
    attention = choose_for_canvases(
        platform=sharding.kernel_platform(mesh),
        num_devices=mesh.size,
        mask=mask,
        head_dim=a.head_dim,
        dtype=computed,
    )
    gathers_weights = sharding.axis_size(mesh, "embed") > 1
    is_unrolled = platform in ("gpu", "cuda") and not gathers_weights
    return make_model(a, dtype=computed, attention=attention, mask=mask, is_unrolled=is_unrolled)


def network_for_rows(
    loaded: Pretrained, sequence_length: int, *, dtype: str, packed: bool
) -> Model:
    """Returns the network with the attention that training takes for such rows: records have one
    length and are padded on the right, where a canvas has any length and padding on either side.

    Args:
        sequence_length: of the rows, in tokens.
        dtype: what `load` was given.
        packed: whether the documents of a row may not see each other.
    """
    a, mesh, mask = loaded.record.architecture, loaded.mesh, loaded.record.mask
    computed = compute_dtype(dtype, sharding.platform(mesh))
    attention = choose(
        "auto",
        platform=sharding.kernel_platform(mesh),
        packed=packed,
        mask=mask,
        sequence_length=sequence_length,
        head_dim=a.head_dim,
        dtype=computed,
    )
    # A kernel runs on the heads of each device by itself, and on whole rows.
    is_whole = sharding.axis_size(mesh, "act_position") == 1
    if attention == "xla" or not is_whole or a.num_kv_heads % sharding.axis_size(mesh, "heads"):
        return loaded.model.for_any_rows
    return make_model(a, dtype=computed, attention=attention, mask=mask)

"""What a run prints before its first step."""

import jax
import jax.numpy as jnp
import numpy as np

from llada_jax.cluster import hardware, sharding
from llada_jax.data.loader import SourceSummary
from llada_jax.models.flops import flops_per_token
from llada_jax.models.transformer import num_matmul_parameters, num_parameters
from llada_jax.training.step import Recipe
from llada_jax.units import format_bytes, format_count, format_seconds


def startup_lines(
    recipe: Recipe,
    mesh,
    summaries: tuple[SourceSummary, ...],
    *,
    origin: str,
    batch_size: int,
    sequence_length: int,
    num_microbatches: int,
) -> list[str]:
    """Returns the run in numbers, each with the arithmetic behind it, so that a wrong knob is seen
    before the hours it would cost.

    Args:
        origin: where the first state comes from.
        batch_size, sequence_length: B and T of the global batch.
        num_microbatches: the parts in which a step goes through the batch.
    """
    a, abstract, num_steps = recipe.architecture, recipe.abstract, recipe.num_steps
    B, T = batch_size, sequence_length
    num_matmul = num_matmul_parameters(a)
    d_attention = a.num_heads * a.head_dim
    flops = flops_of_token(recipe, sequence_length=T)
    # causal attention multiplies half of the pairs
    factor = 6 if recipe.objective.mask.causal else 12
    attention_term = f"{factor} * {a.num_layers} layers * {d_attention} * {T}"
    arithmetic = f"6 * {format_count(num_matmul)} + {attention_term}"
    if (passes := recipe.objective.passes) != 1:
        arithmetic = f"{passes:.2f} passes * ({arithmetic})"
    device = mesh.devices.flat[0]
    peak = hardware.peak_flops(device)
    # shard_shape and not shape: what one device holds, the largest number that has to fit
    state_bytes = sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(abstract)
    )
    axes = [f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1]
    microbatches = f" in {num_microbatches} microbatches" if num_microbatches > 1 else ""
    # an unknown device gets no MFU: a guessed peak would make every later number wrong
    peak_words = (
        f"peak {peak / 1e12:.0f} TFLOP/s per device"
        if peak
        else f"no MFU: the peak of {device.device_kind!r} is unknown"
    )
    lines = [
        f"start       {origin}",
        f"model       {format_count(num_parameters(a))} parameters, {format_count(num_matmul)} in "
        "matrix products",
        f"step        {B} rows * {T} = {B * T:,} tokens{microbatches}",
        f"run         {num_steps:,} steps = {format_count(num_steps * B * T)} tokens, "
        f"{format_count(flops * num_steps * B * T)} FLOPs",
        f"FLOPs       {arithmetic} = {format_count(flops)} per token",
        f"mesh        {' x '.join(axes) or 'one device'} ({mesh.size} x {device.device_kind}, "
        f"{jax.process_count()} process{'es' if jax.process_count() > 1 else ''})",
        f"memory      {format_bytes(state_bytes)} per device for parameters and optimizer state",
        f"compute     {jnp.dtype(recipe.dtype).name}, attention {recipe.attention}, remat "
        f"{recipe.remat}, {peak_words}",
    ]
    for s in summaries:
        # of all tokens, as counted here and by prepare, and not of those that the loss counts
        bytes_per_token = s.info.splits["train"].num_bytes / s.num_tokens
        lines.append(
            f"data        {s.directory}: {format_count(s.num_tokens)} tokens in {s.num_records:,} "
            f"rows, {bytes_per_token:.2f} bytes per token, "
            f"{s.num_epochs(num_steps * B / recipe.objective.copies):.2f} epochs"
        )
    # A parameter that no rule of the table splits still trains, and wastes memory on each device
    # without an error; this line is the only sign of it.
    replicated = sharding.replicated_by_accident(abstract.params, mesh)
    if replicated:
        lines.append(
            "warning     kept whole on every device although the mesh shards parameters: "
            f"{', '.join(replicated)}"
        )
    return lines


def flops_of_token(recipe: Recipe, *, sequence_length: int) -> float:
    """Returns the operations of training on one token, see llada_jax.models.flops."""
    a = recipe.architecture
    return recipe.objective.passes * flops_per_token(
        num_matmul_parameters(a),
        a.num_layers,
        a.num_heads * a.head_dim,
        sequence_length,
        causal=recipe.objective.mask.causal,
    )


def compilation_line(compiled, seconds: float) -> str:
    """Returns how long compiling took and, where the backend says so, what the program needs."""
    memory = compiled.memory_analysis()
    if memory is None:
        return f"compiled    in {format_seconds(seconds)}"
    temporary = format_bytes(memory.temp_size_in_bytes)
    return (
        f"compiled    in {format_seconds(seconds)}; {temporary} per device for activations and "
        "gradients"
    )

"""What a run prints before its first step."""

import jax
import jax.numpy as jnp
import numpy as np

from llada_jax.cluster import hardware, sharding
from llada_jax.models.flops import flops_per_token
from llada_jax.models.transformer import num_matmul_parameters, num_parameters
from llada_jax.training.step import Recipe
from llada_jax.units import format_bytes, format_count, format_seconds


def startup_lines(config, recipe: Recipe, mesh, summaries, origin) -> list[str]:
    """Returns the lines printed before the first step: the run in numbers, with their arithmetic."""
    a, abstract, num_steps = recipe.architecture, recipe.abstract, recipe.num_steps
    B, T = config.data.batch_size, config.data.sequence_length
    num_matmul = num_matmul_parameters(a)
    d_attention = a.num_heads * a.head_dim
    is_causal = recipe.objective.mask.causal
    flops = flops_per_token(num_matmul, a.num_layers, d_attention, T, causal=is_causal)
    device = mesh.devices.flat[0]
    peak = hardware.peak_flops(device)
    state_bytes = sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(abstract)
    )
    axes = (
        " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1)
        or "one device"
    )
    accumulation = config.optimizer.gradient_accumulation
    attention_term = f"{6 if is_causal else 12} * {a.num_layers} layers * {d_attention} * {T}"
    lines = [
        f"start       {origin}",
        f"model       {format_count(num_parameters(a))} parameters, {format_count(num_matmul)} in "
        "matrix products",
        f"step        {B} rows * {T} = {B * T:,} tokens"
        + (f" in {accumulation} microbatches" if accumulation > 1 else ""),
        f"run         {num_steps:,} steps = {format_count(num_steps * B * T)} tokens, "
        f"{format_count(flops * num_steps * B * T)} FLOPs",
        f"FLOPs       6 * {format_count(num_matmul)} + {attention_term} = {format_count(flops)} a "
        "token",
        f"mesh        {axes} ({mesh.size} x {device.device_kind}, {jax.process_count()} process)",
        f"memory      {format_bytes(state_bytes)} a device for parameters and optimizer state",
        f"compute     {jnp.dtype(recipe.dtype).name}, attention {recipe.attention}, remat "
        f"{config.model.remat}, "
        + (
            f"peak {peak / 1e12:.0f} TFLOP/s a device"
            if peak
            else f"no MFU: the peak of {device.device_kind!r} is unknown"
        ),
    ]
    for s in summaries:
        lines.append(
            f"data        {s.directory}: {format_count(s.num_tokens)} tokens in {s.num_records:,} "
            "rows, "
            f"{s.bytes_per_token['train']:.2f} bytes a token, {s.num_epochs(num_steps * B):.2f} "
            "epochs"
        )
    replicated = sharding.replicated_by_accident(abstract.params, mesh)
    if replicated:
        lines.append(
            f"warning     whole on every device although the mesh shards: {', '.join(replicated)}"
        )
    return lines


def compilation_line(compiled, seconds: float) -> str:
    memory = compiled.memory_analysis()
    if memory is None:
        return f"compiled    in {format_seconds(seconds)}"
    temporary = format_bytes(memory.temp_size_in_bytes)
    return f"compiled    in {format_seconds(seconds)}; {temporary} a device for activations and gradients"

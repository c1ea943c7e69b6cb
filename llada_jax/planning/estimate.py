"""An estimate of one training step from its shapes: memory, traffic and time.

Nothing is compiled. What can be counted is exact (parameters, state, FLOPs); activations and time
are estimates whose assumptions are written where they are made. An estimate takes milliseconds,
which is what makes `search` possible; `check` asks the compiler, which takes minutes.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from llada_jax.cluster import sharding
from llada_jax.cluster.hardware import Slice
from llada_jax.models.flops import flops_per_token
from llada_jax.models.transformer import num_matmul_parameters, num_parameters
from llada_jax.training.step import Recipe

# What fraction of the peak the executed FLOPs reach, recomputation included. Published dense models
# of 7B to 70B reach 40 to 70% of the peak in model FLOPs, with up to a third recomputed on top
# (MaxText's README and tpu-recipes).
EFFICIENCY = {"slow": 0.45, "fast": 0.75}


class Workload(NamedTuple):
    """What the estimate reads of a config and does not find in the recipe.

    batch_size: B, rows of the global batch. sequence_length: T. num_microbatches: the parts into
    which each batch is split (gradient accumulation). remat: the policy of the layers, see
    config.model.remat. nll_chunk: positions of a row whose logits exist at one time.
    """

    batch_size: int
    sequence_length: int
    num_microbatches: int
    remat: str
    nll_chunk: int


def estimate_run(
    recipe: Recipe, workload: Workload, shape: dict[str, int], machines: Slice, num_slices: int
) -> dict:
    """Returns the estimate of a run as nested dicts of plain values, ready for JSON.

    Bytes and FLOPs are those of one device and one step unless the key says otherwise.

    Args:
        recipe: a recipe for a mesh of any shape, because only its arrays' sizes and axes are read.
            `search` makes one and estimates hundreds of meshes from it.
        shape: {mesh axis: size} to estimate for.
        machines: one slice; num_slices: how many of them the data centre network joins.
    """
    a, chip = recipe.architecture, machines.accelerator
    B, T, A = workload.batch_size, workload.sequence_length, workload.num_microbatches
    num_devices = machines.num_devices * num_slices
    # A causal network attends to half of the positions.
    is_causal = recipe.objective.mask.causal
    num_matmul = num_matmul_parameters(a)
    flops = recipe.objective.passes * flops_per_token(
        num_matmul, a.num_layers, a.num_heads * a.head_dim, T, causal=is_causal
    )
    # of one device in one microbatch
    rows = B // A // (shape["data"] * shape["fsdp"] * shape["expert"])
    tokens = rows * T // shape["sequence"]
    memory = memory_of(recipe, workload, shape, rows=rows, tokens=tokens)
    traffic = traffic_of(recipe, workload, shape, tokens=tokens, num_slices=num_slices)
    tokens_per_device = B * T / num_devices
    executed_flops = tokens_per_device * (flops + recomputed_flops(recipe, workload))
    seconds = step_seconds(executed_flops, traffic, machines, num_slices)
    peak_flops, num_steps = chip.peak_flops_per_device, recipe.num_steps
    num_chips = machines.num_chips * num_slices
    return {
        "topology": machines.name,
        "slices": num_slices,
        "chips": num_chips,
        "hosts": machines.num_hosts * num_slices,
        "devices": num_devices,
        "accelerator": chip.name,
        "peak_flops": peak_flops,
        "usable_bytes": chip.usable_bytes_per_device,
        "mesh": shape,
        "remat": workload.remat,
        "attention": recipe.attention,
        "dtype": recipe.dtype.name,
        "gradient_dtype": recipe.gradient_dtype.name,
        "parameters": num_parameters(a),
        "matmul_parameters": num_matmul,
        "vocab_size": a.vocab_size,
        "layers": a.num_layers,
        "d_attention": a.num_heads * a.head_dim,
        "sequence_length": T,
        "causal": is_causal,
        "passes": recipe.objective.passes,
        "flops_per_token": flops,
        "batch_size": B,
        "microbatches": A,
        "rows_per_device": rows,
        "tokens_per_device": tokens,
        "tokens_per_step": B * T,
        "num_steps": num_steps,
        "num_tokens": num_steps * B * T,
        "executed_flops": executed_flops,
        "memory": memory,
        "traffic": traffic,
        "network_counted": is_network_known(machines),
        "intensity": intensity_of(
            recipe,
            machines,
            shape,
            num_slices,
            tokens=tokens,
            tokens_per_slice=B * T // A // num_slices,
        ),
        "seconds_per_step": seconds,
        # Model FLOPs utilisation does not count what is recomputed, as in the PaLM paper: a policy
        # that recomputes less must not look worse.
        "mfu": {case: tokens_per_device * flops / (s * peak_flops) for case, s in seconds.items()},
        "days": {case: s * num_steps / 86400 for case, s in seconds.items()},
        "chip_hours": {case: s * num_steps / 3600 * num_chips for case, s in seconds.items()},
        "replicated": sharding.replicated_by_accident(
            recipe.abstract.params,
            recipe.batch_sharding.mesh,  # type: ignore[arg-type]
        ),
    }


# ---- memory


def memory_of(
    recipe: Recipe, workload: Workload, shape: dict[str, int], *, rows: int, tokens: int
) -> dict:
    """Returns bytes of one device: the state (exact), and estimates of what a step adds to it.

    Counted in elements per token and layer, with the letters of llada_jax; N, K and F stand for the
    share of one device, that is N H, K H and F divided by the tensor axis. S: scores of one token
    (N T; 0 where a kernel never holds them).

    Saved by the forward pass, by remat policy:
        full:       D                               the layer's input
        attention:  D + N                           and the output of attention
        dots:       3 D + 2 N + 2 K + 2 F           and the outputs of all products
        none:       5 D + 3 N + 3 K + 4 F + 3 S     and norms, rotary embeddings, activations
    At work in the backward pass of one layer, at the same time as all that was saved:
        4 D + 3 N + 2 K + 4 F + 3 S, and the layer's weights twice (gathered, and their gradient,
        each in its own dtype).
    At work in the head, before any layer: logits of one piece of the vocabulary's product and their
        gradient, float32, and the head's input and its gradient.
    The larger of the last two counts, because they never exist together.

    Args:
        rows, tokens: of one device in one microbatch.
    """
    a, itemsize = recipe.architecture, recipe.dtype.itemsize
    D, t = a.d_model, shape["tensor"]
    N, K, F = a.num_heads * a.head_dim / t, a.num_kv_heads * a.head_dim / t, a.d_ff / t
    # Only the reference attention holds the scores of all pairs of positions.
    S = a.num_heads / t * workload.sequence_length if recipe.attention == "xla" else 0
    saved = {
        "full": D,
        "attention": D + N,
        "dots": 3 * D + (2 * N + 2 * K) + 2 * F,
        "none": 5 * D + (3 * N + 3 * K) + 4 * F + 3 * S,
    }[workload.remat]
    # Gradients are float32, as the parameters are. With several microbatches a second copy holds
    # the sum while the next part is computed, and so it is with several passes.
    gradients = sharded_bytes(recipe.abstract.params, shape)
    gradients *= 1 + (workload.num_microbatches > 1) + (recipe.objective.trained_passes > 1)
    layer_weights = (num_matmul_parameters(a) - D * a.vocab_size) / a.num_layers / t
    layer_weights *= itemsize + recipe.gradient_dtype.itemsize
    num_pieces = -(-workload.sequence_length // workload.nll_chunk)
    layer = tokens * itemsize * (4 * D + 3 * N + 2 * K + 4 * F + 3 * S) + layer_weights
    head = tokens * (2 * 4 * a.vocab_size / t / num_pieces + 2 * 4 * D)
    sizes = {
        "state": sharded_bytes(recipe.abstract, shape),
        "gradients": gradients,
        "saved_activations": int(tokens * a.num_layers * saved * itemsize),
        "working": int(max(layer, head)),
    }
    # a part of the state, shown by itself
    frozen = sharded_bytes(recipe.abstract.frozen, shape)
    return {**sizes, "peak": sum(sizes.values()), "frozen": frozen}


def sharded_bytes(tree, shape: dict[str, int]) -> int:
    """Returns the bytes that one device holds of a tree of arrays on a mesh of another shape.

    Args:
        tree: arrays or jax.ShapeDtypeStructs with NamedShardings, of which only the axes' names are
            read.
        shape: {mesh axis: size}.
    """
    total = 0
    for leaf in jax.tree.leaves(tree):
        sizes = list(leaf.shape)
        for dim, axes in enumerate(leaf.sharding.spec):
            for axis in (axes,) if isinstance(axes, str) else axes or ():
                # Rounded up: XLA pads the last shard to the size of the others.
                sizes[dim] = -(-sizes[dim] // shape[axis])
        total += math.prod(sizes) * jnp.dtype(leaf.dtype).itemsize
    return total


# ---- FLOPs and traffic


def recomputed_flops(recipe: Recipe, workload: Workload) -> float:
    """Returns the FLOPs per token that the backward pass repeats.

    The remat policy decides for the layers: "dots" keeps the outputs of products and of attention,
    "attention" repeats the products, "full" repeats both. What is kept of attention saves a kernel
    from running again; the reference multiplies queries and keys once more. The head is repeated
    whenever it runs in pieces, because then no piece's logits are kept. Of several trained passes
    each is repeated as a whole before it is differentiated.
    """
    a, T = recipe.architecture, workload.sequence_length
    head = a.d_model * a.vocab_size
    projections = 2 * (num_matmul_parameters(a) - head)
    scores = 4 * a.num_layers * a.num_heads * a.head_dim * T
    again = scores / 2 if recipe.attention == "xla" else 0
    layers = {
        "none": 0,
        "dots": again,
        "attention": again + projections,
        "full": scores + projections,
    }[workload.remat]
    once = layers + (2 * head if workload.nll_chunk < T else 0)
    num_passes = recipe.objective.trained_passes
    whole = 2 * num_matmul_parameters(a) + 4 * a.num_layers * a.num_heads * a.head_dim * T
    return num_passes * once + (num_passes * whole if num_passes > 1 else 0)


def traffic_of(
    recipe: Recipe, workload: Workload, shape: dict[str, int], *, tokens: int, num_slices: int
) -> dict:
    """Returns bytes of whole arrays in whose exchange one device takes part per step, by purpose.

    gather: every weight matrix once per microbatch and pass, forward or backward, in the compute
    dtype, over fsdp. scatter: its gradient once per backward pass, in the gradient dtype, over
    fsdp. data: the gradient's shard once per microbatch, over data within a slice; dcn: between
    slices. tensor: activations, twice per forward pass, twice per backward pass and once more when
    a layer is recomputed. sequence: keys and values, forward, backward and recomputed.

    Whole arrays, and not what a link carries: a ring of n devices carries (n - 1) / n of that,
    which is nearly all of it on the meshes in question, and the compiler's programs are counted
    alike.

    Args:
        tokens: of one device in one microbatch.
    """
    a, A, itemsize = recipe.architecture, workload.num_microbatches, recipe.dtype.itemsize
    matrices = num_matmul_parameters(a) / shape["tensor"] * itemsize
    gradients = num_matmul_parameters(a) / shape["tensor"] * recipe.gradient_dtype.itemsize
    backward = recipe.objective.trained_passes
    # of several trained passes each runs forward again before it is differentiated
    forward = backward * (2 if backward > 1 else 1) + recipe.objective.other_passes
    is_repeated = workload.remat in ("attention", "full")
    # The expert axis splits the batch as well, so its devices hold replicas of the weights.
    replicas, sequence = shape["data"] * shape["expert"], shape["sequence"]
    activations = tokens * a.num_layers * itemsize
    keys_and_values = 2 * a.num_kv_heads * a.head_dim / shape["tensor"]
    traffic = dict.fromkeys(("gather", "scatter", "data", "dcn", "tensor", "sequence"), 0)
    if shape["fsdp"] > 1:
        traffic["gather"] = int((forward + backward) * A * matrices)
        traffic["scatter"] = int(backward * A * gradients)
    # What fsdp has scattered is all that is left to reduce.
    if replicas > num_slices:
        traffic["data"] = int(A * gradients / shape["fsdp"])
    if num_slices > 1:
        traffic["dcn"] = int(A * gradients / shape["fsdp"])
    if shape["tensor"] > 1:
        passes = 2 * forward + (3 if is_repeated else 2) * backward
        traffic["tensor"] = int(A * activations * a.d_model * passes)
    if sequence > 1:
        passes = forward + (2 if is_repeated else 1) * backward
        traffic["sequence"] = int(A * activations * sequence * keys_and_values * passes)
    return traffic


# ---- time


def bandwidth(machines: Slice) -> dict[str, float]:
    """Returns the bytes per second that a device sends over ICI or NVLink.

    fast: on all its links. slow: on those of one axis of the torus, which is what a collective gets
    that the compiler could not spread over the axes.
    """
    chip = machines.accelerator
    # The table counts both directions; what is sent has only one.
    whole = chip.link_bandwidth / 2 / chip.devices_per_chip
    return {"fast": whole, "slow": whole / len(machines.topology)}


def is_network_known(machines: Slice) -> bool:
    """Whether the table has the bandwidth of all that connects the devices.

    It has none for the network between hosts of GPUs, which differs from cluster to cluster.
    """
    return machines.accelerator.platform == "tpu" or machines.num_hosts == 1


def step_seconds(
    executed_flops: float, traffic: dict, machines: Slice, num_slices: int
) -> dict[str, float]:
    """Returns the time of a step under a fast and a slow set of assumptions.

    fast: EFFICIENCY["fast"] of the peak; all communication is hidden behind computing unless it
    takes longer, and uses all links. A gather or scatter of V bytes takes V / bandwidth, an
    all-reduce twice that. slow: EFFICIENCY["slow"], nothing hidden, the links of one axis, and
    gathers and scatters done as all-reduces, as libtpu does over whole slices. One number between
    the two would claim more than shapes can show.

    Between hosts of GPUs communication is not counted: their network is not known, and a guess
    would be taken for a figure.
    """
    chip, links, seconds = machines.accelerator, bandwidth(machines), {}
    for case, efficiency in EFFICIENCY.items():
        once = traffic["gather"] + traffic["scatter"] + traffic["sequence"]
        twice = traffic["data"] + traffic["tensor"]
        exchanged = (once * (2 if case == "slow" else 1) + 2 * twice) / links[case]
        if num_slices > 1:
            # A ring of slices: each gradient goes around once to be summed and once to be known.
            sent = 2 * (num_slices - 1) / num_slices * traffic["dcn"]
            exchanged += sent / (chip.dcn_bandwidth / chip.devices_per_chip)
        if not is_network_known(machines):
            exchanged = 0.0
        computed = executed_flops / (efficiency * chip.peak_flops_per_device)
        seconds[case] = max(computed, exchanged) if case == "fast" else computed + exchanged
    return seconds


def intensity_of(
    recipe: Recipe,
    machines: Slice,
    shape: dict[str, int],
    num_slices: int,
    *,
    tokens: int,
    tokens_per_slice: int,
) -> dict:
    """Returns how many tokens there are, and how many are needed to hide the gathers of weights.

    A layer of P parameters takes 6 P tokens FLOPs and moves 3 * 2 P bytes over fsdp (where weights
    and gradients are bfloat16), so that computing takes longer above peak / bandwidth tokens per
    device (the "How to Scale Your Model" book, chapter on training). With several slices, 2 * 2 P
    bytes of gradient go over the data centre network against 6 P tokens of FLOPs on a slice.
    """
    chip, links = machines.accelerator, bandwidth(machines)
    peak = chip.peak_flops_per_device
    # against those of bfloat16
    gathered, reduced = recipe.dtype.itemsize / 2, recipe.gradient_dtype.itemsize / 2
    exchanged = (2 * gathered + reduced) / 3
    limits = {
        "tokens_per_device": tokens,
        "needed_on_all_links": exchanged * peak / links["fast"] / shape["tensor"],
        "needed_on_one_axis": exchanged * peak / links["slow"] / shape["tensor"],
    }
    if num_slices > 1:
        limits["tokens_per_slice"] = tokens_per_slice
        limits["needed_between_slices"] = reduced * chip.peak_flops / chip.dcn_bandwidth
    return limits

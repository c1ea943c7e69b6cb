"""An estimate of one training step from its shapes: memory, traffic and time.

Nothing is compiled. What can be counted is exact (parameters, state, FLOPs); activations and time
are estimates whose assumptions are written where they are made. An estimate takes milliseconds,
which is what makes `search` possible; `check` asks the compiler, which takes minutes.
"""

import math

import jax
import optax

from llada_jax.cluster import sharding
from llada_jax.cluster.hardware import Accelerator, Slice
from llada_jax.models.adapters import NUM_INPUT_DIMS
from llada_jax.models.flops import flops_per_token
from llada_jax.models.split_rows import exchanged_heads
from llada_jax.models.transformer import num_matmul_parameters, num_parameters
from llada_jax.training.memory import (
    Workload,
    exchange_of,
    memory_of,
    parameter_ways,
    pieces_of_head,
    scored_share,
    sharded_bytes,
    split_of_batch,
)
from llada_jax.training.step import Recipe

# What fraction of the peak the executed FLOPs are taken to reach, recomputation included. Published
# runs of dense models of 7B to 70B reach these model FLOPs, with up to a third recomputed on top:
# v5p 54 to 72% and v6e 46% (MaxText's README and tpu-recipes), H100 39% (torchtitan, 8B) and H200
# 51% (MaxText, 70B). For the other chips nothing of the kind was found.
EFFICIENCIES = {
    "v5p": {"slow": 0.45, "fast": 0.75},
    "v6e": {"slow": 0.40, "fast": 0.65},
    "h100": {"slow": 0.35, "fast": 0.60},
    "h200": {"slow": 0.35, "fast": 0.65},
}
_UNPUBLISHED = {"slow": 0.35, "fast": 0.65}

# To keep everything costs memory traffic: with remat none a step took 1.16 times that of dots
# (docs/benchmarks.md; on a CPU, nothing is published for accelerators). The other policies differ
# in what they recompute, which is counted, and have no factor: none is published or measured.
_POLICY_FACTORS = {"none": 0.86}

# Of the rate of links and network what the collectives of GPUs reach in the slow case; NCCL's own
# tests show 70 to 90%.
_SLOW_SHARE_OF_LINKS = 0.7

# The mesh axes over which matrices are gathered, see llada_jax.cluster.sharding.RULES.
_OF_PARAMETERS = ("fsdp", "sequence")

# Gbit/s of each GPU's adapter to the network between hosts: that of the usual H100 and H200 hosts.
NETWORK_GBPS = 400.0


def efficiency_of(machines: Slice, remat: str) -> dict[str, float]:
    """Returns the share of the peak that the executed FLOPs reach, {"slow", "fast"}."""
    found = EFFICIENCIES.get(machines.accelerator.name, _UNPUBLISHED)
    return {case: share * _POLICY_FACTORS.get(remat, 1.0) for case, share in found.items()}


def estimate_run(
    recipe: Recipe,
    workload: Workload,
    shape: dict[str, int],
    machines: Slice,
    num_slices: int,
    *,
    network_gbps: float = NETWORK_GBPS,
) -> dict:
    """Returns the estimate of a run as nested dicts of plain values, ready for JSON.

    Bytes and FLOPs are those of one device and one step unless the key says otherwise.

    Args:
        recipe: a recipe for a mesh of any shape, because only its arrays' sizes and axes are read.
            `search` makes one and estimates hundreds of meshes from it.
        shape: {mesh axis: size} to estimate for.
        machines: one slice; num_slices: how many of them the data centre network joins.
        network_gbps: Gbit/s of each GPU to other hosts; what joins TPUs is in the table of chips.
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
    rows, tokens = split_of_batch(workload, shape)
    memory = memory_of(recipe, workload, shape)
    traffic = traffic_of(recipe, workload, shape, tokens=tokens, num_slices=num_slices)
    tokens_per_device = B * T / num_devices
    more, less = recomputed_flops(recipe, workload, shape), skipped_flops(recipe, workload, shape)
    executed_flops = tokens_per_device * (flops + more - less)
    efficiency = efficiency_of(machines, workload.remat)
    network = network_gbps * 1e9 / 8
    seconds = step_seconds(
        executed_flops, traffic, shape, machines, num_slices, efficiency=efficiency, network=network
    )
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
        "scored_share": scored_share(recipe, workload, shape),
        "memory": memory,
        "traffic": traffic,
        "other_gradients": other_gradients(recipe, workload, shape),
        "efficiency": efficiency,
        # of GPUs on several hosts; else it plays no part
        "network_gbps": network_gbps if crosses_hosts(machines) else None,
        "intensity": intensity_of(
            recipe,
            machines,
            shape,
            num_slices,
            tokens=tokens,
            tokens_per_slice=B * T // A // num_slices,
            network=network,
        ),
        "seconds_per_step": seconds,
        # Model FLOPs utilisation does not count what is recomputed, as in the PaLM paper: a policy
        # that recomputes less must not look worse. It counts the head at every position, and
        # gradients of frozen matrices.
        "mfu": {case: tokens_per_device * flops / (s * peak_flops) for case, s in seconds.items()},
        "days": {case: s * num_steps / 86400 for case, s in seconds.items()},
        "chip_hours": {case: s * num_steps / 3600 * num_chips for case, s in seconds.items()},
        "replicated": sharding.replicated_by_accident(
            recipe.abstract.params,
            recipe.batch_sharding.mesh,  # type: ignore[arg-type]
        ),
    }


# ---- FLOPs and traffic


def recomputed_flops(recipe: Recipe, workload: Workload, shape: dict[str, int]) -> float:
    """Returns the FLOPs per token that the backward pass repeats.

    The remat policy decides for the layers: "dots" keeps the outputs of products and of attention,
    "attention" repeats the products, "full" repeats both. What is kept of attention saves a kernel
    from running again; the reference multiplies queries and keys once more. The head is repeated
    whenever it runs in pieces, because then no piece's logits are kept. Of several trained passes
    each is repeated as a whole before it is differentiated.
    """
    a, T = recipe.architecture, workload.sequence_length
    head = a.d_model * a.vocab_size
    scored = head * scored_share(recipe, workload, shape)
    projections = 2 * (num_matmul_parameters(a) - head)
    # half of it in a causal network, as in flops_per_token
    per_position = (2 if recipe.objective.mask.causal else 4) * a.num_heads * a.head_dim
    scores = a.num_layers * per_position * T
    again = scores / 2 if recipe.attention == "xla" else 0
    layers = {
        "none": 0,
        "dots": again,
        "attention": again + projections,
        "full": scores + projections,
    }[workload.remat]
    once = layers + (2 * scored if pieces_of_head(recipe, workload, shape) > 1 else 0)
    num_passes = recipe.objective.trained_passes
    whole = projections + 2 * scored + scores
    return num_passes * once + (num_passes * whole if num_passes > 1 else 0)


def skipped_flops(recipe: Recipe, workload: Workload, shape: dict[str, int]) -> float:
    """Returns the FLOPs per token that `flops_per_token` counts and no device executes: those of
    the head at positions that carry no loss, and those of the gradients of frozen matrices.
    """
    a, objective = recipe.architecture, recipe.objective
    head, share = a.d_model * a.vocab_size, scored_share(recipe, workload, shape)
    trained_layers, trained_head = trained_matrices(recipe)
    frozen = num_matmul_parameters(a) - head - trained_layers + share * (head - trained_head)
    return objective.passes * 6 * head * (1 - share) + objective.trained_passes * 2 * frozen


def trained_matrices(recipe: Recipe) -> tuple[int, int]:
    """Returns how many parameters of the layers' matrices, and of the head, have gradients.

    All have them but those that the objective freezes. Adapters do not count: they are a hundredth
    of the matrices, and whole on every device.
    """
    head = "embed" if recipe.architecture.tie_embeddings else "lm_head"
    sizes = dict.fromkeys((*NUM_INPUT_DIMS, head), 0)
    # Not what `abstract.frozen` lacks: a reference is a frozen copy of what is trained.
    for path, leaf in jax.tree_util.tree_leaves_with_path(recipe.abstract.params):
        # an own objective may keep the parameters in a tree of its own, as in abstract_state
        name = f"/{jax.tree_util.keystr(path, simple=True, separator='/')}"
        for matrix in sizes:
            if name.endswith(f"/{matrix}"):
                sizes[matrix] = math.prod(leaf.shape)
    return sum(sizes.values()) - sizes[head], sizes[head]


def traffic_of(
    recipe: Recipe, workload: Workload, shape: dict[str, int], *, tokens: int, num_slices: int
) -> dict:
    """Returns bytes of whole arrays in whose exchange one device takes part per step, by purpose.

    gather: every weight matrix once per microbatch and pass, forward or backward, in the compute
    dtype, over fsdp and sequence. scatter: its gradient, if it is trained, once per backward pass,
    in the gradient dtype, over the same. The tensor axis splits those of the layers; the head is
    whole (llada_jax.models.token_scores). data: the gradient's shard once per microbatch, over data
    within a slice; dcn: between slices. tensor: activations, twice per forward pass, twice per
    backward pass and once more when a layer is recomputed; and the head and its gradient, split as
    the other axes split them. sequence: what attention brings together of a row, forward, backward
    and recomputed: keys and values of the whole row, or queries, keys, values and outputs of a
    device (llada_jax.models.split_rows). optimizer: a device's momenta, directions and updates of
    Muon, float32, between the layout of the parameters and that of whole layers
    (llada_jax.training.optim.orthogonalized).

    Whole arrays, and not what a link carries: a ring of n devices carries (n - 1) / n of that,
    which is nearly all of it on the meshes in question, and the compiler's programs are counted
    alike.

    Args:
        tokens: of one device in one microbatch.
    """
    a, A, itemsize = recipe.architecture, workload.num_microbatches, recipe.dtype.itemsize
    head = a.d_model * a.vocab_size * itemsize
    matrices = (num_matmul_parameters(a) * itemsize - head) / shape["tensor"] + head
    of_layers, of_head = (n * recipe.gradient_dtype.itemsize for n in trained_matrices(recipe))
    shard = (of_layers + of_head) / shape["tensor"] / parameter_ways(shape)
    backward = recipe.objective.trained_passes
    # of several trained passes each runs forward again before it is differentiated
    forward = backward * (2 if backward > 1 else 1) + recipe.objective.other_passes
    is_repeated = workload.remat in ("attention", "full")
    # The expert axis splits the batch as well, so its devices hold replicas of the weights.
    replicas, ways = shape["data"] * shape["expert"], parameter_ways(shape)
    activations = tokens * a.num_layers * itemsize
    traffic = dict.fromkeys(
        ("gather", "scatter", "data", "dcn", "tensor", "sequence", "optimizer"), 0
    )
    if ways > 1:
        layers_of_device = math.ceil(a.num_layers / ways)
        exchanged = 3 * 4 * _elements_of_muon(recipe) / a.num_layers * layers_of_device
        traffic["optimizer"] = int(exchanged / shape["tensor"])
        traffic["gather"] = int((forward + backward) * A * matrices)
        traffic["scatter"] = int(backward * A * (of_layers / shape["tensor"] + of_head))
    # What has been scattered is all that is left to reduce.
    if replicas > num_slices:
        traffic["data"] = int(A * shard)
    if num_slices > 1:
        traffic["dcn"] = int(A * shard)
    if shape["tensor"] > 1:
        passes = 2 * forward + (3 if is_repeated else 2) * backward
        whole_head = ((forward + backward) * head + backward * of_head) / ways
        traffic["tensor"] = int(A * (activations * a.d_model * passes + whole_head))
    if shape["sequence"] > 1:
        t = shape["tensor"]
        heads = exchanged_heads(
            exchange_of(recipe, shape), a.num_heads // t, a.num_kv_heads // t, shape["sequence"]
        )
        # Also "dots" exchanges again, because it keeps outputs of products alone.
        passes = forward + (1 if workload.remat == "none" else 2) * backward
        traffic["sequence"] = int(A * activations * a.head_dim * heads * passes)
    return traffic


def _elements_of_muon(recipe: Recipe) -> int:
    """Returns how many parameters Muon trains, which are matrices of the layers."""
    is_muon = lambda node: isinstance(node, optax.contrib.MuonState)  # noqa: E731
    nodes = jax.tree.leaves(recipe.abstract.opt_state, is_leaf=is_muon)
    return sum(leaf.size for node in nodes if is_muon(node) for leaf in jax.tree.leaves(node.mu))


def other_gradients(recipe: Recipe, workload: Workload, shape: dict[str, int]) -> int:
    """Returns the bytes of a device's gradients that `traffic_of` leaves out: those of the
    embedding, norms, biases and adapters, float32, once per microbatch.
    """
    matrices = 4 * sum(trained_matrices(recipe)) / shape["tensor"] / parameter_ways(shape)
    everything = sharded_bytes(recipe.abstract.params, shape)
    return workload.num_microbatches * int(everything - matrices)


# ---- time


def crosses_hosts(machines: Slice) -> bool:
    """Whether GPUs talk over a network whose rate no table knows."""
    return machines.accelerator.platform == "gpu" and machines.num_hosts > 1


def bandwidth(
    machines: Slice, shape: dict[str, int], *axes: str, network: float
) -> dict[str, float]:
    """Returns the byte/s at which an array is gathered or scattered over neighbouring mesh axes.

    TPUs. fast: on all links of a device. slow: on those of one axis of the torus, which is what a
    collective gets that the compiler could not spread over the axes.

    GPUs. Within a host, NVLink. Where an axis leaves the host, each of its devices in a host brings
    in its share of the array over its own network adapter, and NVLink hands it on, so that the
    slower of the two counts. slow: 70% of that.

    Args:
        shape: {mesh axis: size}; the last axes are those of neighbouring devices.
        network: byte/s of one GPU to other hosts.
    """
    chip = machines.accelerator
    # The table counts both directions; what is sent has only one.
    whole = chip.link_bandwidth / 2 / chip.devices_per_chip
    if chip.platform == "tpu":
        return {"fast": whole, "slow": whole / len(machines.topology)}
    names, size = list(shape), math.prod(shape[axis] for axis in axes)
    stride = math.prod(shape[other] for other in names[names.index(axes[-1]) + 1 :])
    # devices of a group that share a host
    together = max(1, machines.chips_per_host // stride)
    rate = whole if together >= size else min(whole, together * network)
    return {"fast": rate, "slow": _SLOW_SHARE_OF_LINKS * rate}


def between_slices(chip: Accelerator) -> float:
    """Returns the byte/s of a device to other TPU slices."""
    return chip.dcn_bandwidth / chip.devices_per_chip


def step_seconds(
    executed_flops: float,
    traffic: dict,
    shape: dict[str, int],
    machines: Slice,
    num_slices: int,
    *,
    efficiency: dict[str, float],
    network: float,
) -> dict[str, float]:
    """Returns the time of a step under a fast and a slow set of assumptions.

    fast: all communication is hidden behind computing unless it takes longer. A gather or scatter
    of V bytes takes V / bandwidth, an all-reduce twice that. slow: nothing is hidden, and TPUs do
    gathers and scatters as all-reduces, as libtpu does over whole slices. One number between the
    two would claim more than shapes can show.

    Args:
        efficiency, network: see `efficiency_of` and `bandwidth`.
    """
    # (purpose, its axes, whether each byte goes around twice)
    purposes = (
        ("gather", _OF_PARAMETERS, False),
        ("scatter", _OF_PARAMETERS, False),
        ("optimizer", _OF_PARAMETERS, False),
        ("sequence", ("sequence",), False),
        ("data", ("data",), True),
        ("tensor", ("tensor",), True),
    )
    chip, seconds = machines.accelerator, {}
    for case in ("slow", "fast"):
        exchanged = 0.0
        for purpose, axes, is_reduced in purposes:
            is_double = is_reduced or (case == "slow" and chip.platform == "tpu")
            rate = bandwidth(machines, shape, *axes, network=network)[case]
            exchanged += (2 if is_double else 1) * traffic[purpose] / rate
        if num_slices > 1:
            # A ring of slices: each gradient goes around once to be summed and once to be known.
            sent = 2 * (num_slices - 1) / num_slices * traffic["dcn"]
            exchanged += sent / between_slices(chip)
        computed = executed_flops / (efficiency[case] * chip.peak_flops_per_device)
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
    network: float,
) -> dict:
    """Returns how many tokens there are, and how many are needed to hide the gathers of weights.

    A layer of P parameters takes 6 P tokens FLOPs and moves 3 * 2 P bytes over fsdp (where weights
    and gradients are bfloat16), so that computing takes longer above peak / bandwidth tokens per
    device (the "How to Scale Your Model" book, chapter on training). With several slices, 2 * 2 P
    bytes of gradient go over the data centre network against 6 P tokens of FLOPs on a slice. A
    frozen layer has no gradient: 4 P tokens FLOPs, and 2 * 2 P bytes over fsdp alone.
    """
    chip = machines.accelerator
    links = bandwidth(machines, shape, *_OF_PARAMETERS, network=network)
    peak = chip.peak_flops_per_device
    # against those of bfloat16
    gathered, reduced = recipe.dtype.itemsize / 2, recipe.gradient_dtype.itemsize / 2
    trained = sum(trained_matrices(recipe)) / num_matmul_parameters(recipe.architecture)
    exchanged = (2 * gathered + trained * reduced) / (2 + trained)
    limits = {
        "tokens_per_device": tokens,
        "needed_on_all_links": exchanged * peak / links["fast"] / shape["tensor"],
        "needed_on_one_axis": exchanged * peak / links["slow"] / shape["tensor"],
    }
    if num_slices > 1:
        limits["tokens_per_slice"] = tokens_per_slice
        reduced *= 3 * trained / (2 + trained)
        limits["needed_between_slices"] = (
            reduced * chip.peak_flops_per_device / between_slices(chip)
        )
    return limits

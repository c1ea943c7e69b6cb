"""The memory that a training step needs, from its shapes, and the remat policy that fits into it.

The state is exact; what a step adds to it is an estimate (docs/plan.md compares it with the
compilers' numbers).
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from llada_jax.models.split_rows import exchange_for
from llada_jax.models.transformer import num_matmul_parameters

# The policies among which "auto" chooses, from the fastest to the one that takes the least memory.
# Not "none": to write every intermediate result and to read it again takes longer than to compute
# the cheap ones once more.
AUTO_REMATS = ("dots", "attention", "full")

# The compilers' peak was up to 20% above the estimate (docs/plan.md).
AUTO_SHARE = 0.8


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


def memory_of(parts: Any, workload: Workload, shape: dict[str, int]) -> dict:
    """Returns bytes of one device: the state (exact), and estimates of what a step adds to it.

    Counted in elements per token and layer, with the letters of llada_jax; N, K and F stand for the
    share of one device, that is N H, K H and F divided by the tensor axis. S: scores of one token
    (N T; 0 where a kernel never holds them).

    Saved by the forward pass, by remat policy:
        full:       D                               the layer's input
        attention:  D + N                           and the output of attention
        dots:       3 D + 2 N + 2 K + 2 F           and the outputs of all products
        none:       5 D + 3 N + 3 K + 4 F + 3 S     and norms, rotary embeddings, activations;
                    where layers are a loop, out of which XLA takes nothing: see `_kept_by_a_loop`
    At work in the backward pass of one layer, at the same time as all that was saved:
        4 D + 3 N + 2 K + 4 F + 3 S, and the layer's weights twice (gathered, and their gradient,
        each in its own dtype). Where devices gather keys and values (llada_jax.models.split_rows),
        4 K times the devices that share a row: both and their gradients.
    At work in the head, before any layer: logits of one piece of the vocabulary's product and their
        gradient, float32, of the positions that are scored (`scored_share`), and the head's input
        and its gradient.
    The larger of the last two counts, because they never exist together.

    Args:
        parts: a Recipe, or what is read of one: architecture, abstract, model, objective,
            attention, dtype and gradient_dtype.
        shape: {mesh axis: size}.
    """
    a, itemsize = parts.architecture, parts.dtype.itemsize
    _, tokens = split_of_batch(workload, shape)
    D, t = a.d_model, shape["tensor"]
    N, K, F = a.num_heads * a.head_dim / t, a.num_kv_heads * a.head_dim / t, a.d_ff / t
    # Only the reference attention holds the scores of all pairs of positions.
    S = a.num_heads / t * workload.sequence_length if parts.attention == "xla" else 0
    saved = {
        "full": D,
        "attention": D + N,
        "dots": 3 * D + (2 * N + 2 * K) + 2 * F,
        "none": 5 * D + (3 * N + 3 * K) + 4 * F + 3 * S,
    }[workload.remat]
    if workload.remat == "none" and not parts.model.is_unrolled:
        saved = _kept_by_a_loop(parts, shape, D=D, N=N, K=K, F=F, S=S)
    # Gradients are float32, as the parameters are. With several microbatches a second copy holds
    # the sum while the next part is computed, and so it is with several passes.
    gradients = sharded_bytes(parts.abstract.params, shape)
    gradients *= 1 + (workload.num_microbatches > 1) + (parts.objective.trained_passes > 1)
    layer_weights = (num_matmul_parameters(a) - D * a.vocab_size) / a.num_layers / t
    layer_weights *= itemsize + parts.gradient_dtype.itemsize
    share, num_pieces = scored_share(parts, workload, shape), pieces_of_head(parts, workload, shape)
    layer = tokens * itemsize * (4 * D + 3 * N + 2 * K + 4 * F + 3 * S) + layer_weights
    if shape["sequence"] > 1 and exchange_of(parts, shape) == "keys":
        layer += tokens * itemsize * 4 * K * shape["sequence"]
    head = tokens * (share * 2 * 4 * a.vocab_size / t / num_pieces + 2 * 4 * D)
    sizes = {
        "state": sharded_bytes(parts.abstract, shape),
        "gradients": gradients,
        "saved_activations": int(tokens * a.num_layers * saved * itemsize),
        "working": int(max(layer, head)),
    }
    # a part of the state, shown by itself
    frozen = sharded_bytes(parts.abstract.frozen, shape)
    return {**sizes, "peak": sum(sizes.values()), "frozen": frozen}


def _kept_by_a_loop(
    parts: Any, shape: dict[str, int], *, D: float, N: float, K: float, F: float, S: float
) -> float:
    """Returns what the backward pass finds of a token and layer where a loop over the layers
    recomputes nothing, in elements of the compute dtype.

    That is all that differentiation names, whether or not it could be had from something else: what
    norms read and make is float32, and the input of several products is kept for each of them.

    Args:
        parts, shape: see `memory_of`; its docstring has the other letters.
    """
    wide = 4 / parts.dtype.itemsize  # of one float32
    kept = (4 * wide + 5) * D + 3 * N + 2 * K + 6 * F + (wide + 1) * S
    if parts.architecture.qk_norm != "none":
        kept += 3 * wide * (N + K)
    if shape["sequence"] > 1 and exchange_of(parts, shape) == "keys":
        kept += 2 * K * shape["sequence"]
    return kept


def scored_share(parts: Any, workload: Workload, shape: dict[str, int]) -> float:
    """Returns the share of its positions of which a device computes logits, but for rare draws.

    Args:
        parts, shape: see `memory_of`.
    """
    capacity, ways = parts.objective.capacity, _batch_ways(shape)
    rows, _ = split_of_batch(workload, shape)
    # as llada_jax.models.token_scores splits the positions for the head
    length = workload.sequence_length // (shape["sequence"] * shape["tensor"])
    if capacity is None or rows * length == 0:
        return 1.0
    return min(1.0, capacity(rows, length, ways) / (rows * length))


def pieces_of_head(parts: Any, workload: Workload, shape: dict[str, int]) -> int:
    """Returns into how many pieces the head's product is cut; several are computed twice.

    Args:
        parts, shape: see `memory_of`.
    """
    share = scored_share(parts, workload, shape)
    # llada_jax.models.token_scores lets the share be a sixteenth too large for its pieces
    scored = workload.sequence_length * (share * 16 / 17 if share < 1 else 1)
    return math.ceil(scored / workload.nll_chunk)


def sharded_bytes(tree: Any, shape: dict[str, int]) -> int:
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


def parameter_ways(shape: dict[str, int]) -> int:
    """Returns over how many devices a matrix is split before the tensor axis splits it."""
    return shape["fsdp"] * shape["sequence"]


def exchange_of(parts: Any, shape: dict[str, int]) -> str:
    """Returns how the devices that share a row attend to it, see
    llada_jax.models.split_rows.exchange_for.

    Args:
        parts, shape: see `memory_of`.
    """
    a = parts.architecture
    return exchange_for(
        parts.attention,
        parts.objective.mask,
        num_heads=a.num_heads // shape["tensor"],
        num_kv_heads=a.num_kv_heads // shape["tensor"],
        num_parts=shape["sequence"],
    )


def split_of_batch(workload: Workload, shape: dict[str, int]) -> tuple[int, int]:
    """Returns the (rows, tokens) of one device in one microbatch."""
    rows = workload.batch_size // workload.num_microbatches // _batch_ways(shape)
    return rows, rows * workload.sequence_length // shape["sequence"]


def _batch_ways(shape: dict[str, int]) -> int:
    """Returns over how many devices the rows of a batch are split."""
    return shape["data"] * shape["fsdp"] * shape["expert"]


def choose_remat(
    parts: Any, workload: Workload, shape: dict[str, int], usable_bytes: int | None
) -> str:
    """Returns the remat policy that "auto" stands for: the fastest that is estimated to fit.

    A function of the config, the mesh and the kind of device alone, so that all processes choose
    alike and a restart chooses again what the run began with.

    Args:
        parts, shape: see `memory_of`.
        usable_bytes: memory of a device; None where it is not known, as on CPUs, whose memory is
            large for what they can train: the fastest.
    """
    for remat in AUTO_REMATS[:-1]:
        if usable_bytes is None:
            return remat
        peak = memory_of(parts, workload._replace(remat=remat), shape)["peak"]
        if peak < AUTO_SHARE * usable_bytes:
            return remat
    return AUTO_REMATS[-1]

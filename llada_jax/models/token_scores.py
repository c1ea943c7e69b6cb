"""How well hidden vectors predict tokens: the head and the cross-entropy, without ever holding the
logits of all positions, and without those of positions that carry no loss.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from llada_jax.cluster.sharding import axis_size, constrain, spec
from llada_jax.models.products import project

# Logical axes of the two leading dims of hidden vectors: rows and positions of the batch, or
# devices and the positions of one device.
ROWS = ("act_batch", "act_head_position")
DEVICES = ("act_device", None)
# Logits that a device holds at a time where `nll_chunk` does not decide: 1 GiB of float32.
MOST_LOGITS = 1 << 28
# Elements of bfloat16 in 16 bytes.
ALIGNED = 8
# The scope of the condition under which the other positions are scored too.
SELDOM = "seldom"


class TokenScores(NamedTuple):
    """How well a network predicts the targets of a batch; zero and False outside of `where`."""

    nll_BT: Array  # float32: -log p(target) in nats
    is_correct_BT: Array  # bool: no token scores higher than the target


def token_scores(
    x_BTD: Array,
    targets_BT: Array,
    where_BT: Array,
    kernel_DV: Array,
    *,
    dtype: Any,
    gradient_dtype: Any,
    nll_chunk: int | None,
    capacity: Callable[[int, int, int], int] | None,
) -> TokenScores:
    """Returns the scores of the targets at the positions `where_BT`.

    With a `capacity`, every device moves its positions in `where_BT` to the front and scores the
    first `capacity(...)`; the others are scored only when a device has more. What is computed is
    the same in either case, and no position leaves its device: the one thing that devices must
    agree on is whether any device has more, because they go through the rest together.

    Args:
        x_BTD: hidden vectors.
        kernel_DV: float32 [D, V], what they are multiplied by.
        dtype, gradient_dtype, nll_chunk, capacity: see llada_jax.models.transformer.Transformer.
    """
    x_BTD = constrain(x_BTD, *ROWS, "act_embed")
    B, T = targets_BT.shape
    batch_ways, position_ways = (_ways(name) for name in ROWS)
    local = B // batch_ways, T // position_ways
    num_local = local[0] * local[1]
    if nll_chunk is None:
        nll_chunk = max(1, T * MOST_LOGITS // (num_local * kernel_DV.shape[1]))
    score = functools.partial(_score, dtype=dtype, gradient_dtype=gradient_dtype)
    # Where the mesh does not divide a batch, XLA pads it, and shard_map refuses it.
    is_even = num_local * batch_ways * position_ways == B * T
    room = capacity(*local, batch_ways) if capacity and is_even else num_local
    if room >= num_local:
        num_pieces = -(-T // nll_chunk)
        return _where(where_BT, score(x_BTD, kernel_DV, targets_BT, num_pieces, names=ROWS))

    x_GPD, targets_GP, where_GP = (_by_device(array) for array in (x_BTD, targets_BT, where_BT))
    order_GP = _locally(lambda where: jnp.argsort(~where, axis=1, stable=True))(where_GP)
    rank_GP = _locally(lambda order: jnp.argsort(order, axis=1))(order_GP)

    def part(
        first: int,
        x_GPD: Array,
        kernel_DV: Array,
        targets_GP: Array,
        index_GC: Array,
        inverse: Array,
    ) -> TokenScores:
        """Returns the scores of the positions `index_GC`, which are `first` and following."""
        return score(
            pick(x_GPD, index_GC, inverse - first),
            kernel_DV,
            pick(targets_GP, index_GC, inverse - first),
            # Up to a sixteenth more, or half of the positions and a little would take as many
            # pieces as all of them where these take two.
            num_pieces=-(-16 * T * index_GC.shape[1] // (17 * nll_chunk * num_local)),
            names=DEVICES,
        )

    scores = part(0, x_GPD, kernel_DV, targets_GP, order_GP[:, :room], rank_GP)
    rest = _seldom(
        functools.partial(part, room),
        jnp.any(jnp.sum(where_GP, axis=1) > room),
        x_GPD,
        kernel_DV,
        (targets_GP, order_GP[:, room:], rank_GP),
    )

    def back(first_GC: Array, rest_GC: Array) -> Array:
        in_order_GP = jnp.concatenate([first_GC, rest_GC], axis=1)
        return _by_row(pick(in_order_GP, rank_GP, order_GP), local)

    return _where(where_BT, jax.tree.map(back, scores, rest))


def _where(where_BT: Array, scores: TokenScores) -> TokenScores:
    return TokenScores(jnp.where(where_BT, scores.nll_BT, 0.0), scores.is_correct_BT & where_BT)


class _Head(NamedTuple):
    """How logits are computed: in how many pieces of the vocabulary, for positions of which logical
    axes, and in which dtypes.
    """

    num_pieces: int
    names: tuple[str, str | None]
    dtype: Any
    gradient_dtype: Any


def _score(
    x_RCD: Array,
    kernel_DV: Array,
    targets_RC: Array,
    num_pieces: int,
    *,
    names: tuple[str, str | None],
    dtype: Any,
    gradient_dtype: Any,
) -> TokenScores:
    """Returns the scores of all positions of an array [R, C], of the logical axes `names`.

    The vocabulary is cut into n pieces; n is such that the logits of a piece are no more than the
    whole logits of `nll_chunk` positions per row; they are computed again in the backward pass.
    Pieces of the vocabulary and not chunks of the positions, because the gradient of a piece of the
    head is then complete when its turn is over: it is reduced over the devices once per step, in
    pieces, and neither the whole kernel nor its whole gradient is ever on one device. The tensor
    axis splits positions here, or the gradient of every position would be reduced once per piece.
    """
    most = max(1, kernel_DV.shape[1] // _ways("vocab"))
    head = _Head(min(num_pieces, most), names, dtype, gradient_dtype)
    return _scores(head, x_RCD, kernel_DV, targets_RC)


# A rule of our own for the gradient: it knows the normalizer of the whole vocabulary, so that each
# piece's logits are read once in the backward pass. Derived from the forward pass, it would reduce
# each piece to its maximum and its sum once more before.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scores(head: _Head, x_RCD: Array, kernel_DV: Array, targets_RC: Array) -> TokenScores:
    return _forward(head, x_RCD, kernel_DV, targets_RC)[0]


def _forward(
    head: _Head, x_RCD: Array, kernel_DV: Array, targets_RC: Array
) -> tuple[TokenScores, tuple]:
    def reduced(logits_RCV: Array, token_C: Array) -> tuple[Array, Array, Array]:
        """Returns three arrays [R, C] for one piece of the vocabulary: logsumexp, logit of the
        target (0 when it is in another piece), and largest logit.
        """
        is_target_RCV = token_C == targets_RC[..., None]
        target_logit_RC = jnp.sum(jnp.where(is_target_RCV, logits_RCV, 0.0), axis=-1)
        best_RC = logits_RCV.max(axis=-1)
        sum_RC = jnp.sum(jnp.exp(logits_RCV - best_RC[..., None]), axis=-1)
        return best_RC + jnp.log(sum_RC), target_logit_RC, best_RC

    V = kernel_DV.shape[1]
    kernel_nDC, token_nC = _pieces(head, kernel_DV), _tokens(head, V)
    logits_RCV = None
    if head.num_pieces == 1:
        logits_RCV = _logits(head, x_RCD, kernel_nDC[0], token_nC[0], V)
        normalizer_RC, target_logit_RC, best_RC = reduced(logits_RCV, token_nC[0])
    else:

        def piece(kernel_and_tokens: tuple[Array, Array]) -> tuple[Array, Array, Array]:
            kernel_DC, token_C = kernel_and_tokens
            return reduced(_logits(head, x_RCD, kernel_DC, token_C, V), token_C)

        normalizers_nRC, target_logits_nRC, bests_nRC = jax.lax.map(piece, (kernel_nDC, token_nC))
        normalizer_RC = jax.nn.logsumexp(normalizers_nRC, axis=0)
        target_logit_RC, best_RC = target_logits_nRC.sum(axis=0), bests_nRC.max(axis=0)
    scores = TokenScores(normalizer_RC - target_logit_RC, target_logit_RC >= best_RC)
    return scores, (x_RCD, kernel_DV, targets_RC, normalizer_RC, logits_RCV)


def _backward(head: _Head, saved: tuple, grads: TokenScores) -> tuple[Array, Array, None]:
    x_RCD, kernel_DV, targets_RC, normalizer_RC, logits_RCV = saved
    V = kernel_DV.shape[1]
    kernel_nDC, join = jax.vjp(functools.partial(_pieces, head), kernel_DV)
    token_nC = _tokens(head, V)

    def pull(kernel_DC: Array, token_C: Array, saved_RCV: Array | None) -> tuple[Array, Array]:
        """Returns the gradients of x and of one piece of the kernel."""
        computed_RCV, back = jax.vjp(
            lambda x, kernel: _logits(head, x, kernel, token_C, V), x_RCD, kernel_DC
        )
        p_RCV = jnp.exp(
            (computed_RCV if saved_RCV is None else saved_RCV) - normalizer_RC[..., None]
        )
        is_target_RCV = token_C == targets_RC[..., None]
        return back((p_RCV - is_target_RCV) * grads.nll_BT[..., None])

    if head.num_pieces == 1:
        grad_x_RCD, grad_DC = pull(kernel_nDC[0], token_nC[0], logits_RCV)
        return grad_x_RCD, join(grad_DC[None])[0], None

    def add(sum_RCD: Array, piece: tuple[Array, Array]) -> tuple[Array, Array]:
        grad_x_RCD, grad_DC = pull(*piece, None)
        return sum_RCD + grad_x_RCD.astype(jnp.float32), grad_DC

    # float32, because it is a sum over the pieces
    zeros_RCD = constrain(jnp.zeros(x_RCD.shape, jnp.float32), *head.names, None)
    sum_RCD, grad_nDC = jax.lax.scan(add, zeros_RCD, (kernel_nDC, token_nC))
    return sum_RCD.astype(x_RCD.dtype), join(grad_nDC)[0], None


_scores.defvjp(_forward, _backward)


def _pieces(head: _Head, kernel_DV: Array) -> Array:
    """Returns the pieces of the kernel, [n, D, V / n].

    Where there are several, tokens that do not exist make them alike and of a width with which
    their rows begin at multiples of 16 bytes, or GPUs would fall back to kernels of a third of the
    speed.
    """
    if head.num_pieces == 1:
        return kernel_DV[None]
    # in the dtype that the gradient is to have
    kernel_DV = kernel_DV.astype(head.gradient_dtype or head.dtype)
    return _cut(head, jnp.pad(kernel_DV, ((0, 0), (0, _num_padding(head, kernel_DV.shape[1])))))


def _tokens(head: _Head, V: int) -> Array:
    """Returns the token of each column of the pieces, [n, V / n]; from V on, there is none."""
    return _cut(head, jnp.arange(V + _num_padding(head, V)))


def _cut(head: _Head, array: Array) -> Array:
    """Returns the pieces of an array [..., V], [n, ..., V / n].

    Each device cuts its own part of V, which stays where it is, and a piece of it lies together in
    memory: if every n-th token were in a piece, GPUs would read and write the kernel, its gradient
    and their optimizer state in strides.
    """
    n = head.num_pieces
    if n == 1:
        return array[None]
    others = array.shape[:-1]
    cut = jnp.moveaxis(array.reshape(*others, _ways("vocab"), n, -1), -2, 0)
    return cut.reshape(n, *others, -1)


def _num_padding(head: _Head, V: int) -> int:
    """Returns how many tokens that do not exist make the pieces alike and aligned."""
    n = head.num_pieces
    return 0 if n == 1 else -V % (n * _ways("vocab") * ALIGNED)


def _logits(head: _Head, x_RCD: Array, kernel_DC: Array, token_C: Array, V: int) -> Array:
    """Returns the float32 logits of one piece; those of tokens from V on are the least."""
    with jax.named_scope("head"):
        logits_RCV = project(
            x_RCD.astype(head.dtype),
            kernel_DC,
            out_dtype=jnp.float32,
            gradient_dtype=head.gradient_dtype,
            is_split=_ways("vocab") > 1 and head.names == ROWS,
        )
        if _num_padding(head, V):
            # added as a vector: a choice between whole arrays would write one of them
            logits_RCV += jnp.where(token_C < V, 0.0, jnp.finfo(jnp.float32).min)
        return constrain(logits_RCV, *head.names, None)


def _seldom(
    function: Callable, is_needed: Array, x_GPD: Array, kernel_DV: Array, others: tuple
) -> TokenScores:
    """Returns function(x_GPD, kernel_DV, *others) where it is needed, zeros elsewhere.

    What the function saves for its gradient would be a result of the condition: a copy of x and of
    the kernel, made of zeros in nearly every step. The gradient therefore begins from the arguments
    again.
    """

    # by this name the reader of compiled programs knows what a step does not do
    def if_needed(is_needed: Array, compute: Callable) -> Any:
        zeros = jax.tree.map(
            lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(compute)
        )
        with jax.named_scope(SELDOM):
            return jax.lax.cond(is_needed, compute, lambda: zeros)

    @jax.custom_vjp
    def run(is_needed: Array, x_GPD: Array, kernel_DV: Array, others: tuple) -> TokenScores:
        return if_needed(is_needed, lambda: function(x_GPD, kernel_DV, *others))

    def forward(*arguments: Any) -> tuple[TokenScores, tuple]:
        return run(*arguments), arguments

    def backward(arguments: tuple, gradient: TokenScores) -> tuple:
        is_needed, x_GPD, kernel_DV, others = arguments

        def compute() -> tuple[Array, Array]:
            nll_of = lambda x, kernel: function(x, kernel, *others).nll_BT  # noqa: E731
            return jax.vjp(nll_of, x_GPD, kernel_DV)[1](gradient.nll_BT)

        return None, *if_needed(is_needed, compute), None

    run.defvjp(forward, backward)
    return run(is_needed, x_GPD, kernel_DV, others)


# ---- positions of one device


def _ways(name: str) -> int:
    """Returns into how many parts the mesh splits a logical axis."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else axis_size(mesh, name)


def _locally(function: Callable, in_names: tuple = DEVICES, out_names: tuple = DEVICES) -> Callable:
    """Returns the function of arrays with two leading dims as each device applies it to its own
    part: where it sorts or gathers, the partitioner would not see that nothing leaves the device.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return function
    return jax.shard_map(
        function, in_specs=spec(in_names), out_specs=spec(out_names), check_vma=False
    )


def _by_device(array_BT: Array) -> Array:
    """Returns the positions of each device in one row: [B, T, ...] as [devices, B T / devices,
    ...].
    """
    flat = _locally(lambda part: part.reshape(1, -1, *part.shape[2:]), ROWS, DEVICES)
    return flat(array_BT)


def _by_row(array_GP: Array, local: tuple[int, int]) -> Array:
    """Undoes _by_device; `local` are the rows and positions of one device."""
    return _locally(lambda part: part.reshape(local), DEVICES, ROWS)(array_GP)


@jax.custom_vjp
def pick(array: Array, index_GC: Array, inverse_GP: Array) -> Array:
    """Returns array[g, index[g, c]], [G, C, ...] of [G, P, ...], each device by itself.

    Args:
        index_GC: each of its places at most once in a row.
        inverse_GP: where in `index_GC` each place stands; outside of 0 ... C - 1 where nowhere. The
            gradient is gathered by it, because accelerators scatter much more slowly.
    """
    del inverse_GP
    return _locally(_take)(array, index_GC)


def _take(array: Array, index_GC: Array) -> Array:
    index = index_GC.reshape(*index_GC.shape, *[1] * (array.ndim - 2))
    return jnp.take_along_axis(array, index, axis=1)


def _pick_forward(
    array: Array, index_GC: Array, inverse_GP: Array
) -> tuple[Array, tuple[Array, Array]]:
    return pick(array, index_GC, inverse_GP), (index_GC, inverse_GP)


def _pick_backward(saved: tuple[Array, Array], gradient: Array) -> tuple[Array, None, None]:
    index_GC, inverse_GP = saved
    is_picked_GP = (inverse_GP >= 0) & (inverse_GP < index_GC.shape[1])

    def take(gradient: Array, inverse_GP: Array, is_picked_GP: Array) -> Array:
        taken = _take(gradient, jnp.where(is_picked_GP, inverse_GP, 0))
        return jnp.where(is_picked_GP.reshape(*inverse_GP.shape, *[1] * (taken.ndim - 2)), taken, 0)

    return _locally(take)(gradient, inverse_GP, is_picked_GP), None, None


pick.defvjp(_pick_forward, _pick_backward)

"""What an objective is: all that training and evaluation ask of it, in one record.

No other code asks which objective it is by name; it reads the mask, the bound and the batch here.
docs/extend.md shows how to bring an objective of your own.
"""

import dataclasses
from collections.abc import Callable, Mapping

from jax import Array

from llada_jax.data.batch import FIELDS, Field
from llada_jax.masks import BIDIRECTIONAL, Mask


# Compared and hashed by identity, because objectives are static arguments of jitted functions: two
# records with equal fields would hold closures that Python cannot compare.
@dataclasses.dataclass(frozen=True, eq=False)
class Objective:
    """A training objective with its settings bound.

    `loss` and `bound` have one signature:

        loss(nll_fn, params, batch, key, row_B, *, num_rows, step, frozen)
            -> loss_sum, count, {metric: (sum, count)}

    They return sums and counts, and leave the division to the caller, which adds up the parts of
    a batch first. All of these are float32; loss_sum and count are scalars, the two arrays of a
    metric are scalars or vectors of one length.

    Arguments of `loss` and `bound`:
        nll_fn: (params, noisy_BT, targets_BT, where_BT, segment_ids_BT, positions_BT) ->
            nll_BT float32 in nats, 0 where `where_BT` is False, and is_correct_BT bool
            (llada_jax.models.transformer.TokenScores).
        params: the parameters that are trained; gradients are taken with respect to these alone.
        batch: {name: array} with the fields of `batch` below.
        key: the source of all randomness, a function of the seed and the step.
        row_B: int32, the rows' numbers in the global batch of `num_rows` rows, so that a part of a
            batch draws what it would draw within the whole.
        num_rows: of the global batch.
        step: int32 scalar, traced: the number of the step from 0, so that a weight can be annealed.
            A bound on held-out text is computed with step 0, and must not depend on it.
        frozen: the parameters that are neither differentiated nor updated; {} by default.

    Fields:
        loss: what is minimised. Its metrics contain "loss" and `bound_name`.
        bound: what scores held-out text. Its metrics contain `bound_name`.
        bound_name: the metric in nats per token that is reported as bits per byte: "nelbo" for an
            upper bound on -log p(x), "nll" for its exact value.
        mask: what the network's attention may see.
        batch: the arrays that the objective reads.
        split_parameters: (network's parameters, key) -> params, frozen. None trains all parameters
            and freezes none. It is called once, when the run begins, on fresh parameters or on
            those of config.checkpoint.init_from.
        network: (params, frozen) -> the parameters of the network that is sampled, evaluated and
            exported. By default these are `params`.
        has_reference: whether `frozen` is what `params` were when the run began, as
            `start_as_reference` makes it. Under adapters, which begin as zeros, these zeros take
            its place.
        heldout: further metrics of `bound` that held-out evaluations of a run report.
        copies: how many consecutive rows of a training batch hold one record, as in row 2 i and row
            2 i + 1; batch_size counts them all.
        capacity: (rows, length, ways) -> how many tokens of this many consecutive rows, one of
            `ways` parts of a training batch, are in `where_BT`, but for rare draws: logits of the
            other positions are left out, see llada_jax.models.token_scores. None: that may be all.
        trained_passes, other_passes: how often `loss` calls nll_fn for gradients and without, for
            the arithmetic of time and memory.
    """

    loss: Callable
    bound: Callable
    bound_name: str
    mask: Mask = BIDIRECTIONAL
    batch: Mapping[str, Field] = dataclasses.field(default_factory=lambda: FIELDS)
    split_parameters: Callable | None = None
    network: Callable = lambda params, frozen: params
    has_reference: bool = False
    heldout: tuple[str, ...] = ()
    copies: int = 1
    trained_passes: int = 1
    capacity: Callable[[int, int, int], int] | None = None
    other_passes: int = 0

    @property
    def passes(self) -> float:
        """The work of `loss` in forward and backward passes of the network; a forward pass is a
        third of both.
        """
        return self.trained_passes + self.other_passes / 3


def start_as_reference(params: dict, key: Array) -> tuple[dict, dict]:
    """An Objective.split_parameters: all parameters are trained, and those that the run begins with
    are kept.
    """
    del key
    return params, params

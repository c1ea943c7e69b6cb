"""How many floating-point operations a training step takes, from the sizes of the model."""


def flops_per_token(
    num_matmul_params: int,
    num_layers: int,
    d_attention: int,
    sequence_length: int,
    *,
    causal: bool = False,
) -> float:
    """Returns the floating-point operations of one training step for one token: 6 N + 12 L d T.

    A matrix of n entries costs 2 n per token in the forward pass (a multiplication and an addition
    for each entry) and twice that in the backward pass (gradients of its input and of itself): 6 N
    over all matrices, which include the head but not the embedding, which is only looked up. Scores
    and weighted values are two products of T x d in each of the L layers: 2 * 2 d T forward and
    twice that backward, 12 L d T in all. A masked diffusion model attends to all T positions, which
    is the full count. The head is counted at every position too, although masked diffusion computes
    logits of little more than half of them (llada_jax.models.token_scores): what it leaves out
    shows as a higher utilisation. Recomputation is not counted, so that this over the peak is model
    FLOP utilisation (PaLM, arXiv 2204.02311, appendix B).

    Args:
        num_matmul_params: N, see llada_jax.models.transformer.num_matmul_parameters.
        num_layers: L.
        d_attention: d, query heads times head width.
        sequence_length: T, in tokens.
        causal: take half of the attention, as is usual for autoregressive models.
    """
    attention = 12 * num_layers * d_attention * sequence_length
    return float(6 * num_matmul_params + (attention / 2 if causal else attention))

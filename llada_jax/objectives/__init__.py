"""Training objectives: each returns sums and counts and leaves the division to the caller.

    objective(nll_fn, params, batch, key, row_B, *, num_rows, ...) -> loss_sum, count, {name: (sum,
    count)}

`nll_fn(params, noisy_BT, targets_BT, where_BT, segment_ids_BT, positions_BT)` returns TokenScores;
`row_B` are the rows' numbers in the global batch of `num_rows`, so that a part of a batch draws
what it would draw within the whole.
"""

"""Writes rows of a source whose entropy is known (configs/known_source.py), and the entropy.

    python configs/known_source/make_rows.py runs/known_source

A row is a second-order Markov chain of 32 symbols over an alphabet of 32, and a copy of its first
31 symbols, so that it has 64 tokens with the end-of-text token that prepare appends to a line. The
first two symbols are uniform. After the symbols a and b, c follows with probability
(A[a, c] + B[b, c]) / 2, where every row of the tables A and B is a draw from a symmetric Dirichlet
distribution.

With a table P[a, b, c] of such draws, a single symbol says next to nothing about its neighbours,
and a network that has learned the copy learns nothing else for more than a thousand steps.
"""

import json
import sys
from pathlib import Path

import numpy as np

NUM_ROWS, HALF = 420_000, 32
ALPHABET = "abcdefghijklmnopqrstuvwxyz012345"
# Of the 32 symbols about 10 (exp of the entropy) follow a pair.
CONCENTRATION = 0.1


def transitions(num_symbols: int) -> np.ndarray:
    """Returns P[a, b, c], the probability that c follows a and b, float64 [S, S, S]."""
    alpha_S = np.full(num_symbols, CONCENTRATION)
    a_SS, b_SS = np.random.default_rng(0).dirichlet(alpha_S, size=(2, num_symbols))
    return (a_SS[:, None, :] + b_SS[None, :, :]) / 2


def entropy(table_SSS: np.ndarray, length: int) -> float:
    """Returns the entropy in nats of a chain of `length` >= 2 symbols.

    It is exact: the distribution over the states of the chain, which are pairs of neighbours, is
    carried from place to place.
    """
    num_symbols = len(table_SSS)
    log_table_SSS = np.log(np.where(table_SSS > 0, table_SSS, 1.0))
    next_entropy_SS = -(table_SSS * log_table_SSS).sum(axis=2)
    pair_SS = np.full((num_symbols, num_symbols), num_symbols**-2.0)
    total = 2 * np.log(num_symbols)
    for _ in range(length - 2):
        total += (pair_SS * next_entropy_SS).sum()
        pair_SS = np.einsum("ab,abc->bc", pair_SS, table_SSS)
    return float(total)


def chains(
    table_SSS: np.ndarray, num_rows: int, length: int, rng: np.random.Generator
) -> np.ndarray:
    """Returns draws of the chain, int64 [num_rows, length]."""
    num_symbols = len(table_SSS)
    cumulative_SSS = table_SSS.cumsum(axis=2)
    rows_BT = rng.integers(num_symbols, size=(num_rows, length))
    for i in range(2, length):
        cumulative_BS = cumulative_SSS[rows_BT[:, i - 2], rows_BT[:, i - 1]]
        symbol_B = (cumulative_BS < rng.random((num_rows, 1))).sum(axis=1)
        # By rounding, the last sum can be less than the number that was drawn.
        rows_BT[:, i] = symbol_B.clip(max=num_symbols - 1)
    return rows_BT


def main(directory: str, num_rows: int = NUM_ROWS) -> None:
    home, rng = Path(directory), np.random.default_rng(1)
    home.mkdir(parents=True, exist_ok=True)
    table = transitions(len(ALPHABET))
    with open(home / "rows.txt", "w") as file:
        for row in chains(table, num_rows, HALF, rng).tolist():
            half = "".join(ALPHABET[symbol] for symbol in row)
            file.write(half + half[:-1] + "\n")
    per_row = entropy(table, HALF)
    found = {"nats_per_row": per_row, "nats_per_token": per_row / (2 * HALF)}
    (home / "entropy.json").write_text(json.dumps(found) + "\n")
    print(f"entropy: {per_row:.4f} nats per row, {per_row / (2 * HALF):.5f} per token")


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))

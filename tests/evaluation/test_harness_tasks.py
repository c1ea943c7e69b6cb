"""The error that the Monte Carlo adds to a metric of the harness, without the harness."""

import math
import types

import numpy as np
import pytest

from llada_jax.errors import UserError
from llada_jax.evaluation.harness_tasks import monte_carlo_errors, read_settings

SCORES = np.array([-3.0, -7.0, -1.0, -4.0])
ERRORS = np.array([0.5, 2.0, 0.1, 1.0])


def samples_of(scores) -> list[dict]:
    """Returns what the harness logs of questions with one answer each."""
    return [
        {"doc": number, "arguments": [(number,)], "filtered_resps": [(score, False)], "filter": "f"}
        for number, score in enumerate(scores)
    ]


# A metric that is linear in the scores: a weighted sum.
WEIGHTS = np.array([1.0, 0.25, 2.0, 1.0])
TASK = types.SimpleNamespace(
    process_results=lambda doc, responses: {"weighted": WEIGHTS[doc] * responses[0][0]},
    aggregation=lambda: {"weighted": sum},
)

# A metric that takes the best answer, of which a score that is not a number would be one.
RANKING = types.SimpleNamespace(
    process_results=lambda doc, responses: {"acc": float(np.argmax([responses[0][0], -5.0]))},
    aggregation=lambda: {"acc": np.mean},
)


def test_the_error_of_a_metric_is_its_spread_over_independent_noise():
    """Of a linear metric the spread is known; 64 perturbations find it to a tenth (1 / sqrt(128)),
    and three tenths are allowed.
    """
    errors = {(number,): error for number, error in enumerate(ERRORS)}
    (found,) = monte_carlo_errors(TASK, samples_of(SCORES), errors).items()
    rng = np.random.default_rng(1)
    noisy = SCORES + ERRORS * rng.normal(size=(2000, 4))
    spread = np.std([sum(WEIGHTS * row) for row in noisy])
    assert found[0] == ("weighted", "f")
    assert found[1] == pytest.approx(spread, rel=0.3)
    assert spread == pytest.approx(math.sqrt(np.sum((WEIGHTS * ERRORS) ** 2)), rel=0.05)


def test_scores_without_noise_have_no_error_and_scores_of_the_cache_an_unknown_one():
    exact = {(number,): 0.0 for number in range(4)}
    assert monte_carlo_errors(TASK, samples_of(SCORES), exact) == {("weighted", "f"): 0.0}
    # a score of the cache has no error, and one that was drawn once has none that is known
    for known in ({}, {**exact, (3,): math.nan}):
        for task in (TASK, RANKING):
            (unknown,) = monte_carlo_errors(task, samples_of(SCORES), known).values()
            assert math.isnan(unknown)


@pytest.mark.parametrize(
    "word",
    ["limit=0", "limit=-1", "limit=nan", "limit=inf", "num_fewshot=-1", "bootstrap_iters=-1"],
)
def test_a_number_that_the_harness_cannot_use_is_refused(word):
    with pytest.raises(UserError, match=f"--harness {word}.* must"):
        read_settings([word])
    of_run, _ = read_settings(["limit=0.5", "num_fewshot=0", "bootstrap_iters=0"])
    assert of_run == {"limit": 0.5, "num_fewshot": 0, "bootstrap_iters": 0}

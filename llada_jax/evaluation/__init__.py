"""How good a model is: bounds on the likelihood of held-out text, and baselines for comparison."""

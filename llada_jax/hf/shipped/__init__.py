"""PyTorch files that are copied into every export. They never import llada_jax: they stand alone."""

"""PyTorch files that are copied into every export, and so never import llada_jax."""

"""PyTorch files that are copied into every export. They stand alone and never import this package."""

"""Samplers: the reverse process of masked diffusion. They know neither the network nor the tokenizer's text."""

"""Samplers: the reverse process of masked diffusion.

`denoise` and `remasking` know neither the network nor text; `text` and `show` connect them
to people.
"""

"""Networks: they know tokens and attention, but neither a mask id nor a diffusion time."""

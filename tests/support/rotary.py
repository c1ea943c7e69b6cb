"""The rotary frequencies of Llama 3.1, written a second time for tests."""

import math

import numpy as np


def reference_frequencies(head_dim: int, theta: float, scaling=()):
    """The rule of Llama 3.1 by its wavelengths, one frequency at a time, in float64."""
    frequencies = []
    for i in range(head_dim // 2):
        frequency = theta ** (-2 * i / head_dim)
        if scaling:
            factor, low, high, original = scaling
            wavelength = 2 * math.pi / frequency
            if wavelength > original / low:
                frequency /= factor
            elif wavelength >= original / high:
                smooth = (original / wavelength - low) / (high - low)
                frequency = (1 - smooth) * frequency / factor + smooth * frequency
        frequencies.append(frequency)
    return np.array(frequencies)

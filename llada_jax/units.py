"""Numbers as people read them: counts, bytes, seconds, and bits per byte."""

import math
import re

from llada_jax.errors import UserError

_BYTES = {
    f"{prefix}{unit}": base**power
    for unit, base in (("B", 1000), ("iB", 1024))
    for power, prefix in enumerate("KMGT", 1)
}


def bits_per_byte(nats_per_token: float, *, bytes_per_token: float) -> float:
    """Returns nats/token / ln 2 / (UTF-8 bytes/token): a likelihood that can be compared between
    tokenizers.
    """
    return nats_per_token / math.log(2) / bytes_per_token


def format_count(number: float) -> str:
    """Returns a number with three digits and a decimal prefix: 999, 12.3k, 1.23M, 8.02B, 2.30T."""
    for prefix in ("", "k", "M", "B", "T"):
        digits = _three_digits(number) if prefix or number != int(number) else f"{number:.0f}"
        if abs(float(digits)) < 1000 or prefix == "T":
            return digits + prefix
        number /= 1000
    raise AssertionError("unreachable: the last prefix takes any number")


def format_bytes(number: float) -> str:
    """Returns a number of bytes with three digits and a binary unit: 512 B, 4.50 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        digits = _three_digits(number) if unit != "B" else f"{number:.0f}"
        if abs(float(digits)) < 1000 or unit == "TiB":
            return f"{digits} {unit}"
        number /= 1024
    raise AssertionError("unreachable: the last unit takes any number")


def parse_bytes(text: str, *, flag: str) -> int:
    """Returns the bytes of "5GB" (decimal) or "512MiB" (binary).

    Args:
        flag: what `text` was given to, for the message.

    Raises:
        UserError: it is not a size, or is zero.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]i?B)", text)
    if not match or not float(match[1]):
        raise UserError(f"{flag} {text!r} is not a size; write for example 5GB or 512MiB.")
    return int(float(match[1]) * _BYTES[match[2]])


def _three_digits(number: float) -> str:
    size = abs(number)
    return f"{number:.{2 if size < 9.995 else 1 if size < 99.95 else 0}f}"


def format_seconds(seconds: float) -> str:
    """Returns a duration in its two largest units: 7.3ms, 0.4s, 45s, 3m10s, 2h05m, 11d03h."""
    if 0 < seconds < 0.095:
        return f"{1000 * seconds:.2g}ms"
    if seconds < 9.95:
        return f"{seconds:.1f}s"
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    if seconds < 86400:
        return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
    return f"{seconds // 86400}d{seconds % 86400 // 3600:02d}h"

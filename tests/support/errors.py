"""What a call says when it refuses its input."""

import pytest

from llada_jax.errors import UserError


def error_of(function, *args, **kwargs) -> str:
    """Returns the message of the UserError that the call raises: one line, one sentence."""
    with pytest.raises(UserError) as caught:
        function(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message

"""The data sets that the tests of the loader share."""

import pytest
from support.counting import write_counting_dataset


@pytest.fixture(scope="session")
def small(tmp_path_factory) -> str:
    """17 training records: 11 and 6 in two shards, 130 tokens from id 1 on; 5 held-out records, 34
    tokens.
    """
    return write_counting_dataset(tmp_path_factory.mktemp("data") / "small", first_token=1)


@pytest.fixture(scope="session")
def large(tmp_path_factory) -> str:
    """100 training records in one shard, ids from 10,000 on."""
    return write_counting_dataset(
        tmp_path_factory.mktemp("data") / "large", first_token=10_000, train=(100,), heldout=()
    )

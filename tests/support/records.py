"""The record of a run that has not run, for tests that save something or read run.json."""

import dataclasses

from llada_jax.checkpoints.record import RunRecord, TokenizerIdentity
from llada_jax.config import default_config
from llada_jax.data.tokenizer import load_tokenizer
from llada_jax.models.transformer import Architecture

SMALL = Architecture(
    vocab_size=320, num_layers=2, d_model=8, num_heads=2, num_kv_heads=2, head_dim=4, d_ff=16
)


def small_record(**changes) -> RunRecord:
    """Returns the record of a run with the default config and byte tokens; changes are fields."""
    tokenizer = load_tokenizer("bytes")
    record = RunRecord(
        config=default_config().to_dict(),
        architecture=SMALL,
        tokenizer=TokenizerIdentity("bytes", tokenizer.vocab_size, tokenizer.fingerprint),
    )
    record = dataclasses.replace(record, **changes)
    return RunRecord.from_json(record.to_json(), file="small_record")

"""Bytes and a very small model: does everything work, in a minute?

    llada-jax prepare --input llada_jax/data/austen6.txt.xz --output runs/debug/data \\
        --tokenizer bytes --sequence-length 128 --document-start '^(CHAPTER|Chapter) '
    llada-jax train --config configs/debug.py --workdir runs/debug/run

On 2 cores of an AMD EPYC this takes 25 s, with start and compilation, and ends at 4.49 bits per
held-out byte, which is no better than the frequencies of the letters alone.
"""

from llada_jax.config import default_config


def get_config():
    config = default_config()
    config.num_steps = 100
    config.data.path = "runs/debug/data"
    config.data.batch_size = 32
    config.data.sequence_length = 128
    config.model.num_layers = 2
    config.model.d_model = 64
    config.model.num_heads = config.model.num_kv_heads = 4
    config.model.head_dim = 16
    config.model.d_ff = 176
    config.schedule.name = "cosine"
    config.schedule.learning_rate = 3e-3
    config.schedule.warmup_steps = 10
    config.evaluation.every_steps = 50
    config.evaluation.num_batches = 2
    config.evaluation.final_num_batches = 8
    config.samples.every_steps = 50
    config.checkpoint.every_steps = 50
    config.log.every_steps = 10
    return config

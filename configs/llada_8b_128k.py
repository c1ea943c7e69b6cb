"""Rows of 131,072 tokens for LLaDA-8B, whose published rows have 4096.

    llada-jax prepare --input books --output data/books --sequence-length 131072 \\
        --tokenizer checkpoints/LLaDA-8B-Base
    llada-jax train --config configs/llada_8b_128k.py --workdir gs://BUCKET/runs/llada_8b_128k \\
        --config.data.path=data/books --config.checkpoint.init_from=checkpoints/LLaDA-8B-Base

Eight devices share a row: the mesh axis `sequence` splits its positions, and attention is full. The
documents of a row do not see each other. Rotary frequencies are stretched 32 times as in Llama 3.1.
A step has 32 rows, 4,194,304 tokens (pretraining has 5,242,880), and 500 steps have 2.1B tokens.
The learning rate rises to 2e-5 in 20 steps and falls along a cosine. No recipe for LLaDA at this
length is published with its weights; rate, budget and scaling are this project's choice. It is
planned for 64 chips of v5p, or for 32 H100 (`--topology 32xh100`) with
--config.data.sequence_length=65536:

    llada-jax plan --config configs/llada_8b_128k.py --topology v5p-128

Compiled for devices that were absent, a step needs 47.4 GiB per chip of v5p, and 50.1 GiB per H100
with the shorter rows (docs/benchmarks.md). Time and result of this config are unmeasured.
"""

from llada_jax.config import default_config


def get_config():
    config = default_config()
    config.num_steps = 500
    config.data.batch_size = 32
    config.data.sequence_length = 131_072
    config.data.attend_across_documents = False
    config.model.vocab_size = 126_464
    config.model.num_layers = 32
    config.model.d_model = 4096
    config.model.num_heads = config.model.num_kv_heads = 32
    config.model.head_dim = 128
    config.model.d_ff = 12_288
    config.model.rope_scaling = (32.0, 1.0, 4.0, 4096.0)
    config.model.remat = "attention"
    config.model.nll_chunk = 8192
    config.mesh.sequence = 8
    config.schedule.name = "cosine"
    config.schedule.learning_rate = 2e-5
    config.schedule.final_learning_rate = 2e-6
    config.schedule.warmup_steps = 20
    return config

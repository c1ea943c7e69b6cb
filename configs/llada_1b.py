"""LLaDA-1B as described in the paper (arXiv 2502.09992, table 5 and appendix B.2).

    llada-jax train --config configs/llada_1b.py --workdir gs://BUCKET/runs/llada_1b \\
        --config.data.path=/data/corpus

The model has 1.49B parameters: 22 layers of width 2048, 32 query heads, 4 key/value heads, a SwiGLU
of width 5634 and a vocabulary of 126,464. A step has 1280 rows * 4096 = 5,242,880 tokens. The
published curve of the 1B model covers 400B tokens without annealing, which is the first stage of
this schedule. It is planned for eight H100 or a slice of v5p, where a microbatch of 256 rows fits:

    llada-jax plan --config configs/llada_1b.py --topology 8xh100
    llada-jax plan --config configs/llada_1b.py --topology v5p-128

Time and result are unmeasured.
"""

from llada_jax.config import default_config


def get_config():
    config = default_config()
    config.num_tokens = 400_000_000_000
    config.data.batch_size = 1280
    config.data.sequence_length = 4096
    config.model.vocab_size = 126_464
    config.model.num_layers = 22
    config.model.d_model = 2048
    config.model.num_heads = 32
    config.model.num_kv_heads = 4
    config.model.head_dim = 64
    config.model.d_ff = 5634
    config.model.remat = "attention"
    config.model.nll_chunk = 512
    config.objective.t_sampling = "iid"
    config.optimizer.gradient_accumulation = 5
    config.checkpoint.keep_every_steps = 10_000
    return config

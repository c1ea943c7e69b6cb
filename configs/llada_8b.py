"""LLaDA-8B with the published recipe (arXiv 2502.09992, section 2.2 and appendix B.2).

    llada-jax train --config configs/llada_8b.py --workdir gs://BUCKET/runs/llada_8b \\
        --config.data.path=/data/corpus

The model has 8,015,581,184 parameters: 32 layers of width 4096, 32 heads without grouping, a SwiGLU
of width 12288 and a vocabulary of 126,464. A step has 1280 rows * 4096 = 5,242,880 tokens, so 2.3T
tokens take 438,690 steps. The learning rate warms up to 4e-4 over 2000 steps, is 1e-4 from 1.2T
tokens on (where the published run had diverged to NaN and was restarted), and falls linearly from
2.0T tokens to 1e-5 at 2.3T. The betas of AdamW and the clipping are not published; these are
SMDM's.

The published run took 0.13M H800-hours. All rows of a step fit at once on 64 of either chip:

    llada-jax plan --config configs/llada_8b.py --topology v5p-128
    llada-jax plan --config configs/llada_8b.py --topology 64xh100

Compiled for 64 absent v5p chips with 256 rows, a step needs 13.4 GiB per chip (docs/plan.md). Time
and result of this config are unmeasured.
"""

from llada_jax.config import default_config


def get_config():
    config = default_config()
    config.num_tokens = 2_300_000_000_000
    config.data.batch_size = 1280
    config.data.sequence_length = 4096
    config.model.vocab_size = 126_464
    config.model.num_layers = 32
    config.model.d_model = 4096
    config.model.num_heads = config.model.num_kv_heads = 32
    config.model.head_dim = 128
    config.model.d_ff = 12_288
    config.model.remat = "attention"
    config.model.nll_chunk = 256
    config.objective.t_sampling = "iid"
    config.checkpoint.keep_every_steps = 10_000
    return config

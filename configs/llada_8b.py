"""LLaDA-8B with the published recipe (arXiv 2502.09992, section 2.2 and appendix B.2):
8,015,581,184 parameters.

    llada-jax train --config configs/llada_8b.py --workdir gs://BUCKET/runs/llada_8b
    --config.data.path=/data/corpus

32 layers of width 4096, 32 heads (no grouping), SwiGLU 12288, 126,464 tokens, 1280 rows * 4096 =
5,242,880 tokens a step, 2.3T tokens in 438,690 steps: warm-up 2000 steps to 4e-4, 1e-4 from 1.2T
tokens on (where the published run had gone to NaN and was restarted), linear from 2.0T to 1e-5 at
2.3T. AdamW's betas and the clipping are not published; these are SMDM's. The published run took
0.13M H800-hours. Compiled for 64 absent chips of v5p with 256 rows: 13.6 GiB a chip, 9.6 with
model.remat=full (docs/plan.md). Time and result of this config: unmeasured.
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

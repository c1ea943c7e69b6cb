"""The demo: a masked diffusion model of Jane Austen's six novels, in five minutes on a 2-core CPU.

    make demo

The corpus has 4.0 MB (llada_jax/data/austen6.md) and the vocabulary 4096 tokens; the model has 2.5
M parameters and sees 3.0 M tokens in 1450 steps. On 2 cores of an AMD EPYC (Zen 4, AVX-512) that
took 524 CPU seconds: 7 minutes next to other work, or about 5 minutes, at 11,000 tokens/s, on idle
cores. The result of one seed is 1.80 +- 0.02 bits per held-out byte. docs/log.md lists what was
tried.
"""

from llada_jax.config import default_config


def get_config():
    config = default_config()
    config.num_steps = 1450
    config.data.path = "runs/tiny/data"
    config.data.batch_size = 32
    config.data.sequence_length = 64
    config.model.num_layers = 2
    config.model.d_model = 192
    config.model.num_heads = config.model.num_kv_heads = 4
    config.model.head_dim = 48
    config.model.d_ff = 512
    # Wavelengths from 6 to 160 tokens, because rows have only 64.
    config.model.rope_theta = 30.0
    config.model.remat = "dots"
    config.objective.masking = "exact_count"
    # Most times around 1/2 gain 0.06 bits per byte (docs/log.md).
    config.objective.t_sampling = "bell"
    # The weight 1/p gives the bound, but is too noisy for so few steps.
    config.objective.weight = "none"
    config.optimizer.name = "muon"
    config.schedule.name = "wsd"
    config.schedule.learning_rate = 5e-3
    config.schedule.final_learning_rate = 0.0
    config.schedule.warmup_steps = 50
    config.schedule.decay_fraction = 0.5
    config.evaluation.every_steps = 500
    config.evaluation.num_batches = 8
    config.samples.every_steps = 500
    config.samples.gen_length = config.samples.steps = config.samples.block_length = 48
    config.samples.temperature = 0.9
    config.checkpoint.every_steps = 500
    config.log.every_steps = 50
    return config

"""The demo: a masked diffusion model of Jane Austen's six novels, trained in about five minutes on a 2-core CPU.

    make demo

Corpus 4.0 MB (llada_jax/data/austen6.md). Expected on 2 cores: see docs/log.md.
"""

from llada_jax.config import default_config


def get_config():
    config = default_config()
    config.num_steps = 1000
    config.data.path = "runs/tiny/data"
    config.data.batch_size = 64
    config.data.sequence_length = 64
    config.model.num_layers = 4
    config.model.d_model = 128
    config.model.num_heads = config.model.num_kv_heads = 4
    config.model.head_dim = 32
    config.model.d_ff = 384
    config.optimizer.name = "muon"
    config.schedule.name = "wsd"
    config.schedule.learning_rate = 5e-3
    config.schedule.final_learning_rate = 0.0
    config.schedule.warmup_steps = 50
    config.schedule.decay_fraction = 0.3
    config.evaluation.every_steps = 250
    config.evaluation.num_batches = 8
    config.samples.every_steps = 250
    config.samples.gen_length = config.samples.steps = config.samples.block_length = 48
    config.samples.temperature = 0.6
    config.checkpoint.every_steps = 250
    config.log.every_steps = 25
    return config

"""A small run whose objective, optimizer and schedule are the files next to this one.

llada-jax train --config docs/examples/own_parts.py --workdir runs/own --config.data.path=DATA
"""

from llada_jax.config import default_config


def get_config():
    config = default_config()
    config.num_steps = 8
    config.data.batch_size = 16
    config.data.sequence_length = 32
    config.model.num_layers = 2
    config.model.d_model = 32
    config.model.num_heads = 4
    config.model.num_kv_heads = 2
    config.model.head_dim = 8
    config.model.d_ff = 64
    config.objective.name = "anchored:anchored"
    config.objective.arguments = (("strength", 0.5),)
    config.optimizer.name = "sign_momentum:sign_momentum"
    config.schedule.name = "staircase:staircase"
    config.schedule.arguments = (("num_stairs", 2),)
    config.schedule.learning_rate = 1e-3
    config.schedule.final_learning_rate = 5e-4
    config.schedule.warmup_steps = 1
    config.evaluation.every_steps = 4
    config.evaluation.num_batches = 1
    config.checkpoint.every_steps = 4
    config.log.every_steps = 1
    config.log.tensorboard = False
    return config

"""The tiny chat model learns to prefer one of two answers, on a CPU.

    llada-jax train --config configs/vrpo_tiny.py --workdir runs/vrpo_tiny

The model comes from runs/sft_tiny (configs/sft_tiny.py) and the pairs from runs/pairs, which
docs/finetuning.md writes. docs/log.md has the result.
"""

from llada_jax.config import default_config


def get_config():
    config = default_config()
    config.num_steps = 200
    config.data.path = "runs/pairs"
    config.data.batch_size = 32
    config.data.sequence_length = 96
    config.data.random_length_probability = 0.0
    config.data.attend_across_documents = False
    config.model.num_layers = 2
    config.model.d_model = 192
    config.model.num_heads = config.model.num_kv_heads = 4
    config.model.head_dim = 48
    config.model.d_ff = 512
    config.model.rope_theta = 30.0
    config.model.remat = "dots"
    config.objective.name = "vrpo"
    config.objective.masking = "exact_count"
    config.objective.num_times = 4
    config.schedule.name = "cosine"
    config.schedule.learning_rate = 2e-4
    config.schedule.final_learning_rate = 0.0
    config.schedule.warmup_steps = 20
    config.evaluation.every_steps = 50
    config.checkpoint.init_from = "runs/sft_tiny"
    config.checkpoint.every_steps = 200
    return config

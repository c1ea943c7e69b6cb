"""The model of the demo learns to answer 2,025 small dialogues, on a CPU.

    llada-jax train --config configs/sft_tiny.py --workdir runs/sft_tiny

The model comes from runs/tiny/run (`make demo`) and the dialogues from runs/chat, which
docs/finetuning.md writes. Rows of 64 tokens hold one to three dialogues. It takes about four
minutes of CPU time; docs/log.md has the result.
"""

from llada_jax.config import default_config


def get_config():
    config = default_config()
    config.num_steps = 400
    config.data.path = "runs/chat"
    config.data.batch_size = 32
    config.data.sequence_length = 64
    config.data.random_length_probability = 0.0
    config.data.attend_across_documents = False
    config.model.num_layers = 2
    config.model.d_model = 192
    config.model.num_heads = config.model.num_kv_heads = 4
    config.model.head_dim = 48
    config.model.d_ff = 512
    config.model.rope_theta = 30.0
    config.model.remat = "dots"
    config.objective.name = "sft"
    config.objective.mean_over = "tokens"
    # The weight 1/p gives the bound, but is too noisy for so few steps.
    config.objective.weight = "none"
    config.schedule.name = "wsd"
    config.schedule.learning_rate = 1e-3
    config.schedule.final_learning_rate = 0.0
    config.schedule.warmup_steps = 20
    config.schedule.decay_fraction = 0.5
    config.evaluation.every_steps = 200
    config.checkpoint.init_from = "runs/tiny/run"
    config.checkpoint.every_steps = 200
    return config

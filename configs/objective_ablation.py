"""Which corruption, weight and optimizer reach a bound in the fewest steps: the demo's network with
each choice, at 500 and 1450 steps, with three learning rates and three seeds.

    make demo
    llada-jax sweep --config configs/objective_ablation.py --workdir runs/ablation --run local
    llada-jax sweep --config configs/objective_ablation.py --workdir runs/ablation --table

Every run is scored by the same held-out bound, which keeps uniform times whatever the training loss
does; compare each variant at its own best learning rate. By the demo's time, the 216 runs take
about 11 hours on two idle cores. docs/log.md has the table of those that have been made.
"""

from llada_jax.config import default_config

# Each changes one choice of the demo's.
VARIANTS = [
    {},
    {"objective.t_sampling": "bell", "objective.bell_width": 0.1},
    {"objective.t_sampling": "bell", "objective.bell_width": 0.15},
    {"objective.t_sampling": "bell"},
    {"objective.t_sampling": "bell", "objective.bell_width": 0.3},
    {"objective.t_sampling": "iid"},
    {"objective.weight": "1/p"},
    {"objective.weight": "1/p", "objective.t_sampling": "bell"},
    {"objective.masking": "bernoulli"},
    {"objective.masking": "bernoulli", "objective.complementary": True},
    {"data.attend_across_documents": False},
]
MUON_RATES = (2.5e-3, 5e-3, 1e-2)
ADAMW_RATES = (1e-3, 2e-3, 4e-3)
LENGTHS = (500, 1450)
SEEDS = (0, 1, 2)


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
    config.objective.weight = "none"
    config.optimizer.name = "muon"
    config.schedule.name = "wsd"
    config.schedule.learning_rate = 5e-3
    config.schedule.final_learning_rate = 0.0
    config.schedule.warmup_steps = 50
    config.schedule.decay_fraction = 0.5
    # Only at the end.
    config.evaluation.every_steps = 0
    config.checkpoint.every_steps = 1450
    config.log.every_steps = 50
    config.log.tensorboard = False
    return config


def sweep(add):
    runs = [(variant, rate) for variant in VARIANTS for rate in MUON_RATES]
    runs += [({"optimizer.name": "adamw"}, rate) for rate in ADAMW_RATES]
    for variant, rate in runs:
        for num_steps in LENGTHS:
            for seed in SEEDS:
                add(variant, **{"schedule.learning_rate": rate}, num_steps=num_steps, seed=seed)

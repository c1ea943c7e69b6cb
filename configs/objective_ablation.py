"""Which corruption, weight and optimizer reach a bound in the fewest steps: the demo's network with
each choice, at 500 and 1450 steps, with three learning rates and three seeds.

    make demo
    llada-jax sweep --config configs/objective_ablation.py --workdir runs/ablation --run local
    llada-jax sweep --config configs/objective_ablation.py --workdir runs/ablation --table

Every run is scored by the same held-out bound, which keeps uniform times whatever the training loss
does; compare each variant at its own best learning rate. By the demo's time, the 198 runs take
about 10 hours on two idle cores. They have not been made yet.
"""

import tiny

from llada_jax import sweeps

# Each changes one choice of the demo's.
VARIANTS = [
    {},
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
# AdamW learns at a lower rate than Muon.
OPTIMIZERS = {"muon": (2.5e-3, 5e-3, 1e-2), "adamw": (1e-3, 2e-3, 4e-3)}
LENGTHS = (500, 1450)
SEEDS = (0, 1, 2)


def get_config():
    config = tiny.get_config()
    config.evaluation.every_steps = 0
    config.samples.every_steps = 0
    config.checkpoint.every_steps = 1450
    config.log.tensorboard = False
    return config


def sweep(add):
    lengths, seeds = {"num_steps": LENGTHS}, {"seed": SEEDS}
    for variant in VARIANTS:
        rates = {"schedule.learning_rate": OPTIMIZERS["muon"]}
        for knobs in sweeps.product([variant], rates, lengths, seeds):
            add(knobs)
    rates = {"schedule.learning_rate": OPTIMIZERS["adamw"]}
    for knobs in sweeps.product([{"optimizer.name": "adamw"}], rates, lengths, seeds):
        add(knobs)

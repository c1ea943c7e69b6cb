"""The IsoFLOP ladder in miniature (docs/scaling.md): three budgets of four sizes on a 2-core CPU.

    llada-jax prepare --input llada_jax/data/austen6.txt.xz --output runs/ladder_tiny/data \\
        --tokenizer bytes --sequence-length 64 --document-start '^(CHAPTER|Chapter) ' --heldout 0.05
    llada-jax sweep --config configs/ladder_tiny.py --workdir runs/ladder_tiny/runs --run local
    llada-jax sweep --config configs/ladder_tiny.py --workdir runs/ladder_tiny/runs --fit

The blocks have 7 to 90 thousand parameters, and C = 6 N D goes from 1e11 to 1e12 FLOPs. On 2 cores
of an Intel Xeon that were shared with other work, the ladder took 18 minutes of CPU time. The best
model of each budget has 3.31, 3.09 and 2.91 bits per held-out byte, and N_opt ~ C^0.67 (0.50 to
0.86).
"""

from llada_jax.config import default_config

# Width -> layers.
LAYERS = {16: 2, 24: 2, 32: 2, 40: 3, 48: 3}
# C = 6 N D -> widths.
LADDER = {1e11: (16, 24, 32, 48), 3e11: (16, 24, 32, 40), 1e12: (24, 32, 40, 48)}


def get_config():
    config = default_config()
    config.num_steps = 500
    config.data.path = "runs/ladder_tiny/data"
    config.data.batch_size = 16
    config.data.sequence_length = 64
    config.data.random_length_probability = 0.0
    config.model.num_layers = 2
    config.model.d_model = 32
    config.model.num_heads = config.model.num_kv_heads = 4
    config.model.head_dim = 8
    config.model.d_ff = 96
    config.model.rope_theta = 30.0
    config.objective.masking = "exact_count"
    config.objective.weight = "none"
    config.optimizer.name = "muon"
    config.schedule.name = "wsd"
    config.schedule.learning_rate = 1e-2
    config.schedule.final_learning_rate = 0.0
    config.schedule.warmup_steps = 10
    config.schedule.decay_fraction = 0.5
    # Only at the end.
    config.evaluation.every_steps = 0
    config.checkpoint.every_steps = 5000
    config.checkpoint.keep = 1
    config.log.every_steps = 20
    config.log.tensorboard = False
    return config


def sweep(add):
    for compute, widths in LADDER.items():
        for width in widths:
            layers, heads, d_ff = LAYERS[width], width // 8, 3 * width
            # Of the blocks: 13 * layers * width**2.
            parameters = layers * (4 * width**2 + 3 * width * d_ff)
            model = {
                "model.num_layers": layers,
                "model.d_model": width,
                "model.num_heads": heads,
                "model.num_kv_heads": heads,
                "model.d_ff": d_ff,
            }
            add(model, num_steps=round(compute / (6 * parameters) / (16 * 64)))

"""The IsoFLOP ladder of SMDM (arXiv 2410.18514): which model size is best for a compute budget?

    llada-jax prepare --input 'slimpajama/*.jsonl.zst' --output data/slimpajama \\
        --tokenizer spm:32000 --sequence-length 2048
    llada-jax sweep --config configs/ladder.py --workdir runs/ladder --list
    llada-jax sweep --config configs/ladder.py --workdir runs/ladder --run slurm \\
        -- --gpus-per-node 8 --time 24:00:00
    llada-jax sweep --config configs/ladder.py --workdir runs/ladder --fit

The ladder has 30 runs: five budgets C = 6 N D from 6e18 to 1e20 FLOPs, and about six sizes for
each, from 10 to 320 tokens per parameter. Together they take 1.2e21 FLOPs, not counting head and
attention. Shapes, batch, optimizer and schedule are SMDM's: 256 rows * 2048 = 524,288 tokens per
step, and a cosine from 2e-4 to 2e-5 after a warm-up of 1%, at least 100 steps. SMDM has not
published which sizes it trained at which budget. The initialisation is LLaDA's.

Every run is planned for eight H100, all of them for 860 to 1,490 GPU-hours (estimates); this is the
largest network:

    llada-jax plan --config configs/ladder.py --topology 8xh100 --vocab-size 32000 \\
        --config.model.num_layers=24 --config.model.d_model=1792 --config.model.num_heads=14 \\
        --config.model.num_kv_heads=14 --config.model.head_dim=128 --config.model.d_ff=7168

Time and result are unmeasured. docs/scaling.md explains the method and shows a small ladder that
was run.
"""

from llada_jax.config import default_config

# Layers, heads, width, feed-forward width. Where the last is 4 * width, the blocks have
# 16 * layers * width**2 parameters.
SHAPES = [
    (6, 4, 256, 1024),
    (8, 6, 384, 1536),
    (8, 8, 512, 2048),
    (9, 9, 576, 2304),
    (10, 10, 640, 2560),
    (16, 8, 640, 1600),
    (13, 10, 640, 2560),
    (12, 12, 768, 3072),
    (15, 12, 768, 3072),
    (18, 12, 768, 3072),
    (14, 14, 896, 3584),
    (16, 14, 896, 3584),
    (18, 14, 896, 3584),
    (16, 16, 1024, 4096),
    (18, 16, 1024, 4096),
    (20, 16, 1024, 4096),
    (18, 10, 1280, 5120),
    (21, 10, 1280, 5120),
    (18, 11, 1408, 5632),
    (24, 10, 1280, 5120),
    (21, 11, 1408, 5632),
    (19, 12, 1536, 6144),
    (24, 11, 1408, 5632),
    (22, 12, 1536, 6144),
    (25, 12, 1536, 6144),
    (20, 14, 1792, 7168),
    (24, 14, 1792, 7168),
    (22, 16, 2048, 8192),
    (25, 16, 2048, 8192),
    (28, 17, 2176, 8704),
]
BUDGETS = (6e18, 1e19, 3e19, 6e19, 1e20)
TOKENS_PER_PARAMETER = (10, 20, 40, 80, 160, 320)


def get_config():
    config = default_config()
    config.num_steps = 10_000
    config.data.path = "data/slimpajama"
    config.data.batch_size = 256
    config.data.sequence_length = 2048
    config.data.random_length_probability = 0.0
    config.model.rope_theta = 10_000.0
    config.objective.t_sampling = "iid"
    config.schedule.name = "cosine"
    config.schedule.learning_rate = 2e-4
    config.schedule.final_learning_rate = 2e-5
    return config


def num_parameters(shape):
    """Returns the parameters of the blocks: four matrices of attention, three of feed-forward."""
    layers, _, width, d_ff = shape
    return layers * (4 * width**2 + 3 * width * d_ff)


def sweep(add):
    for compute in BUDGETS:
        # N follows from C = 6 N * (ratio N); the nearest shape is the one with the smallest ratio
        # of sizes.
        wanted = [(compute / 6 / ratio) ** 0.5 for ratio in TOKENS_PER_PARAMETER]
        nearest = [
            min(SHAPES, key=lambda s: max(num_parameters(s) / n, n / num_parameters(s)))
            for n in wanted
        ]
        for shape in dict.fromkeys(nearest):
            layers, heads, width, d_ff = shape
            num_steps = round(compute / (6 * num_parameters(shape)) / (256 * 2048))
            model = {
                "model.num_layers": layers,
                "model.d_model": width,
                "model.num_heads": heads,
                "model.num_kv_heads": heads,
                "model.head_dim": width // heads,
                "model.d_ff": d_ff,
            }
            model["schedule.warmup_steps"] = max(num_steps // 100, 100)
            add(model, num_steps=num_steps)

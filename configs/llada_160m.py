"""A model of 160M parameters for one accelerator or one host, close to LLaDA's recipe.

    llada-jax prepare --input 'corpus/*.jsonl.zst' --output data/corpus --tokenizer spm:50000 \\
        --sequence-length 2048
    llada-jax train --config configs/llada_160m.py --workdir runs/llada_160m \\
        --config.data.path=data/corpus

The model has 12 layers of width 768. With a vocabulary of 50,000 these are 162M parameters, 123M of
them in matrix products. A step has 256 rows * 2048 = 524,288 tokens, so 20,000 steps see 10.5B
tokens and take 10.5e9 * 0.967 GFLOP = 1.0e19 FLOPs. It is planned for one H100 or a host of v5e,
where a microbatch of 32 rows fits:

    llada-jax plan --config configs/llada_160m.py --vocab-size 50000 --topology 1xh100
    llada-jax plan --config configs/llada_160m.py --vocab-size 50000 --topology v5litepod-8

Time and result are unmeasured.
"""

from llada_jax.config import default_config


def get_config():
    config = default_config()
    config.num_steps = 20_000
    config.data.path = "data/corpus"
    config.data.batch_size = 256
    config.data.sequence_length = 2048
    config.model.num_layers = 12
    config.model.d_model = 768
    config.model.num_heads = config.model.num_kv_heads = 12
    config.model.head_dim = 64
    config.model.d_ff = 2048
    config.model.remat = "dots"
    # Every device then has about as many masked tokens as the others, and computes logits for half
    # of its positions.
    config.objective.t_sampling = "mirrored"
    config.optimizer.gradient_accumulation = 8
    config.schedule.name = "wsd"
    config.schedule.learning_rate = 6e-4
    config.schedule.final_learning_rate = 1e-5
    config.schedule.warmup_steps = 1000
    config.schedule.decay_fraction = 0.2
    config.samples.every_steps = 2000
    return config

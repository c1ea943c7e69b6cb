"""Preference optimisation of LLaDA-8B-Instruct with VRPO, the step to LLaDA 1.5 (arXiv 2505.19223).

    llada-jax plan --config configs/vrpo_llada_8b.py --topology 64xh100
    llada-jax prepare --chat records=pairs template=llada rows=padded \\
        --input preferences.jsonl --output data/pairs --sequence-length 4096 \\
        --tokenizer checkpoints/LLaDA-8B-Instruct
    llada-jax train --config configs/vrpo_llada_8b.py --workdir gs://BUCKET/runs/vrpo \\
        --config.data.path=data/pairs \\
        --config.checkpoint.init_from=checkpoints/LLaDA-8B-Instruct

One epoch of 350 K pairs in batches of 64 is 5,469 steps; set num_steps to pairs / 64. A row holds a
pair, so that both answers with their prompts share the 4096 tokens. Every step runs the policy and
the reference 8 times, once for each time of an answer. The reference is a second copy of the
weights, of which each device keeps its share. The number of pairs, the single mask per time and the
shared draws are published; batch, learning rate, beta and the budget of 8 are not, and are common
choices of DPO. Time and result of this config are unmeasured.
"""

from llada_jax.config import default_config


def get_config():
    config = default_config()
    config.num_steps = 5_469
    config.data.batch_size = 64
    config.data.sequence_length = 4096
    config.data.random_length_probability = 0.0
    config.data.attend_across_documents = False
    config.model.vocab_size = 126_464
    config.model.num_layers = 32
    config.model.d_model = 4096
    config.model.num_heads = config.model.num_kv_heads = 32
    config.model.head_dim = 128
    config.model.d_ff = 12_288
    config.model.remat = "attention"
    config.model.nll_chunk = 256
    config.objective.name = "vrpo"
    config.objective.masking = "exact_count"
    config.objective.t_sampling = "iid"
    config.optimizer.weight_decay = 0.0
    config.schedule.name = "cosine"
    config.schedule.learning_rate = 5e-7
    config.schedule.final_learning_rate = 0.0
    config.schedule.warmup_steps = 100
    return config

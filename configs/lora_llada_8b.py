"""Fine-tuning of LLaDA-8B with low-rank adapters on one GPU of 80 GB.

    llada-jax plan --config configs/lora_llada_8b.py --topology 1xh100
    llada-jax prepare --chat template=llada turns=all --input instructions.jsonl \\
        --output data/chat --sequence-length 4096 --tokenizer checkpoints/LLaDA-8B-Base
    llada-jax train --config configs/lora_llada_8b.py --workdir runs/lora \\
        --config.data.path=data/chat --config.checkpoint.init_from=checkpoints/LLaDA-8B-Base

All seven matrices of each layer have adapters of rank 16, 41.9 M parameters in all; the network is
frozen in float32 (29.9 GiB) and multiplied in bfloat16. 32 packed rows go through it two at a time.
The learning rate is a common choice for adapters and has not been tuned. docs/log.md has the memory
and the speed of a step; what the config leads to is unmeasured.
"""

from llada_jax.config import default_config


def get_config():
    config = default_config()
    config.num_steps = 1_000
    config.data.batch_size = 32
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
    config.objective.name = "sft"
    config.lora.rank = 16
    config.lora.targets = "blocks/"
    config.optimizer.gradient_accumulation = 16
    config.optimizer.weight_decay = 0.0
    config.schedule.name = "cosine"
    config.schedule.learning_rate = 1e-4
    config.schedule.final_learning_rate = 1e-5
    config.schedule.warmup_steps = 50
    config.checkpoint.every_steps = 500
    return config

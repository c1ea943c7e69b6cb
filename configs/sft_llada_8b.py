"""Supervised fine-tuning of LLaDA-8B with the published recipe (arXiv 2502.09992, appendix B).

    llada-jax plan --config configs/sft_llada_8b.py --topology 64xh100
    llada-jax prepare --chat template=llada rows=padded --input instructions.jsonl \\
        --output data/chat --sequence-length 4096 --tokenizer checkpoints/LLaDA-8B-Base
    llada-jax train --config configs/sft_llada_8b.py --workdir gs://BUCKET/runs/sft \\
        --config.data.path=data/chat --config.checkpoint.init_from=checkpoints/LLaDA-8B-Base

Three epochs of 4.5 M dialogues in batches of 256 are 52,734 steps; set num_steps to 3 * dialogues /
256. Each epoch draws one answer of a dialogue, and pairs of rows are filled up with end-of-text
tokens, which are part of the answer (the published run had two rows per device). The learning rate
rises to 2.5e-5 in 50 steps, stays there, and falls linearly to 2.5e-6 in the last 10%. The betas of
AdamW and the clipping are not published. The published sequence length is unknown; 4096 is that of
pretraining. docs/finetuning.md has the time that `plan` estimates; time and result are unmeasured.
"""

from llada_jax.config import default_config


def get_config():
    config = default_config()
    config.num_steps = 52_734
    config.data.batch_size = 256
    config.data.sequence_length = 4096
    config.data.random_length_probability = 0.0
    config.data.eos_padding = 2
    config.model.vocab_size = 126_464
    config.model.num_layers = 32
    config.model.d_model = 4096
    config.model.num_heads = config.model.num_kv_heads = 32
    config.model.head_dim = 128
    config.model.d_ff = 12_288
    config.model.remat = "attention"
    config.model.nll_chunk = 256
    config.objective.name = "sft"
    config.objective.t_sampling = "iid"
    config.schedule.name = "wsd"
    config.schedule.learning_rate = 2.5e-5
    config.schedule.final_learning_rate = 2.5e-6
    config.schedule.warmup_steps = 50
    return config

"""Fine-tuning of LLaDA-8B on packed dialogues, of which prompts are masked too and no end of text
is padded (the recipe of iLLaDA, arXiv 2606.25331).

    llada-jax plan --config configs/sft_packed.py --topology 64xh100
    llada-jax prepare --chat template=llada turns=all --input instructions.jsonl \\
        --output data/chat --sequence-length 4096 --tokenizer checkpoints/LLaDA-8B-Base
    llada-jax train --config configs/sft_packed.py --workdir gs://BUCKET/runs/sft_packed \\
        --config.data.path=data/chat --config.checkpoint.init_from=checkpoints/LLaDA-8B-Base

Rows hold whole dialogues, which do not see each other. iLLaDA went through its 25 B tokens twelve
times; set num_steps to 12 * records / batch_size, where `prepare` prints the records. The learning
rate is 5e-6 and falls linearly to 5e-7 in the last 10%. 30% of the rows are cut in two at a random
place. docs/finetuning.md has the time that `plan` estimates; time and result are unmeasured.
"""

from llada_jax.config import default_config


def get_config():
    config = default_config()
    config.num_steps = 10_000
    config.data.batch_size = 256
    config.data.sequence_length = 4096
    config.data.random_length_probability = 0.0
    config.data.attend_across_documents = False
    config.data.split_probability = 0.3
    config.model.vocab_size = 126_464
    config.model.num_layers = 32
    config.model.d_model = 4096
    config.model.num_heads = config.model.num_kv_heads = 32
    config.model.head_dim = 128
    config.model.d_ff = 12_288
    config.model.remat = "attention"
    config.model.nll_chunk = 256
    config.objective.name = "sft"
    config.objective.masked = "documents"
    config.objective.mean_over = "tokens"
    config.schedule.name = "wsd"
    config.schedule.learning_rate = 5e-6
    config.schedule.final_learning_rate = 5e-7
    config.schedule.warmup_steps = 50
    return config

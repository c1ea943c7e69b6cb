"""Plausible faults of objectives, samplers and evaluation."""

from mutations.fault import faults_of

CORRUPTION = faults_of(
    "llada_jax/objectives/corruption.py",
    "tests/objectives/test_objectives.py tests/objectives/test_draws.py",
    (
        "the floor of p left out",
        "p_mask_B = (1.0 - eps) * t_B + eps",
        "p_mask_B = t_B",
    ),
    (
        "weight 1/t instead of 1/p",
        "tokens_BT), is_masked_BT, 1.0 / p_mask_B",
        "tokens_BT), is_masked_BT, 1.0 / jnp.maximum(t_B, 1e-9)",
    ),
    (
        "padding masked",
        "< p_mask_B[:, None]) & is_maskable_BT",
        "< p_mask_B[:, None])",
    ),
    (
        "levels of noise shifted by one",
        "bucket = jnp.minimum((t * NUM_T_BUCKETS).astype(jnp.int32), NUM_T_BUCKETS - 1)",
        "bucket = jnp.minimum((t * NUM_T_BUCKETS).astype(jnp.int32) + 1, NUM_T_BUCKETS - 1)",
    ),
    (
        "one key for all rows",
        "t_B = (offset + (row_B // 2).astype(jnp.float32) / num_pairs) % 1.0",
        "t_B = (offset + 0 * row_B.astype(jnp.float32) / num_pairs) % 1.0",
    ),
    (
        "times of two rows that do not mirror each other",
        "jnp.where(row_B % 2 == 0, t_B,",
        "jnp.where(row_B % 2 < 2, t_B,",
    ),
    (
        "k rounded down",
        "jnp.ceil(t_B * length_B)",
        "jnp.floor(t_B * length_B)",
    ),
    (
        "weight of the exact count inverted",
        "weight_B = length_B.astype(jnp.float32) / k_B",
        "weight_B = k_B / jnp.maximum(length_B, 1).astype(jnp.float32)",
    ),
    (
        "times stratified over empty rows",
        "return jnp.cumsum(is_real_B) - 1, jnp.maximum(is_real_B.sum(), 1)",
        "return jnp.arange(len(is_real_B)), len(is_real_B)",
    ),
)

MASKED_DIFFUSION = faults_of(
    "llada_jax/objectives/masked_diffusion.py",
    "tests/objectives/test_objectives.py tests/objectives/test_draws.py",
    (
        "divided by the masked tokens",
        "num_maskable = is_maskable_BT.sum().astype(jnp.float32)",
        "num_maskable = is_masked_BT.sum().astype(jnp.float32)",
    ),
    (
        "the network sees the clean tokens",
        "params, noisy_BT, tokens_BT, is_masked_BT,",
        "params, tokens_BT, tokens_BT, is_masked_BT,",
    ),
    (
        "the logged bound without its weight",
        '"nelbo": (nelbo_sum, num_maskable)',
        '"nelbo": (loss_sum, num_maskable)',
    ),
    (
        "one key for times and masks",
        "t_key, mask_key = jax.random.split(key)",
        "t_key = mask_key = key",
    ),
    (
        "held-out text scored with Bernoulli masks",
        'mask_id=mask_id, masking="exact_count", is_whole_batch=True',
        "mask_id=mask_id, is_whole_batch=True",
    ),
)

SFT = faults_of(
    "llada_jax/objectives/sft.py",
    "tests/objectives/test_sft_weights.py tests/objectives/test_sft.py",
    (
        "both of two complementary rows weighted alike",
        "p_mask_BT = jnp.where(is_second_B1, 1.0 - p_mask_BT, p_mask_BT)",
        "p_mask_BT = jnp.where(is_second_B1, p_mask_BT, p_mask_BT)",
    ),
    (
        "prompts dropped where little is masked",
        "draw_documents(jax.random.fold_in(key, PROMPTS), segment_ids_BT, record_B)",
        "draw_documents(t_key, segment_ids_BT, record_B)",
    ),
    (
        "times of half of a batch in half of [0, 1)",
        "num_rows=num_rows // copies, t_sampling=t_sampling",
        "num_rows=num_rows, t_sampling=t_sampling",
    ),
)

AUTOREGRESSIVE = faults_of(
    "llada_jax/objectives/autoregressive.py",
    "tests/objectives/test_objectives.py",
    (
        "the target in its own input",
        "jnp.roll(tokens_BT, 1, axis=1)",
        "jnp.roll(tokens_BT, 0, axis=1)",
    ),
    (
        "a document begins with the token before it",
        'starts_BT = batch["positions"] == 0',
        'starts_BT = (batch["positions"] == 0) & (jnp.arange(tokens_BT.shape[1]) == 0)',
    ),
)

DENOISE = faults_of(
    "llada_jax/samplers/step.py",
    "tests/samplers/test_eos.py tests/samplers/test_denoise.py",
    (
        "the same noise in every step",
        "keys_for_rows(jax.random.fold_in(key, number), fixed.row_B)",
        "keys_for_rows(key, fixed.row_B)",
        "tests/samplers/test_denoise.py tests/objectives/test_draws.py "
        "tests/samplers/test_distributions.py",
    ),
    (
        "EOS filled in before its block is finished",
        "jax.lax.dynamic_update_slice_in_dim(state.canvas_BT, tokens_BT, start, axis=1),",
        "_fill_after_eos(jax.lax.dynamic_update_slice_in_dim(state.canvas_BT, tokens_BT, start, "
        "axis=1), is_generated_BT, fixed),",
        "tests/samplers/test_eos.py tests/samplers/test_denoise.py",
    ),
    (
        "a cache filled one step late",
        "state.step_in_block % jnp.maximum(fixed.refresh, 1) == 0",
        "state.step_in_block % jnp.maximum(fixed.refresh, 1) == 1",
        "tests/samplers/test_cache.py",
    ),
    (
        "EOS of the prompt ends a row",
        "_is_among(canvas_BT, fixed.eos_ids_n) & is_generated_BT",
        "_is_among(canvas_BT, fixed.eos_ids_n)",
    ),
    (
        "the remainder revealed last",
        "count_B = -(-num_hidden_B // (fixed.steps_per_block - state.step_in_block))",
        "count_B = num_hidden_B // (fixed.steps_per_block - state.step_in_block)",
    ),
    (
        "ties go to the right",
        "jnp.argsort(jnp.argsort(-score_BT, axis=1, stable=True), axis=1)",
        "jnp.argsort(jnp.argsort(-score_BT[:, ::-1], axis=1, stable=True), axis=1)[:, ::-1]",
    ),
)

REVISE = faults_of(
    "llada_jax/samplers/revise.py",
    "tests/samplers/test_revise.py",
    (
        "a token goes back with the chance of another schedule",
        "jnp.minimum(1.0, num_hidden_B / num_kept_B)",
        "jnp.minimum(1.0, num_kept_B / jnp.maximum(num_hidden_B, 1))",
    ),
    (
        "the loop takes back after its end",
        "& (step < jnp.floor(LOOP_ENDS * steps))",
        "& (step < steps)",
    ),
    (
        "a draft takes back as many as were kept",
        "num_drafted_before_B - 1, 0)",
        "num_drafted_before_B, 0)",
    ),
)

BATCHES = faults_of(
    "llada_jax/samplers/batches.py",
    "tests/samplers/test_batches.py",
    (
        "rows numbered within their batch",
        "if noise_numbers is not None else row_B,",
        "if noise_numbers is not None else range(len(row_B)),",
    ),
    ("passes of the last block alone", "num_steps[row] += int(num)", "num_steps[row] = int(num)"),
    (
        "all rows of a batch go on from the text of the last",
        "tokens_BT[place, -gen_length:] = generated[row]",
        "tokens_BT[place, -gen_length:] = generated[rows[-1]]",
    ),
)

CHOICE = faults_of(
    "llada_jax/samplers/choice.py",
    "tests/samplers/test_choice.py tests/samplers/test_denoise.py",
    (
        "the mask token proposed",
        "is_excluded_V = (id_V == mask_id) | (id_V >= num_ids)",
        "is_excluded_V = id_V >= num_ids",
    ),
    (
        "ids that the tokenizer does not have",
        "(id_V == mask_id) | (id_V >= num_ids)",
        "id_V == mask_id",
        "tests/samplers/test_text.py tests/samplers/test_denoise.py",
    ),
    (
        "temperature squared",
        "logits_BTV + temperature * jax.vmap",
        "logits_BTV + temperature**2 * jax.vmap",
        "tests/samplers/test_distributions.py tests/samplers/test_choice.py",
    ),
    (
        "one noise for all positions",
        "jax.vmap(keys_for_rows)(keys_B, positions_BT)",
        "jax.vmap(keys_for_rows)(keys_B, jnp.zeros_like(positions_BT))",
        "tests/samplers/test_distributions.py tests/samplers/test_choice.py",
    ),
)

GUIDANCE = faults_of(
    "llada_jax/samplers/network.py",
    "tests/samplers/test_network.py tests/samplers/test_denoise.py",
    (
        "guidance one too weak",
        "(cfg_scale + 1) * (logits_BTV - unprompted_BTV)",
        "cfg_scale * (logits_BTV - unprompted_BTV)",
    ),
)

REMASKING = faults_of(
    "llada_jax/samplers/remasking.py",
    "tests/samplers/test_remasking.py tests/samplers/test_published_samples.py "
    "tests/samplers/test_distributions.py",
    (
        "confidence without its normaliser",
        "jnp.exp(chosen_BT - jax.nn.logsumexp(logits_BTV, axis=-1))",
        "jnp.exp(chosen_BT)",
    ),
    (
        "an undecided rule leaves masks",
        "return jnp.nan_to_num(confidence_BT, nan=lowest, neginf=lowest)",
        "return confidence_BT",
    ),
)

LIKELIHOOD = faults_of(
    "llada_jax/evaluation/likelihood.py",
    "tests/evaluation/test_draws.py tests/evaluation/test_splits.py",
    ("mean of batch means", "mean = nats.sum() / tokens.sum()", "mean = np.mean(nats / tokens)"),
    (
        "draws share their masks",
        'key_for("likelihood", seed, number, draw)',
        'key_for("likelihood", seed, number)',
    ),
    (
        "batches share their masks",
        'key_for("likelihood", seed, number, draw)',
        'key_for("likelihood", seed, draw)',
    ),
    (
        "tokens counted once per draw",
        "int(tokens.sum() / num_draws)",
        "int(tokens.sum())",
    ),
    (
        "the standard error of one pair",
        "max(len(pairs) - 1, 1) * len(pairs) / tokens.sum() ** 2",
        "max(len(pairs) - 1, 1) * len(pairs) ** 2 / tokens.sum() ** 2",
    ),
    (
        "a batch that was scored is scored again",
        "if number < num_before:",
        "if number < num_before - 1:",
        "tests/evaluation/test_draws.py",
    ),
)

SPLITS = faults_of(
    "llada_jax/evaluation/splits.py",
    "tests/evaluation/test_splits.py",
    (
        "evaluate ignores attend_across_documents",
        "attend_across_documents=attend_across_documents,\n        on_batch",
        "attend_across_documents=True,\n        on_batch",
        "tests/evaluation/test_splits.py tests/verbs/test_evaluate.py",
    ),
    ("only one corruption", "num_draws=num_draws,", "num_draws=1,"),
    (
        "every device attends to all rows",
        "with jax.set_mesh(batch_sharding.mesh):",
        "if True:",
        "tests/planning/test_evaluation_programs.py"
        "::test_the_traced_bound_is_the_program_that_evaluate_runs",
    ),
)

ROLLING = faults_of(
    "llada_jax/evaluation/rolling.py",
    "tests/evaluation/test_rolling.py",
    (
        "bytes that the tokenizer lost are counted",
        "num_encoded_bytes(text, tokenizer.decode(tokens))",
        "len(text.encode())",
    ),
)

TASKS = faults_of(
    "llada_jax/evaluation/tasks.py",
    "tests/test_pretrained_ids.py",
    (
        "answers hold rows without an id",
        "                steps=max(len(questions[number].answer) for number in batch),\n"
        "                num_ids=tokenizer.vocab_size,",
        "                steps=max(len(questions[number].answer) for number in batch),",
    ),
)

RNG = faults_of(
    "llada_jax/rng.py",
    "tests/test_rng.py",
    (
        "one key for all purposes",
        "zlib.crc32(purpose.encode())",
        "len(purpose) * 0",
        "tests/test_rng.py",
    ),
    (
        "one key for all rows of a batch",
        "jax.random.fold_in(key, row))(row_B)",
        "jax.random.fold_in(key, row * 0))(row_B)",
    ),
)

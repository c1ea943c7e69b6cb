"""Plausible faults, each one edit of one file, and the tests that a developer of that file runs.

tests/mutations/plant.py plants them one at a time and counts how many the tests catch. A fault is
small, keeps the program running, and would cost someone a run: what a tired person types, or what a
change elsewhere forgets.
"""

from typing import NamedTuple


class Fault(NamedTuple):
    """In `file`, `old` (which occurs once) becomes `new`; `tests` are words for pytest."""

    name: str
    file: str
    old: str
    new: str
    tests: str


def _of(file: str, tests: str, *edits: tuple[str, str, str] | tuple[str, str, str, str]):
    return [
        Fault(name, file, old, new, other[0] if other else tests)
        for name, old, new, *other in edits
    ]


TRANSFORMER = _of(
    "llada_jax/models/transformer.py",
    "tests/models/test_transformer.py tests/models/test_precision.py",
    (
        "rotary positions in bfloat16",
        "positions_BT[..., None].astype(jnp.float32) *",
        "positions_BT[..., None].astype(jnp.bfloat16).astype(jnp.float32) *",
        "tests/models/test_precision.py tests/models/test_rotary.py",
    ),
    (
        "cos and sin in bfloat16",
        "return jnp.cos(angle), jnp.sin(angle)",
        "return tuple(f(angle.astype(jnp.bfloat16)) for f in (jnp.cos, jnp.sin))",
        "tests/models/test_precision.py",
    ),
    (
        "vectors rotated in bfloat16",
        "jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)",
        "jnp.split(x_BTNH, 2, axis=-1)",
        "tests/models/test_precision.py",
    ),
    (
        "logits of the head in bfloat16",
        "return project(x_BTD, self.head_kernel(), out_dtype=jnp.float32)",
        "return project(x_BTD, self.head_kernel()).astype(jnp.float32)",
    ),
    (
        "logits of the loss in bfloat16",
        "logits_BTC = project(x_BTD, kernel_DC, out_dtype=jnp.float32)",
        "logits_BTC = project(x_BTD, kernel_DC).astype(jnp.float32)",
        "tests/models/test_precision.py",
    ),
    (
        "embedding cast before the gather",
        "return table_VD[tokens_BT].astype(dtype)",
        "return table_VD.astype(dtype)[tokens_BT]",
        "tests/models/test_precision.py",
    ),
    (
        "bias added in bfloat16",
        "return (x.astype(jnp.float32) + bias).astype(x.dtype)",
        "return x + bias.astype(x.dtype)",
        "tests/models/test_precision.py",
    ),
    (
        "wrong half rotated",
        "[first * cos - second * sin, second * cos + first * sin]",
        "[first * cos + second * sin, second * cos - first * sin]",
    ),
    (
        "no rotation of keys",
        "k_BSKH = rotate(k_BSKH, cos, sin)",
        "k_BSKH = k_BSKH",
    ),
    (
        "feed-forward norm taken from attention",
        "y_BTD = rms_norm(x_BTD, self.ff_norm[...], a.norm_eps)",
        "y_BTD = rms_norm(x_BTD, self.attn_norm[...], a.norm_eps)",
    ),
    (
        "gate and up exchanged",
        "jax.nn.silu(gate_BTF) * up_BTF,",
        "gate_BTF * jax.nn.silu(up_BTF),",
    ),
    (
        "no residual around the feed-forward part",
        "x_BTD = x_BTD + project(h_BTF, self.ff_out[...])",
        "x_BTD = project(h_BTF, self.ff_out[...])",
    ),
    (
        "shift across segments",
        "(before_BT == segment_ids_BT)[..., None], before_BTD, x_BTD)",
        "(before_BT == segment_ids_BT)[..., None], before_BTD, before_BTD)",
    ),
    (
        "initialisation not scaled by depth",
        "residual = (2.0 * (layer + 1)) ** -0.5",
        "residual = (2.0 * (0 * layer + 1)) ** -0.5",
        "tests/models/test_initialisation.py",
    ),
    (
        "recomputation never switched on",
        'if self.remat != "none":',
        'if self.remat == "always":',
    ),
    (
        "tokens that do not exist enter the normaliser",
        "jnp.where(token_C < V, logits_BTC, jnp.finfo(jnp.float32).min)",
        "jnp.where(token_C <= V + 999, logits_BTC, jnp.finfo(jnp.float32).min)",
        "tests/models/test_token_nll.py",
    ),
    (
        "nll outside of the masks",
        "nll_BT = jnp.where(where_BT, normalizer_BT - target_logit_BT, 0.0)",
        "nll_BT = normalizer_BT - target_logit_BT",
        "tests/models/test_token_nll.py",
    ),
    (
        "accuracy counts what was not masked",
        "(target_logit_BT >= best_BT) & where_BT)",
        "target_logit_BT >= best_BT)",
        "tests/models/test_token_nll.py",
    ),
    (
        "norms counted once per model",
        "norms = a.d_model * (2 * a.num_layers + 1)",
        "norms = a.d_model * (2 * a.num_layers)",
        "tests/models/test_initialisation.py",
    ),
    (
        "activation rule lost after attention",
        'x_BTD = constrain(x_BTD, "act_batch", "act_position", "act_embed")\n        with',
        "x_BTD = x_BTD\n        with",
        "tests/training/test_resources.py tests/models/test_transformer.py",
    ),
    (
        "activation rule lost in the feed-forward part",
        'jax.nn.silu(gate_BTF) * up_BTF, "act_batch", "act_position", "act_mlp"',
        'jax.nn.silu(gate_BTF) * up_BTF, "act_batch", "act_position", None',
        "tests/training/test_resources.py tests/models/test_transformer.py",
    ),
)

MODEL = _of(
    "llada_jax/models/model.py",
    "tests/models/test_transformer.py",
    (
        "window cut before the shift",
        "jax.lax.dynamic_slice_in_dim(hidden_BTD, start, length, axis=1)",
        "jax.lax.dynamic_slice_in_dim(hidden_BTD, start + 1, length, axis=1)",
    ),
    (
        "bfloat16 on the CPU by default",
        'if name == "auto":',
        'if name == "automatic":',
        "tests/verbs/test_train.py",
    ),
)

MASKS = _of(
    "llada_jax/masks.py",
    "tests/test_masks.py tests/models/test_transformer.py",
    (
        "causal attention without the position itself",
        "(key_index <= query_index)",
        "(key_index < query_index)",
    ),
    (
        "attention across documents",
        "allowed = query_segment == key_segment",
        "allowed = (query_segment > 0) == (key_segment > 0)",
    ),
    (
        "a block sees the next one",
        "key_index // mask.block_length <= query_index // mask.block_length",
        "key_index // mask.block_length <= query_index // mask.block_length + 1",
    ),
)

FLOPS = _of(
    "llada_jax/models/flops.py",
    "tests/models/test_flops.py",
    ("attention counted half", "12 * num_layers", "6 * num_layers"),
    ("causal attention counted whole", "attention / 2 if causal", "attention if causal"),
)

CORRUPTION = _of(
    "llada_jax/objectives/corruption.py",
    "tests/objectives",
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
        "one key for all rows",
        "return (offset + row_B.astype(jnp.float32) / num_rows) % 1.0",
        "return (offset + 0 * row_B.astype(jnp.float32) / num_rows) % 1.0",
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

MASKED_DIFFUSION = _of(
    "llada_jax/objectives/masked_diffusion.py",
    "tests/objectives",
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
    (
        "levels of noise shifted by one",
        "bucket_B = jnp.minimum((t_B * NUM_T_BUCKETS).astype(jnp.int32), NUM_T_BUCKETS - 1)",
        "bucket_B = jnp.minimum((t_B * NUM_T_BUCKETS).astype(jnp.int32) + 1, NUM_T_BUCKETS - 1)",
    ),
)

AUTOREGRESSIVE = _of(
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

DENOISE = _of(
    "llada_jax/samplers/denoise.py",
    "tests/samplers/test_denoise.py tests/samplers/test_distributions.py "
    "tests/samplers/test_published_samples.py tests/samplers/test_eos.py",
    (
        "the same noise in every step",
        "keys_for_rows(jax.random.fold_in(key, step), fixed.row_B)",
        "keys_for_rows(key, fixed.row_B)",
        "tests/samplers/test_denoise.py tests/objectives/test_draws.py "
        "tests/samplers/test_distributions.py",
    ),
    (
        "EOS filled in before its block is finished",
        "jnp.where(steps_left == 1, ended_BT, new_canvas_BT)",
        "ended_BT",
        "tests/samplers/test_eos.py tests/samplers/test_denoise.py",
    ),
    (
        "EOS of the prompt ends a row",
        "is_eos_BT = (canvas_BT == eos_id) & is_generated_BT",
        "is_eos_BT = canvas_BT == eos_id",
    ),
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
        "guidance one too weak",
        "(fixed.cfg_scale + 1) * (logits_BTV - unprompted_BTV)",
        "fixed.cfg_scale * (logits_BTV - unprompted_BTV)",
    ),
    (
        "the remainder revealed last",
        "count_B = -(-jnp.sum(is_hidden_BT, axis=1) // steps_left)",
        "count_B = jnp.sum(is_hidden_BT, axis=1) // steps_left",
    ),
    (
        "ties go to the right",
        "jnp.argsort(jnp.argsort(-confidence_BT, axis=1, stable=True), axis=1)",
        "jnp.argsort(jnp.argsort(-confidence_BT[:, ::-1], axis=1, stable=True), axis=1)[:, ::-1]",
    ),
    (
        "temperature squared",
        "logits_BTV + temperature * jax.vmap(noise)(keys_B)",
        "logits_BTV + temperature**2 * jax.vmap(noise)(keys_B)",
    ),
    (
        "rows numbered within their batch",
        "np.arange(first_row, first_row + len(canvas_BT), dtype=np.int32)",
        "np.arange(len(canvas_BT), dtype=np.int32)",
    ),
)

REMASKING = _of(
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

STEP = _of(
    "llada_jax/training/step.py",
    "tests/training tests/objectives/test_draws.py",
    (
        "identical masks in every step",
        'key_for("corruption", seed, state.step)',
        'key_for("corruption", seed)',
        "tests/objectives/test_draws.py tests/training/test_step_contract.py",
    ),
    (
        "the logged rate one step off",
        "jnp.float32(schedule(state.step))",
        "jnp.float32(schedule(state.step + 1))",
        "tests/objectives/test_draws.py",
    ),
    (
        "the state not donated",
        "jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))",
        "jax.jit(step, out_shardings=(shardings, None))",
        "tests/training/test_resources.py tests/training/test_step_contract.py",
    ),
    (
        "divided by the count of the last microbatch",
        "(grads, count, metrics), _ = jax.lax.scan(add_part, zeros, parts)",
        "(grads, count, metrics), _ = jax.lax.scan(add_part, zeros, parts); count /= num_microbatches",
        "tests/training/test_microbatches.py tests/training/test_step_contract.py",
    ),
    (
        "rows numbered within their microbatch",
        'split_microbatches({**batch, "row": jnp.arange(num_rows)}, num_microbatches)',
        'split_microbatches({**batch, "row": jnp.arange(num_rows) // num_microbatches}, '
        "num_microbatches)",
        "tests/training/test_microbatches.py tests/training/test_step_contract.py",
    ),
    (
        "the average of the parameters before the update",
        "ema = jax.tree.map(average, state.ema, params)",
        "ema = jax.tree.map(average, state.ema, state.params)",
        "tests/training/test_average.py tests/training/test_optim.py",
    ),
    (
        "no warm-up of the average",
        "return jnp.minimum(ema_decay, (1.0 + step) / (10.0 + step))",
        "return jnp.float32(ema_decay)",
        "tests/training/test_average.py",
    ),
    (
        "a step that is not finite keeps its average",
        "lambda n, o: jnp.where(is_finite, n, o), (params, opt_state, ema, metrics), old",
        "lambda n, o: jnp.where(is_finite, n, o), (params, opt_state, state.ema, metrics), old",
        "tests/training",
    ),
    (
        "the vocabulary not rounded to 64",
        "-(-tokenizer.vocab_size // 64) * 64",
        "tokenizer.vocab_size",
        "tests/verbs/test_train.py tests/training",
    ),
)

OPTIM = _of(
    "llada_jax/training/optim.py",
    "tests/training/test_optim.py",
    (
        "a first step without a rate",
        "(step + 1) / max(warmup_steps, 1)",
        "step / max(warmup_steps, 1)",
    ),
    ("a stage begins late", "tokens >= begin, first", "tokens > begin, first"),
    (
        "wsd decays from the start",
        "decay_steps = max(1, round(num_steps * decay_fraction))",
        "decay_steps = num_steps",
    ),
    (
        "the cosine ends halfway",
        "1.0 + jnp.cos(jnp.pi * done)",
        "1.0 + jnp.cos(jnp.pi / 2 * done)",
    ),
    (
        "weight decay not decoupled",
        "optax.chain(\n        optax.clip_by_global_norm(clip_norm) if clip_norm else optax.identity(),\n        direction,\n        decoupled_weight_decay(weight_decay, weight_decay_multipliers)\n        if weight_decay\n        else optax.identity(),",
        "optax.chain(\n        optax.clip_by_global_norm(clip_norm) if clip_norm else optax.identity(),\n        decoupled_weight_decay(weight_decay, weight_decay_multipliers)\n        if weight_decay\n        else optax.identity(),\n        direction,",
    ),
    (
        "b1 twice",
        "optax.scale_by_adam(b1=b1, b2=b2, eps=eps)",
        "optax.scale_by_adam(b1=b1, b2=b1, eps=eps)",
    ),
    (
        "the rate of the optimizer's own count",
        "count = state.count if step is None else step",
        "count = state.count",
        "tests/training/test_state.py",
    ),
    (
        "patterns match a part of the path",
        "if pattern.fullmatch(name):",
        "if pattern.search(name):",
    ),
)

STATE = _of(
    "llada_jax/training/state.py",
    "tests/training tests/whole_runs/test_meshes.py",
    (
        "moments of the optimizer replicated",
        "if shape == leaf.shape:",
        'if shape == leaf.shape and "mu" not in name:',
    ),
    (
        "the average shares the parameters' buffers",
        "ema=jax.tree.map(jnp.copy, params) if abstract.ema else {},",
        "ema={},",
    ),
)

LIKELIHOOD = _of(
    "llada_jax/evaluation/likelihood.py",
    "tests/evaluation",
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
        "tests/evaluation tests/whole_runs/test_stops_in_evaluations.py",
    ),
)

SPLITS = _of(
    "llada_jax/evaluation/splits.py",
    "tests/evaluation/test_splits.py",
    (
        "evaluate ignores attend_across_documents",
        "attend_across_documents=attend_across_documents,\n    )",
        "attend_across_documents=True,\n    )",
        "tests/evaluation/test_splits.py tests/whole_runs/test_averages.py",
    ),
    ("only one corruption", "num_draws=num_draws,", "num_draws=1,"),
)

HELDOUT = _of(
    "llada_jax/run/heldout.py",
    "tests/run tests/whole_runs/test_averages.py",
    (
        "bits per byte of a mixture from the first source",
        'bytes_per_token=summary.bytes_per_token["heldout"]',
        'bytes_per_token=summaries[0].bytes_per_token["heldout"]',
    ),
    (
        "sums of other weights are continued",
        'content["step"] == step and content["settings"] == self._settings',
        'content["settings"] == self._settings',
        "tests/run tests/whole_runs/test_stops_in_evaluations.py",
    ),
)

TRAIN = _of(
    "llada_jax/verbs/train.py",
    "tests/verbs/test_train.py tests/whole_runs/test_averages.py",
    (
        "evaluations ignore the average",
        "(WEIGHTS[config.evaluation.weights] is not False and state.ema) or state.params",
        "state.params",
    ),
    (
        "the state is saved before the metrics",
        "                    writer.flush()\n                    ledger.mark(step)",
        "                    ledger.mark(step)",
        "tests/verbs/test_train.py tests/whole_runs/test_resume.py",
    ),
    (
        "batches of a rollback come back",
        "batch_of_step(step + 1, opened.rollbacks.skipped) - 1",
        "step",
        "tests/verbs/test_rollback.py",
    ),
    (
        "sums of the log line before are kept",
        "state = state._replace(metrics=zero_metrics(state.metrics))",
        "zero_metrics(state.metrics)",
        "tests/verbs/test_train.py",
    ),
)

START = _of(
    "llada_jax/run/start.py",
    "tests/whole_runs/test_averages.py tests/verbs/test_train.py",
    (
        "init_from ignores the average",
        "ema=reads_ema(theirs, init_from_ema, init_from)",
        "ema=False",
    ),
    (
        "hosts with other configs train together",
        'multihost_utils.assert_equal(digest, "config")',
        'multihost_utils.assert_equal(0 * digest, "config")',
        "tests/whole_runs/test_refused_starts.py tests/whole_runs/test_errors_of_configs.py",
    ),
)

CHECKPOINTS = [
    *_of(
        "llada_jax/checkpoints/workdir.py",
        "tests/checkpoints tests/whole_runs/test_errors_of_checkpoints.py",
        (
            "a checksum that differs is accepted",
            "if number != saved.get(path):",
            "if path not in saved:",
        ),
        (
            "a reader removes half-written steps",
            "cleanup_tmp_directories=owned,",
            "cleanup_tmp_directories=True,",
        ),
        (
            "the oldest step is taken",
            "steps[-1] if step is None else step",
            "steps[0] if step is None else step",
        ),
    ),
    *_of(
        "llada_jax/checkpoints/host_copies.py",
        "tests/checkpoints",
        ("one local copy is kept", "KEEP = 2", "KEEP = 1"),
    ),
]

ROLLBACKS = _of(
    "llada_jax/run/rollbacks.py",
    "tests/verbs/test_rollback.py",
    ("a stretch one batch short", "batch += last - first + 1", "batch += last - first"),
    (
        "stretches in the order of the file",
        "for first, last in sorted(skipped):",
        "for first, last in skipped:",
    ),
)

DATA = [
    *_of(
        "llada_jax/data/packing.py",
        "tests/data/test_packing.py tests/data/test_loader.py",
        (
            "no EOS between documents",
            "tokens += [document, [eos_id]]",
            "tokens += [document, document[:1]]",
        ),
        ("documents never start", "is_start[0] = True", "is_start[0] = False"),
        ("the last row is lost", "    if length:\n", "    if length > sequence_length:\n"),
        ("twice as much held out", "number < fraction * 2**64", "number < fraction * 2**65"),
    ),
    *_of(
        "llada_jax/data/loader.py",
        "tests/data/test_loader.py",
        (
            "the first row in every place",
            "batch * self._batch_size + self._rows[place]",
            "batch * self._batch_size + self._rows[0]",
        ),
        (
            "one order for all seeds",
            "seed=_stream(seed, _SHUFFLE, number)",
            "seed=_stream(0, _SHUFFLE, number)",
        ),
        (
            "mixtures ignore their weights",
            "[weight for _, weight in sources])\n",
            "[1.0 for _ in sources])\n",
        ),
        (
            "random length never a whole row",
            'rng.integers(1, len(row["tokens"]), endpoint=True)',
            'rng.integers(1, len(row["tokens"]))',
        ),
        ("padding is maskable", '"is_maskable": is_real_T,', '"is_maskable": is_real_T | True,'),
        (
            "a start in the middle begins at the front",
            "batch = self._batch_number(self._start_step + step)",
            "batch = self._batch_number(step)",
        ),
        (
            "held-out evaluation of the first rows",
            "default_rng(subset_seed).permutation(len(records))[:num_rows]",
            "default_rng(subset_seed).permutation(num_rows)",
        ),
        (
            "tokens per byte",
            "name: split.num_bytes / split.num_tokens",
            "name: split.num_tokens / split.num_bytes",
        ),
    ),
]

RNG = _of(
    "llada_jax/rng.py",
    "tests/objectives tests/samplers/test_distributions.py",
    (
        "one key for all purposes",
        "zlib.crc32(purpose.encode())",
        "len(purpose) * 0",
        "tests/training tests/objectives",
    ),
    (
        "one key for all rows of a batch",
        "jax.random.fold_in(key, row))(row_B)",
        "jax.random.fold_in(key, row * 0))(row_B)",
    ),
)

SHARDING = _of(
    "llada_jax/cluster/sharding.py",
    "tests/cluster/test_sharding.py tests/training/test_resources.py",
    (
        "the batch on the data axis alone",
        '"act_batch": ("data", "fsdp", "expert")',
        '"act_batch": ("data",)',
    ),
    ("heads replicated", '"act_heads": "tensor"', '"act_heads": None'),
    ("parameters not split over fsdp", '"embed": "fsdp"', '"embed": None'),
)

HARDWARE = _of(
    "llada_jax/cluster/hardware.py",
    "tests/cluster/test_hardware.py tests/planning/test_estimate.py",
    (
        "links of v5p half as fast",
        "hbm_bandwidth=2.77e12,\n        link_bandwidth=1200e9",
        "hbm_bandwidth=2.77e12,\n        link_bandwidth=600e9",
    ),
    (
        "usable memory of v4",
        "usable_hbm_bytes=int(30.75 * GIB)",
        "usable_hbm_bytes=int(31.75 * GIB)",
    ),
    ("data centre network of v5e", "dcn_bandwidth=3.125e9", "dcn_bandwidth=6.25e9"),
    ("NVLink of the h100", "989, 80, 3.35, 900,", "989, 80, 3.35, 600,"),
)

RECIPES = _of(
    "configs/llada_8b.py",
    "tests/config tests/models/test_initialisation.py",
    ("half the published batch", "config.data.batch_size = 1280", "config.data.batch_size = 640"),
    ("another feed-forward width", "config.model.d_ff = 12_288", "config.model.d_ff = 14_336"),
    ("2.0T tokens", "2_300_000_000_000", "2_000_000_000_000"),
)

HF = _of(
    "llada_jax/hf/convert.py",
    "tests/hf/test_convert.py tests/models/test_parity.py",
    (
        "a transposed tensor",
        "array.transpose([self.dims.index(letter) for letter in self._hf_letters])",
        "array.transpose([self._hf_letters.index(letter) for letter in self.dims])",
    ),
    (
        "a bias forgotten",
        '"blocks/attn_out_bias": a.attention_bias != "qkvo"',
        '"blocks/attn_out_bias": True',
    ),
    ("the head exported although it is tied", '"lm_head": a.tie_embeddings', '"lm_head": False'),
)

SWEEPS = [
    *_of(
        "llada_jax/sweeps/grid.py",
        "tests/sweeps/test_grid.py",
        ("zip drops the rest", "if len(set(lengths)) > 1:", "if len(set(lengths)) > 99:"),
        ("a knob set twice", "if name in merged:", "if name in ():"),
    ),
    *_of(
        "llada_jax/sweeps/scaling_law.py",
        "tests/sweeps/test_scaling_law.py",
        (
            "the optimum without its 6",
            "parameters = G * (compute / 6) ** self.a.value",
            "parameters = G * compute ** self.a.value",
        ),
        (
            "the vertex on the wrong side",
            "np.log(sizes).mean() - slope / (2 * curvature)",
            "np.log(sizes).mean() + slope / (2 * curvature)",
        ),
    ),
]

LAUNCH = [
    *_of(
        "launch/local.py",
        "tests/launch/test_local.py",
        (
            "processes outlive their launcher",
            "preexec_fn=tied_to(os.getpid()),",
            "preexec_fn=None,",
        ),
        (
            "42 counts as much as a failure",
            "key=lambda code: code == 42 or code < 0",
            "key=lambda code: 0",
        ),
    ),
]

FAULTS: list[Fault] = [
    fault
    for group in (
        TRANSFORMER,
        MODEL,
        MASKS,
        FLOPS,
        CORRUPTION,
        MASKED_DIFFUSION,
        AUTOREGRESSIVE,
        DENOISE,
        REMASKING,
        STEP,
        OPTIM,
        STATE,
        LIKELIHOOD,
        SPLITS,
        HELDOUT,
        TRAIN,
        START,
        CHECKPOINTS,
        ROLLBACKS,
        DATA,
        RNG,
        SHARDING,
        HARDWARE,
        RECIPES,
        HF,
        SWEEPS,
        LAUNCH,
    )
    for fault in group
]

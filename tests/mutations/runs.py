"""Plausible faults of training and of what happens to a run."""

from mutations.fault import faults_of

AVERAGES = (
    "tests/whole_runs/test_averages.py"
    "::test_evaluations_load_and_init_from_read_what_they_are_asked_to"
)

STEP = faults_of(
    "llada_jax/training/step.py",
    "tests/training/test_state.py tests/training/test_average.py",
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
        "divided by the count of one microbatch",
        "grad / jnp.maximum(count, 1.0), grads)",
        "grad / jnp.maximum(count / num_microbatches, 1.0), grads)",
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
        "tests/training/test_state.py tests/training/test_average.py",
    ),
)

OPTIM = faults_of(
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
        "weight decay with the wrong sign",
        "u + rate * factor * p if factor else u",
        "u - rate * factor * p if factor else u",
    ),
    (
        "b1 twice",
        "        b1=b1, b2=b2, eps=eps, mu_dtype=first_moment_dtype",
        "        b1=b1, b2=b1, eps=eps, mu_dtype=first_moment_dtype",
    ),
    (
        "lion with its decays swapped",
        "        b1=b1, b2=b2, mu_dtype=first_moment_dtype",
        "        b1=b2, b2=b1, mu_dtype=first_moment_dtype",
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

STATE = faults_of(
    "llada_jax/training/state.py",
    "tests/training/test_average.py "
    "tests/whole_runs/test_meshes.py"
    "::test_parameters_and_optimizer_state_are_created_in_shards",
    (
        "moments of the optimizer replicated",
        "        while name:\n            shape, sharding",
        '        while name and "/mu/" not in name:\n            shape, sharding',
    ),
    (
        "the average shares the parameters' buffers",
        "ema=jax.tree.map(jnp.copy, params) if abstract.ema else {},",
        "ema={},",
    ),
)

HELDOUT = faults_of(
    "llada_jax/run/heldout.py",
    "tests/run/test_heldout.py",
    (
        "bits per byte of a mixture from the first source",
        'bytes_per_token=summary.bytes_per_token["heldout"]',
        'bytes_per_token=summaries[0].bytes_per_token["heldout"]',
    ),
    (
        "sums of other weights are continued",
        "found == [step, num_batches, self._settings]",
        "found[1:] == [num_batches, self._settings]",
    ),
    (
        "sums of other data are continued",
        '"data": data.record(), "weights": weights',
        '"weights": weights',
    ),
)

METRICS = faults_of(
    "llada_jax/run/metrics_file.py",
    "tests/run/test_metrics_file.py",
    ("samples are never sent to a bucket", "            self._samples.flush()\n", ""),
    (
        "a line that lacks its end is kept",
        'if entry["step"] <= step and line.endswith("\\n"):',
        'if entry["step"] <= step:',
    ),
)

TRAIN = faults_of(
    "llada_jax/verbs/train.py",
    AVERAGES,
    (
        "evaluations ignore the average",
        "(WEIGHTS[config.evaluation.weights] is not False and state.ema) or state.params",
        "state.params",
    ),
    (
        "held-out bounds during training ignore the average",
        "step, weights_of(state), state.frozen, config.evaluation.num_batches",
        "step, state.params, state.frozen, config.evaluation.num_batches",
    ),
    (
        "samples during training ignore the average",
        "network = recipe.objective.network(weights_of(state), state.frozen)",
        "network = recipe.objective.network(state.params, state.frozen)",
    ),
    (
        "batches of a rollback come back",
        "batch_of_step(step + 1, opened.rollbacks.skipped) - 1",
        "step",
        "tests/verbs/test_rollback.py"
        "::test_left_out_batches_stay_out_when_the_run_later_goes_back_before_them",
    ),
    (
        "sums of the log line before are kept",
        "state = state._replace(metrics=zero_metrics(state.metrics))",
        "zero_metrics(state.metrics)",
        "tests/verbs/test_train.py::test_metrics_hold_the_curve_and_keep_the_machine_apart",
    ),
)

START = faults_of(
    "llada_jax/run/start.py",
    AVERAGES,
    (
        "init_from ignores the average",
        "ema=reads_ema(theirs, init_from_ema, init_from)",
        "ema=False",
    ),
    (
        "a step that only local copies have stays there",
        "if continued is not None and start_step not in saved.steps:",
        "if False:",
        "tests/checkpoints/test_tiers.py",
    ),
)

CHECKPOINTS = [
    *faults_of(
        "llada_jax/checkpoints/workdir.py",
        "tests/checkpoints/test_workdir.py tests/whole_runs/test_errors_of_checkpoints.py",
        (
            "a checksum that differs is accepted",
            "if number != saved.get(item, {}).get(key):",
            "if key not in saved.get(item, {}):",
        ),
        (
            "the record of a checkpoint has no checksum",
            "custom_metadata=sealed(record)",
            "custom_metadata=record.to_json()",
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
    *faults_of(
        "llada_jax/checkpoints/host_copies.py",
        "tests/checkpoints/test_host_copies.py",
        ("one local copy is kept", "KEEP = 2", "KEEP = 1"),
    ),
]

CONTINUATION = faults_of(
    "llada_jax/checkpoints/continuation.py",
    "tests/checkpoints/test_continuation.py",
    (
        "the order of a mixture may change",
        "return [(source.fingerprint, source.share) for source in record.data]",
        "return sorted((source.fingerprint, source.share) for source in record.data)",
    ),
)

STORAGE = [
    *faults_of(
        "llada_jax/storage/remote.py",
        "tests/storage/test_remote.py::"
        "test_a_move_that_is_cut_short_leaves_one_folder_that_is_whole",
        (
            "the mark is copied before what it stands for",
            "for names in (others, [first]):",
            "for names in ([first], others):",
        ),
    ),
    *faults_of(
        "llada_jax/storage/files.py",
        "tests/storage/test_files.py",
        (
            "the older directory is gone before the new one has its name",
            "        path.rename(replaced)\n    partial.rename(path)",
            "        shutil.rmtree(path)\n    partial.rename(path)",
        ),
    ),
    *faults_of(
        "llada_jax/storage/locks.py",
        "tests/storage/test_locks.py",
        (
            "whole sweeps share a directory",
            "fcntl.LOCK_SH if shared else fcntl.LOCK_EX",
            "fcntl.LOCK_EX if shared else fcntl.LOCK_SH",
        ),
    ),
]

GOING_BACK = faults_of(
    "llada_jax/verbs/rollback.py",
    "tests/verbs/test_rollback.py",
    (
        "the oldest of the later steps is moved first",
        "sorted((step for step in steps if step > to), reverse=True)",
        "sorted(step for step in steps if step > to)",
    ),
)

ROLLBACKS = faults_of(
    "llada_jax/run/rollbacks.py",
    "tests/verbs/test_rollback.py",
    ("a stretch one batch short", "batch += last - first + 1", "batch += last - first"),
    (
        "stretches in the order of the file",
        "for first, last in sorted(skipped):",
        "for first, last in skipped:",
    ),
    (
        "the record of an older checkpoint counts more than the list",
        "if recorded and not found.count else found",
        "if recorded else found",
    ),
)

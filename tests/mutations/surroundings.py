"""Plausible faults of data, conversion, hardware, recipes, sweeps and launchers."""

from mutations.fault import faults_of

DATA = [
    *faults_of(
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
    *faults_of(
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
            "name: split.num_scored_bytes / split.num_scored_tokens",
            "name: split.num_scored_tokens / split.num_scored_bytes",
        ),
    ),
    *faults_of(
        "llada_jax/data/shards.py",
        "tests/data/test_shards.py tests/data/test_records.py",
        (
            "the checksum of a record is not compared",
            "elif zlib.crc32(record) != int",
            "elif zlib.crc32(record) == -int",
        ),
        (
            "records lie as if they had no checksum",
            "number * size, size)",
            "number * self._record_size, size)",
        ),
    ),
    *faults_of(
        "llada_jax/data/assembly.py",
        "tests/data/test_assembly.py tests/data/test_preparation_restarts.py",
        (
            "a shard that was cut short counts as finished",
            " or _size(output / shard.file) != shard.num_bytes",
            "",
        ),
        (
            "the note of an older shard stays while it is replaced",
            "            _note(output, shard, key=None)\n",
            "            _note(output, shard, key=shard.key)\n",
        ),
    ),
    *faults_of(
        "llada_jax/data/parts.py",
        "tests/data/test_joined_parts.py",
        (
            "sums of the first part alone",
            "for part in parts) for count",
            "for part in parts[:1]) for count",
        ),
        ("the same inputs in two parts", "!= number:", "== -1:"),
        (
            "parts of several lengths",
            "if value != settings[0][what]:",
            "if value is None:",
        ),
        (
            "parts with several chat templates",
            '"--chat settings": _chat_of(content["source"].get("chat")),',
            '"--chat settings": None,',
        ),
    ),
    *faults_of(
        "llada_jax/data/build.py",
        "tests/data/test_preparation_restarts.py",
        (
            "a receipt that outlives its records",
            "    receipt_path(job.output, unit).unlink(missing_ok=True)\n",
            "",
        ),
    ),
    *faults_of(
        "llada_jax/data/duplicates.py",
        "tests/data/test_duplicates.py",
        (
            "copies on both sides of a block's end are kept",
            "slice(start, start + BLOCK + 1)",
            "slice(start, start + BLOCK)",
        ),
        (
            "a note of other inputs outlives them",
            "            note.unlink(missing_ok=True)\n",
            "            pass\n",
        ),
    ),
    *faults_of(
        "launch/slurm.py",
        "tests/launch/test_slurm_jobs.py",
        (
            "the last job of an array starts all of them again",
            'scontrol requeue "${{job:-$SLURM_JOB_ID}}"',
            'scontrol requeue "$SLURM_JOB_ID"',
        ),
    ),
]

HARDWARE = faults_of(
    "llada_jax/cluster/hardware.py",
    "tests/cluster/test_hardware.py tests/planning/test_estimate.py "
    "tests/planning/test_step_time.py",
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

COMPILED_PROGRAMS = faults_of(
    "llada_jax/planning/hlo.py",
    "tests/planning/test_compiled_program.py",
    ("loops without their first iteration start at 0", "start = start or 0", "start = 0"),
    (
        "limits of loops inside of fusions are not found",
        'for i in condition if i.opcode == "fusion"]',
        'for i in condition if i.opcode == "call"]',
    ),
)

RECIPES = faults_of(
    "configs/llada_8b.py",
    "tests/config/test_config_files.py tests/models/test_initialisation.py",
    ("half the published batch", "config.data.batch_size = 1280", "config.data.batch_size = 640"),
    ("another feed-forward width", "config.model.d_ff = 12_288", "config.model.d_ff = 14_336"),
    ("2.0T tokens", "2_300_000_000_000", "2_000_000_000_000"),
)

HF = faults_of(
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
    *faults_of(
        "llada_jax/sweeps/grid.py",
        "tests/sweeps/test_grid.py",
        ("zip drops the rest", "if len(set(lengths)) > 1:", "if len(set(lengths)) > 99:"),
        ("a knob set twice", "if name in merged:", "if name in ():"),
    ),
    *faults_of(
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
    *faults_of(
        "launch/tpu_vm_commands.py",
        "tests/launch/test_tpu_vm_commands.py",
        (
            "exports without quotes",
            'f"export {name}={shlex.quote(value)}"',
            'f"export {name}={value}"',
        ),
    ),
    *faults_of(
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

WHAT_A_USER_WRITES = [
    *faults_of(
        "llada_jax/paths.py",
        "tests/test_paths.py",
        (
            "a directory called ~ is the home directory",
            'os.path.abspath(text) if os.path.normpath(text).startswith("~") else text',
            "text",
        ),
    ),
    *faults_of(
        "llada_jax/validation.py",
        "tests/config/test_validation.py",
        (
            "knobs that another one switches off are taken",
            "if value != default and not is_on(knob(config, switch)):",
            "if False:",
        ),
    ),
]

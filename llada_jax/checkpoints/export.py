"""A checkpoint as a Hugging Face directory: what goes into it, how it is written and compared.

Weights go from the checkpoint to the files one layer of one parameter at a time, so that a host
reads what it writes and holds no more than that. Everything is written into OUTPUT.partial, which
takes its name only when it is whole.
"""

from pathlib import Path
from typing import NamedTuple

import jax

from llada_jax.checkpoints.layers import LayerReader
from llada_jax.checkpoints.record import RunRecord
from llada_jax.checkpoints.workdir import Checkpoints
from llada_jax.cluster import sharding
from llada_jax.data.tokenizer import Tokenizer
from llada_jax.hf.card import Training
from llada_jax.hf.convert import Tensor
from llada_jax.hf.directory import becoming, everywhere
from llada_jax.hf.peft import peft_files
from llada_jax.hf.verify import compare_with_torch, tokens_to_compare
from llada_jax.hf.write import Shard, write_weights
from llada_jax.models.model import abstract_parameters, make_model
from llada_jax.storage import files


class Export(NamedTuple):
    """What an export will be, before anything is written.

    found, step, record: the checkpoint. tokenizer: of the run. weights: "params" or "ema", the item
    of the checkpoint that is exported. layout: "llada" or "illada". dtype: of the files. tensors,
    shards: what the files of weights will hold. others: every other file by its name.
    """

    found: Checkpoints
    step: int
    record: RunRecord
    tokenizer: Tokenizer
    weights: str
    layout: str
    dtype: str
    tensors: list[Tensor]
    shards: list[Shard]
    others: dict[str, bytes]


def training_of(record: RunRecord, step: int) -> Training:
    """Returns what the card says about the training, from the record of a checkpoint."""
    return Training(
        step=step,
        tokens=record.tokens or 0,
        batch_size=record.knob("data.batch_size"),
        sequence_length=record.sequence_length,
        learning_rate=_peak_rate(record),
        schedule=record.knob("schedule.name"),
        optimizer=record.knob("optimizer.name"),
        # not a knob of the first versions
        scores_average=record.keeps_ema
        and record.config.get("evaluation", {}).get("weights") != "raw",
        imported_from=None if record.source is None else record.source.get("from", ""),
        init_from=record.knob("checkpoint.init_from"),
        data=tuple((source.fingerprint, source.share) for source in record.data),
        versions=record.versions,
        commit=record.commit,
    )


def _peak_rate(record: RunRecord) -> float:
    """Returns the largest learning rate of the schedule, warm-up aside."""
    if record.knob("schedule.name") == "llada":
        # which reads no other knob
        return max(rate for _, *rates in record.knob("schedule.stages") for rate in rates)
    return record.knob("schedule.learning_rate")


def write_model(export: Export, output: Path, *, verify: bool, force: bool) -> dict | None:
    """Writes the directory, from all processes of a run together.

    Args:
        verify: whether PyTorch's logits are compared with the checkpoint's before the directory
            takes its name.
        force: whether an older export is replaced.

    Returns what the comparison found (see `compared`), None without one.

    Raises:
        UserError: the checkpoint cannot be read, or the disk refuses.
        NumericsError: the comparison failed.
    """
    reader = LayerReader(export.found, export.step, ema=export.weights == "ema")
    with becoming(output, force=force) as partial:
        # a host that cannot read would not come to the check, and the others would wait for it
        with everywhere(output):
            write_weights(
                partial,
                export.tensors,
                export.shards,
                read=reader.read,
                num_layers=export.record.architecture.num_layers,
                dtype=export.dtype,
            )
        # Once all hosts have read their layers, and before the directory gets its name.
        reader.check()
        if jax.process_index() == 0:
            for name, content in export.others.items():
                (partial / name).parent.mkdir(exist_ok=True)
                files.write_whole(partial / name, content)
        return compared(partial, export) if verify else None


def write_adapters(export: Export, output: Path, *, force: bool) -> None:
    """Writes a directory with the adapters alone."""
    with becoming(output, force=force) as partial:
        if jax.process_index() == 0:
            for name, content in export.others.items():
                files.write_whole(partial / name, content)


def adapters_of(export: Export) -> dict[str, bytes]:
    """Returns the files of a directory with the adapters alone."""
    record = export.record
    return peft_files(
        lambda path, shape: export.found.read_array(export.step, f"{export.weights}/{path}", shape),
        record.architecture,
        record.lora,
        layout=export.layout,
        base=record.knob("checkpoint.init_from"),
    )


def compared(directory: Path, export: Export) -> dict:
    """Returns how far PyTorch's logits of an export are from the checkpoint's, and on which tokens.

    Raises:
        NumericsError: too far, or the export cannot be loaded.
    """
    record = export.record
    dataset = record.data[0].directory if record.data else None
    tokens_BT, origin = tokens_to_compare(dataset, export.tokenizer)
    mesh = sharding.one_device_mesh()
    # Read again, in the way of `sample`: what the export was written from cannot vouch for itself.
    params = export.found.restore_params(
        export.step,
        abstract_parameters(make_model(record.architecture), mesh),
        ema=export.weights == "ema",
    )
    found = compare_with_torch(
        directory, record.architecture, params, tokens_BT, mask=record.mask, dtype=export.dtype
    )
    return {**found, "num_tokens": tokens_BT.size, "tokens": origin}

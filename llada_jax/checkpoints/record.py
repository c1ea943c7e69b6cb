"""run.json as a typed record: what a checkpoint was made from.

The same record is in WORKDIR/run.json (as of the last start), in the metadata of every
checkpoint (with its step and its checksums), and next to every local copy. It is the one place in
which a run describes itself, so that a checkpoint can be loaded, sampled and exported without the
config file and without the code of the objective.
"""

import dataclasses
import datetime
import json
import platform
import subprocess
import zlib
from pathlib import Path
from typing import Any, Self

import jax
from etils import epath

from llada_jax import __version__, schemas
from llada_jax.checkpoints.checksums import SCHEMES
from llada_jax.data.tokenizer import SPECIAL_IDS, Tokenizer
from llada_jax.errors import UserError
from llada_jax.masks import BIDIRECTIONAL, CAUSAL, Mask
from llada_jax.models.adapters import Lora
from llada_jax.models.transformer import Architecture
from llada_jax.storage import files, remote

FILE = "run.json"
# The key of its checksum in a record that is kept next to arrays; see `sealed`.
SEAL = "record_checksum"


@dataclasses.dataclass(frozen=True)
class TokenizerIdentity:
    """Which tokenizer a run was trained with; the tokenizer itself lies in WORKDIR/tokenizer.

    kind: of the codec, such as "bytes". vocab_size: in tokens. fingerprint: a digest of its files.
    """

    kind: str
    vocab_size: int
    fingerprint: str


@dataclasses.dataclass(frozen=True)
class DataSource:
    """A dataset that a run reads.

    directory: where it was; nothing depends on it. fingerprint: of its records. share: of the rows
    of the mixture, 0 to 1.
    """

    directory: str
    fingerprint: str
    share: float


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """What run.json says about a run.

    config: the whole config as nested dicts of JSON values. `knob` reads from it.
    architecture: of the network.
    tokenizer: which one.
    data: the datasets; empty for weights that came from elsewhere.
    versions: {"jax": "0.10.2", ...}, of those who wrote it. commit: of the checkout, "" without
        one. started: when, ISO 8601 in UTC.
    recorded_mask: what attention may see; None where it was not recorded. `mask` answers always.
    parts: {knob: where it came from} of the user's own parts (llada_jax.parts.provenance).
    rollbacks: {"count", "skipped"}, see llada_jax.run.rollbacks; None before there could be any.
    step, tokens: how far the checkpoint is; None in WORKDIR/run.json, which is written at the
        start.
    special_ids, chat_template: of the tokenizer, {"mask": id, ...} and a Jinja template (None if it
        has none); older versions wrote them for imported checkpoints alone.
    source: of an imported checkpoint, {"from", "layout", "config"}.
    lengths: of the training texts in tokens, {"answers" or "documents": {"median", "most" (of 99%),
        "longest"}}; None where they were not counted.
    checksums: {item: {path of an array: checksum}}, in a checkpoint.
    checksum_scheme: how they were computed (llada_jax.checkpoints.checksums.SCHEMES).
    run_id: of the run that began in the workdir, by which its local copies are known from those of
        a run that was in the same place before; 0 in a run that an older version began.
    unknown: what a newer version wrote and this one does not know, kept as it is.
    """

    config: dict[str, Any]
    architecture: Architecture
    tokenizer: TokenizerIdentity
    data: tuple[DataSource, ...] = ()
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    commit: str = ""
    started: str = ""
    recorded_mask: Mask | None = None
    parts: dict[str, dict] | None = None
    rollbacks: dict[str, Any] | None = None
    step: int | None = None
    tokens: int | None = None
    special_ids: dict[str, int] | None = None
    chat_template: str | None = None
    source: dict[str, Any] | None = None
    lengths: dict[str, dict[str, int]] | None = None
    checksums: dict[str, dict[str, int]] | None = None
    # 1 and not the newest: a record without this field is of a version that knew no other.
    checksum_scheme: int = 1
    run_id: int = 0
    unknown: dict[str, Any] = dataclasses.field(default_factory=dict)

    def knob(self, name: str):
        """Returns a knob of the config by its dotted name, such as "optimizer.ema_decay".

        Raises:
            UserError: the run was written by a version that did not have it.
        """
        try:
            return _field(self.config, name, object)
        except _WrongField as error:
            raise UserError(
                f"The config of a checkpoint that {self.writer} wrote {error}; use that version."
            ) from error

    @property
    def writer(self) -> str:
        """The version that wrote the record, such as "llada_jax 0.1.0"."""
        return f"llada_jax {self.versions.get('llada_jax', 'of an unknown version')}"

    @property
    def sequence_length(self) -> int:
        """Tokens per row of the data that it was trained on."""
        return self.knob("data.sequence_length")

    @property
    def lora(self) -> Lora:
        """The adapters that its parameters are; those of rank 0 in runs without any."""
        knobs = self.config.get("lora", {})
        return Lora(**{name: knobs[name] for name in Lora._fields if name in knobs})

    @property
    def objective(self) -> str:
        """The name of the training objective."""
        return self.knob("objective.name")

    @property
    def keeps_ema(self) -> bool:
        """Whether checkpoints hold a moving average of the parameters."""
        return self.knob("optimizer.ema_decay") > 0

    @property
    def first_moment_dtype(self) -> str:
        """The dtype in which checkpoints hold the optimizer's first moment."""
        # not a knob of the first versions
        return self.knob("optimizer").get("first_moment_dtype", "float32")

    @property
    def mask(self) -> Mask:
        """What attention may see in the network.

        Known without loading the objective, which may be of the user's own making and not be at
        hand where the checkpoint is sampled or exported.
        """
        if self.recorded_mask is not None:
            return self.recorded_mask
        # Written before the mask was recorded, or for weights that came from elsewhere. Only these
        # two objectives existed then, so that here, and nowhere else, a name decides.
        return CAUSAL if self.objective == "autoregressive" else BIDIRECTIONAL

    @property
    def num_rollbacks(self) -> int:
        """How often the run had gone back when this was written."""
        return self.rollbacks["count"] if self.rollbacks else 0

    def at(self, step: int, tokens: int) -> Self:
        """Returns the record of a checkpoint of the run."""
        return dataclasses.replace(self, step=step, tokens=tokens)

    def to_json(self) -> dict:
        """Returns run.json as plain JSON values.

        Keys and their order are a format: older versions read these files. A key of which there is
        nothing to say is left out and not written as null, since older versions ask with `in`.
        """
        content = {
            "config": self.config,
            "architecture": _shallow(self.architecture),
            "tokenizer": _shallow(self.tokenizer),
            "data": [_shallow(source) for source in self.data],
            "versions": self.versions,
            "commit": self.commit,
            "started": self.started,
            "mask": None if self.recorded_mask is None else self.recorded_mask._asdict(),
            "parts": self.parts,
            "rollbacks": self.rollbacks,
            "step": self.step,
            "tokens": self.tokens,
            "special_ids": self.special_ids,
            "chat_template": self.chat_template,
            "source": self.source,
            "lengths": self.lengths,
            "checksums": self.checksums,
            # Scheme 1 is not written, as in the records of the versions that had no other.
            "checksum_scheme": self.checksum_scheme if self.checksum_scheme != 1 else None,
            "run_id": self.run_id or None,
        }
        # A tokenizer without a template is recorded as null.
        null = {"chat_template"} if self.special_ids is not None else set()
        content = {key: value for key, value in content.items() if value is not None or key in null}
        # Through JSON, so that what was just made equals what is read back: tuples become lists.
        return json.loads(json.dumps({**content, **self.unknown}))

    @classmethod
    def from_json(cls, content: Any, *, file, remedy: str = "") -> Self:
        """Returns the record that a run.json holds.

        Fields that older versions did not write have their defaults, those of an Architecture
        included. Top-level keys that this version does not know are kept; an unknown key of the
        architecture is refused, because the network would not be the one that was trained.

        Args:
            content: the parsed JSON.
            file: where it comes from, for messages.
            remedy: what the user can do when it is not a record, without a full stop.

        Raises:
            UserError: a field is missing or of the wrong type, or the content does not match the
                checksum that `sealed` has added.
        """
        remedy = remedy or "it is damaged, or not written by llada_jax; use another checkpoint"
        try:
            return cls._parsed(content)
        except _WrongField as error:
            raise UserError(f"{file} {error}; {remedy}.") from error

    @classmethod
    def _parsed(cls, content) -> Self:
        if not isinstance(content, dict):
            raise _WrongField(f"holds a {type(content).__name__} where an object is expected")
        # Checked first: a damaged record would otherwise be blamed on whichever field was hit.
        if SEAL in content:
            # Not kept: the record of another step would carry it on.
            content = dict(content)
            if content.pop(SEAL) != _checksum(content):
                raise _WrongField("does not match its saved checksum")
        config = _field(content, "config", dict)
        # What every reader asks for. The other knobs are looked up by those who need them, so that
        # a checkpoint of an older version without them loads.
        _field(content, "config.objective.name", str)
        _field(content, "config.optimizer.ema_decay", (int, float))
        if "lora" in config:
            lora = _field(content, "config.lora", dict)
            if fault := schemas.fault_of(lora, schemas.RecordedLora):
                raise _WrongField(f"has a config.lora that {fault}")
        optional = {
            "versions": (dict, {}),
            "commit": (str, ""),
            "started": (str, ""),
            "parts": (dict, None),
            "rollbacks": (dict, None),
            "step": (int, None),
            "tokens": (int, None),
            "special_ids": (dict, None),
            "chat_template": (str, None),
            "source": (dict, None),
            "lengths": (dict, None),
            "checksums": (dict, None),
            "checksum_scheme": (int, 1),
            "run_id": (int, 0),
        }
        values: dict[str, Any] = {
            # null is read like a missing key: a tokenizer without a template is recorded so.
            key: default if content.get(key) is None else _field(content, key, kind)
            for key, (kind, default) in optional.items()
        }
        if values["rollbacks"] is not None:
            _field(content, "rollbacks.count", int)
            _field(content, "rollbacks.skipped", list)
        # Another scheme cannot be guessed: an undamaged checkpoint would be reported as damaged.
        if values["checksum_scheme"] not in SCHEMES:
            raise _WrongField(
                f"has checksum_scheme={values['checksum_scheme']}, which llada_jax {__version__} "
                "does not know: a newer version has written it"
            )
        known = {"config", "architecture", "tokenizer", "data", "mask", *optional}
        return cls(
            config=config,
            architecture=_architecture(_field(content, "architecture", dict)),
            tokenizer=TokenizerIdentity(
                _field(content, "tokenizer.kind", str),
                _field(content, "tokenizer.vocab_size", int),
                _field(content, "tokenizer.fingerprint", str),
            ),
            data=tuple(
                DataSource(
                    _field(source, "directory", str, f"has a dataset (data[{i}]) that"),
                    _field(source, "fingerprint", str, f"has a dataset (data[{i}]) that"),
                    _field(source, "share", (int, float), f"has a dataset (data[{i}]) that"),
                )
                for i, source in enumerate(_field(content, "data", list))
            ),
            recorded_mask=_mask(_field(content, "mask", dict)) if content.get("mask") else None,
            **values,
            unknown={key: value for key, value in content.items() if key not in known},
        )


def sealed(record: RunRecord) -> dict:
    """Returns the JSON of a record with a checksum of all of it.

    For records that are kept next to arrays, which are read as the record says: a flipped bit may
    leave valid JSON in which, say, rope_theta is ten times as large. No array is read as
    WORKDIR/run.json says, which has none; nor have the records of older versions.
    """
    content = record.to_json()
    return {**content, SEAL: _checksum(content)}


def _checksum(content: dict) -> int:
    """Returns the CRC-32 of JSON values, whatever the order of their keys."""
    # A CRC suffices against damage; nothing here protects against someone who edits the record.
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


class _WrongField(ValueError):
    """What is wrong with a record, as the words that follow the name of its file."""


def _field(content, name: str, kind: type | tuple, whose: str = ""):
    """Returns the value at a dotted name; `whose` precedes the fault."""
    value = content
    for key in name.split("."):
        if not isinstance(value, dict) or key not in value:
            raise _WrongField(f"{whose} has no field {name!r}".lstrip())
        value = value[key]
    # bool is an int to isinstance, and never one here
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not object):
        shown = json.dumps(value)
        kinds = kind if isinstance(kind, tuple) else (kind,)
        expected = " or ".join(_JSON_NAMES[k] for k in kinds)
        shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
        raise _WrongField(f"{whose} has {name}={shown}, which must be {expected}".lstrip())
    return value


_JSON_NAMES = {
    dict: "an object",
    list: "a list",
    str: "a text",
    int: "a whole number",
    float: "a number",
}


def _architecture(content: dict) -> Architecture:
    unknown = sorted(set(content) - {field.name for field in dataclasses.fields(Architecture)})
    if unknown:
        raise _WrongField(
            f"has architecture.{unknown[0]}, which llada_jax {__version__} does not know: a newer "
            "version has written it"
        )
    if fault := schemas.fault_of(content, schemas.RecordedArchitecture):
        raise _WrongField(f"has an architecture that {fault}")
    try:
        return Architecture(**content)
    except UserError as error:
        raise _WrongField(f"has an architecture that is not possible ({error})") from error


def _mask(content: dict) -> Mask:
    # As with the architecture: a mask of a kind that this version does not have cannot be ignored.
    unknown = sorted(set(content) - set(Mask._fields))
    if unknown:
        raise _WrongField(
            f"has mask.{unknown[0]}, which llada_jax {__version__} does not know: a newer version "
            "has written it"
        )
    if fault := schemas.fault_of(content, schemas.RecordedMask):
        raise _WrongField(f"has a mask that {fault}")
    return Mask(**content)


def _shallow(record) -> dict:
    """Returns the fields of a dataclass; unlike dataclasses.asdict it copies nothing."""
    return {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}


# ---- where it is written and read


def run_record(
    config, architecture: Architecture, tokenizer: Tokenizer, *, data: list[dict], **more
) -> RunRecord:
    """Returns the record of a run that starts now, with the versions and the commit of this code.

    Args:
        config: the ConfigDict of the run.
        data: directory, fingerprint and share of each dataset; [] for weights that came from
            elsewhere.
        more: further fields of RunRecord, by name.
    """
    return RunRecord(
        # Tuples become lists, as in a record that is read back: the two are compared at a restart.
        config=json.loads(json.dumps(config.to_dict())),
        architecture=architecture,
        tokenizer=TokenizerIdentity(tokenizer.kind, tokenizer.vocab_size, tokenizer.fingerprint),
        data=tuple(DataSource(**source) for source in data),
        versions={
            "llada_jax": __version__,
            "python": platform.python_version(),
            "jax": jax.__version__,
        },
        commit=git_commit(),
        started=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **more,
    )


def read_run(workdir) -> RunRecord:
    """Returns the record in WORKDIR/run.json, of the last start of a run.

    Raises:
        UserError: it is not there, cannot be read, or is not a record.
    """
    file = remote.path_of(workdir) / FILE
    remedy = "remove it and start the run again, which goes on from its checkpoints"
    with files.reading(file, remedy="change its permissions and repeat the command"):
        if not file.exists():
            raise UserError(
                f"{workdir} has no {FILE}; give the workdir of a run that `llada-jax train` began."
            )
        text = file.read_bytes()
    try:
        content = files.decode_json(text)
    except ValueError as error:
        raise UserError(f"{file} is not valid JSON ({error}); {remedy}.") from error
    return RunRecord.from_json(content, file=file, remedy=f"it is damaged; {remedy}")


def write_run(workdir, tokenizer: Tokenizer, record: RunRecord, *, config_text: str = "") -> None:
    """Writes WORKDIR/tokenizer, config.py and run.json, each whole or not at all.

    Args:
        config_text: the file that the config came from, kept as it is: run.json holds the values,
            and the file the reasons that its comments give. "" writes none.

    Raises:
        OSError: the disk refuses.
    """
    path = epath.Path(workdir)
    # In a bucket a folder of objects does not appear at once: it is a tokenizer once it has the
    # file that is written last. On a disk it takes its name when it is whole.
    tokenizer_path = path / "tokenizer"
    mark = tokenizer_path / SPECIAL_IDS if remote.is_remote(workdir) else tokenizer_path
    if not mark.exists():
        with files.whole_directory(tokenizer_path) as partial:
            tokenizer.save(partial)
    if config_text:
        files.write_whole(path / "config.py", config_text)
    # Last, so that a run.json never names a tokenizer that is not there yet.
    files.write_whole(path / FILE, json.dumps(record.to_json(), indent=1) + "\n")


def reads_ema(record: RunRecord, wanted: bool | None, checkpoint) -> bool:
    """Returns whether to read the moving average of a checkpoint, or else its raw parameters.

    Args:
        wanted: True or False says which; None takes the average where one is kept.

    Raises:
        UserError: the average is wanted and none was kept.
    """
    if wanted and not record.keeps_ema:
        raise UserError(
            f"The moving average of {checkpoint} is asked for and its run kept none "
            "(optimizer.ema_decay=0); ask for the raw parameters."
        )
    return record.keeps_ema if wanted is None else wanted


def git_commit() -> str:
    """Returns the commit of the checkout that this package lies in; "" for an installed package, or
    without git.
    """
    root = Path(__file__).parents[2]
    # Without this check, git would report the repository that the environment happens to lie in.
    if not (root / ".git").exists():
        return ""
    try:
        done = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:
        # there is no git here, as in most containers
        return ""
    return done.stdout.strip()

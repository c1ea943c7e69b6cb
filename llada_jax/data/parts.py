"""A data set that is prepared in parts, each on a machine and from inputs of its own.

A part is a complete data set in a folder below that of the whole, and can be prepared there or be
copied there, also into a bucket. Joining them writes one dataset.json that names the shards where
they are: no record is read or moved, and a reader sees the joined data set whole or not at all.
"""

import re
from collections import defaultdict
from collections.abc import Sequence

from etils import epath

from llada_jax.data.build import LOSSES, fingerprint
from llada_jax.data.dialogue_units import dialogues_json
from llada_jax.data.lengths import LENGTHS, lengths_json
from llada_jax.data.records import (
    FORMAT,
    DatasetInfo,
    check_shards,
    parse_dataset,
    read_json_of,
    write_dataset_json,
)
from llada_jax.errors import UserError
from llada_jax.storage import files
from llada_jax.storage.remote import path_of

# Of the inputs of a part in its dataset.json, so that a file that two parts have read is noticed.
INPUTS = "inputs"
_NAME = re.compile(r"part-(\d{5})-of-(\d{5})")
# What the parts of one data set must have in common, by its name for the user.
_SHARED = {
    "--sequence-length": lambda info: info.sequence_length,
    "tokenizers": lambda info: {
        name: value for name, value in info.tokenizer.items() if name != "kind"
    },
}


def part_folder(output, number: int, num_parts: int):
    """Returns the folder of a part, whose number counts from 0."""
    return epath.Path(output) / f"part-{number:05d}-of-{num_parts:05d}"


def parse_part(text: str) -> tuple[int, int]:
    """Returns (I, N) of "I/N"; UserError unless 0 <= I < N."""
    match = re.fullmatch(r"([0-9]{1,5})/([0-9]{1,5})", text)
    if not match or not int(match[1]) < int(match[2]):
        raise UserError(
            f"--part {text} must be I/N, with I from 0 to N-1: 0/8 is the first of eight parts and "
            "7/8 the last."
        )
    return int(match[1]), int(match[2])


def join_parts(directory) -> dict:
    """Writes the dataset.json of a directory that holds all parts, local, gs:// or s3://, and
    returns its content. The records of part 0 come first.

    Raises:
        UserError: a part is missing or damaged, the parts do not fit together, two have read the
            same inputs, or the directory was joined from other parts before.
    """
    directory = path_of(directory)
    folders = _find_parts(directory)
    contents = _read_parts(directory, folders)
    infos = [parse_dataset(folder, content) for folder, content in zip(folders, contents)]
    _check_that_they_fit(infos, contents)
    for info in infos:
        check_shards(info)
    content = _joined(folders, infos, contents)
    try:
        before = read_json_of(directory)
    except UserError:
        # there is none, so that nothing differs
        before = content
    # not its sources, which may have moved
    if any(before.get(name) != content[name] for name in ("fingerprint", "splits")):
        raise UserError(
            f"{directory} was joined before, from parts with other records; a run that reads it "
            f"would be refused at its next start: delete {directory / 'dataset.json'} to join "
            "these."
        )
    with files.writing(directory, remedy="free some space or check the permissions"):
        (directory / "tokenizer").mkdir(parents=True, exist_ok=True)
        for file in (folders[0] / "tokenizer").iterdir():
            # each machine that has finished a part may try to join them
            path = directory / "tokenizer" / file.name
            files.write_whole(path, file.read_bytes(), concurrent=True)
    write_dataset_json(directory, content, concurrent=True)
    return content


def _find_parts(directory: epath.Path) -> list[epath.Path]:
    """Returns the folders of all parts, in order, whether they are there or not."""
    try:
        found = [_NAME.fullmatch(entry.name) for entry in directory.iterdir()]
    except (FileNotFoundError, NotADirectoryError):
        found = []
    nums_parts = sorted({int(match[2]) for match in found if match})
    if not nums_parts:
        raise UserError(
            f"{directory} holds no parts of a data set: give the --output of llada-jax prepare "
            "--part."
        )
    if len(nums_parts) > 1:
        raise UserError(
            f"{directory} holds parts of data sets with {' and '.join(map(str, nums_parts))} "
            "parts; remove those that do not belong there."
        )
    (num_parts,) = nums_parts
    return [part_folder(directory, number, num_parts) for number in range(num_parts)]


def _read_parts(directory: epath.Path, folders: Sequence[epath.Path]) -> list[dict]:
    """Returns what is in each dataset.json."""
    contents, missing = [], []
    for number, folder in enumerate(folders):
        try:
            contents.append(read_json_of(folder))
        except UserError as error:
            if not isinstance(error.__cause__, OSError):
                raise
            missing.append(number)
    if missing:
        which = ", ".join(map(str, missing[:10])) + ", ..." * (len(missing) > 10)
        raise UserError(
            f"Of the {len(folders)} parts of {directory}, {len(missing)} are missing or not "
            f"finished: {which}; run llada-jax prepare --part {missing[0]}/{len(folders)} with its "
            "inputs, or copy its folder there."
        )
    for folder, content in zip(folders, contents):
        if content["format"] != FORMAT:
            raise UserError(f"{folder} was prepared by version 0.1; prepare it again to join it.")
    return contents


def _check_that_they_fit(infos: Sequence[DatasetInfo], contents: Sequence[dict]) -> None:
    settings = [
        {
            **{what: of(info) for what, of in _SHARED.items()},
            "--chat settings": _chat_of(content["source"].get("chat")),
        }
        for info, content in zip(infos, contents)
    ]
    for info, found in zip(infos, settings):
        for what, value in found.items():
            if value != settings[0][what]:
                raise UserError(
                    f"{infos[0].directory} and {info.directory} were prepared with different "
                    f"{what}; prepare one of them again with those of the other."
                )
    read_by: dict[str, int] = {}
    for number, content in enumerate(contents):
        for file in content["source"].get(INPUTS, []):
            if read_by.setdefault(file, number) != number:
                raise UserError(
                    f"Parts {read_by[file]} and {number} have read some of the same input files; "
                    "give each part inputs of its own, and prepare one of the two again."
                )


def _chat_of(chat: dict | None) -> dict | None:
    """Returns what decides the records of a finished part: a malformed record is in neither of a
    part that skips it and of one that has none.
    """
    return chat and {name: value for name, value in chat.items() if name != "malformed"}


def _joined(
    folders: Sequence[epath.Path], infos: Sequence[DatasetInfo], contents: Sequence[dict]
) -> dict:
    """Returns the content of dataset.json."""
    splits: dict[str, dict] = {}
    for name, first in contents[0]["splits"].items():
        parts = [content["splits"][name] for content in contents]
        splits[name] = {
            count: sum(part[count] for part in parts) for count in first if count != "shards"
        }
        splits[name]["shards"] = [
            {**shard, "file": f"{folder.name}/{shard['file']}"}
            for folder, part in zip(folders, parts)
            for shard in part["shards"]
        ]
    sources = [content["source"] for content in contents]
    sums: dict[str, int] = defaultdict(int)
    for source in sources:
        for name in ("num_files", "num_empty_documents", "num_duplicate_documents", *LOSSES):
            if name in source:
                sums[name] += source[name]
    content = {
        **{name: value for name, value in contents[0].items() if name != LENGTHS},
        **lengths_json(contents),
        "fingerprint": fingerprint([content["fingerprint"] for content in contents]),
        "splits": splits,
        "source": {
            **sums,
            **({"drop_duplicates": True} if all("drop_duplicates" in s for s in sources) else {}),
            "parts": [
                {name: value for name, value in source.items() if name != INPUTS}
                for source in sources
            ],
        },
    }
    if infos[0].dialogues:
        content["dialogues"] = dialogues_json(contents, infos[0].dialogues)
    return content

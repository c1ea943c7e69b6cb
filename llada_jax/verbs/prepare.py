"""The verb prepare: turns raw text into a tokenizer and packed records, in parallel. Running it
again after an interruption continues.
"""

import argparse
import functools
import os

from llada_jax.data.build import COUNTS
from llada_jax.data.dialogue_units import CHAT_CHOICES, ChatSettings
from llada_jax.data.lengths import ANSWERS, LENGTHS, described
from llada_jax.data.parts import join_parts, parse_part
from llada_jax.data.preparation import prepare
from llada_jax.data.text import Cut
from llada_jax.errors import UserError
from llada_jax.streams import write_line
from llada_jax.verbs.command_line import Parser, json_text

# Unless parts are joined.
_REQUIRED = ("--input", "--output", "--sequence-length", "--tokenizer")


def main(argv: list[str]) -> None:
    """Runs the verb."""
    parser = make_parser()
    args = parser.parse_args(argv)
    given = {flag: getattr(args, flag[2:].replace("-", "_")) for flag in (*_REQUIRED, "--part")}
    if args.join is not None:
        alone = parser.parse_args([f"--join={args.join}", *["--json"] * args.json])
        others = [name for name, value in vars(args).items() if value != getattr(alone, name)]
        if others:
            raise UserError(
                f"--join takes what the parts were prepared with from them; leave "
                f"--{others[0].replace('_', '-')} out."
            )
        return report(args.join, join_parts(args.join), as_json=args.json)
    if absent := [flag for flag in _REQUIRED if given[flag] is None]:
        parser.error(f"the following arguments are required: {', '.join(absent)}")
    if "," in args.output or "=" in os.path.basename(args.output.rstrip("/")):
        raise UserError(
            f"--output {args.output} has a comma in it or = in its name, which config.data.path "
            "would read as a mixture of data sets; choose another name."
        )
    part = None if args.part is None else parse_part(args.part)
    cut = Cut(
        documents=args.documents,
        text_field=args.text_field,
        document_start=args.document_start,
        form=args.format,
    )
    if args.chat is not None and (
        args.documents or args.document_start or args.text_field != "text" or args.drop_duplicates
    ):
        raise UserError(
            "--documents, --document-start, --text-field and --drop-duplicates are for text, and "
            "--chat reads dialogues; leave them out."
        )
    content = prepare(
        args.input,
        args.output,
        sequence_length=args.sequence_length,
        tokenizer=args.tokenizer,
        cut=cut,
        heldout=args.heldout,
        workers=args.workers,
        add_mask_token=args.add_mask_token,
        drop_duplicates=args.drop_duplicates,
        chat=None if args.chat is None else chat_settings(args.chat),
        part=part,
    )
    report(args.output, content, as_json=args.json)
    if part:
        write_line(
            f"prepare: part {part[0]} of {part[1]} is finished; when all of them are, run "
            f"llada-jax prepare --join {args.output}"
        )


def report(output: str, content: dict, *, as_json: bool) -> None:
    """Prints what was written: dataset.json, or a summary of it."""
    print(json_text(content, indent=2, ensure_ascii=False) if as_json else summary(output, content))


def make_parser() -> Parser:
    parser = Parser(
        "prepare",
        "Tokenizes raw text and packs it into the records that train reads. Run it again to "
        "continue.",
        "llada-jax prepare --input books/ --output data/books --sequence-length 1024 --tokenizer "
        "spm:8000",
    )
    parser.usage = (
        "llada-jax prepare --input PATH... --output DIR --sequence-length T --tokenizer SPEC "
        "[flags]"
    )
    # wide enough for --input in one line, so that the help fits a screen
    parser.formatter_class = functools.partial(
        argparse.RawDescriptionHelpFormatter, max_help_position=28
    )
    add = parser.add_argument
    add(
        "--input",
        nargs="+",
        metavar="PATH",
        help="files, globs, directories or URLs",
    )
    add("--output", metavar="DIR", help="local directory of the data set")
    add("--sequence-length", type=int, metavar="T", help="tokens per record")
    add(
        "--tokenizer",
        metavar="SPEC",
        help="spm:8000 or spm-bpe:8000 (trained), bytes, or a PATH",
    )
    add(
        "--format",
        default="",
        choices=("txt", "jsonl", "parquet"),
        metavar="F",
        help="txt, jsonl or parquet, whatever the names end in",
    )
    add("--text-field", default="text", metavar="F", help="field or column with the text (text)")
    add(
        "--documents",
        default="",
        choices=("file", "line", "record"),
        metavar="HOW",
        help="a document is a file, line or record (.txt: file, others: record)",
    )
    add(
        "--document-start",
        default="",
        metavar="RE",
        help="a .txt line that matches begins a new document",
    )
    add(
        "--heldout",
        type=float,
        default=0.01,
        metavar="P",
        help="share of the documents to hold out (0.01)",
    )
    add("--workers", type=int, default=_num_cores(), metavar="N", help="processes (one per core)")
    add(
        "--add-mask-token",
        action="store_true",
        help="append a mask token to a tokenizer that has none",
    )
    add(
        "--drop-duplicates",
        action="store_true",
        help="leave out documents that are exact copies of an earlier one",
    )
    add(
        "--chat",
        nargs="*",
        metavar="K=V",
        help="dialogues or pairs; template=llada, turns=all, ...: docs/finetuning.md",
    )
    add("--part", metavar="I/N", help="write part I (from 0) of N, each with inputs of its own")
    add("--join", metavar="DIR", help="make one data set of the parts in DIR, also gs:// or s3://")
    add("--json", action="store_true", help="print dataset.json instead of the summary")
    return parser


def chat_settings(words: list[str]) -> ChatSettings:
    """Returns what the words after --chat say; UserError for a name or a value that is unknown."""
    settings = {}
    for word in words:
        name, _, value = word.partition("=")
        if name != "template" and name not in CHAT_CHOICES:
            raise UserError(
                f"--chat {word}: there is no setting {name!r}; known are template, "
                f"{', '.join(CHAT_CHOICES)}, as in --chat template=llada rows=padded."
            )
        if name in CHAT_CHOICES and value not in CHAT_CHOICES[name]:
            raise UserError(
                f"--chat {word}: {value!r} is not known; {name} is one of "
                f"{', '.join(CHAT_CHOICES[name])}."
            )
        settings[name] = value
    if settings.get("records") == "pairs" and "turns" in settings:
        raise UserError(
            f"--chat turns={settings['turns']} is for dialogues; of pairs, the last answers are "
            "compared: leave it out."
        )
    return ChatSettings(**settings)


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def summary(output, content: dict) -> str:
    """Returns a few lines about what was written."""
    splits = content["splits"]
    total = {name: sum(split[name] for split in splits.values()) for name in COUNTS}
    bytes_per_token = total["num_bytes"] / total["num_tokens"]
    lines = [
        f"{output}: {total['num_documents']:,} documents, {total['num_bytes']:,} bytes, "
        f"{total['num_tokens']:,} tokens ({bytes_per_token:.3f} bytes/token), "
        f"vocabulary {content['tokenizer']['vocab_size']:,}"
    ]
    for name, split in splits.items():
        padding = split["num_padding"] / max(1, split["num_records"] * content["sequence_length"])
        lines.append(
            f"  {name:<8}{split['num_records']:>12,} records of {content['sequence_length']:,} "
            f"tokens, {split['num_documents']:,} documents, {split['num_bytes']:,} bytes, "
            f"{padding:.3%} padding"
        )
    if copies := content["source"].get("num_duplicate_documents"):
        dropped = "drop_duplicates" in content["source"]
        fate = "were left out" if dropped else "are kept; --drop-duplicates leaves them out"
        lines.append(f"  {copies:,} documents are exact copies of an earlier one and {fate}")
    if content["source"]["num_empty_documents"]:
        lines.append(f"  {content['source']['num_empty_documents']:,} empty documents were skipped")
    lines += _lines_of_dialogues(content["dialogues"]) if "dialogues" in content else []
    if lengths := described(content.get(LENGTHS, {}).get(ANSWERS, {})):
        lines.append(
            f"  half of the answers to train on have up to {lengths['median']:,} tokens, 99% up to "
            f"{lengths['most']:,}, the longest {lengths['longest']:,}, their ends included"
        )
    if "num_lossy_documents" in content["source"]:
        lines.append(
            f"  {content['source']['num_lossy_documents']:,} documents lose text in the tokenizer, "
            f"{content['source']['num_lost_bytes']:,} bytes in all, which num_bytes leaves out"
        )
    return "\n".join(lines)


def _lines_of_dialogues(told: dict) -> list[str]:
    lines = []
    if told["num_malformed"]:
        kinds = "; ".join(f"{number:,}: {why}" for why, number in told["malformed"].items())
        lines += [
            f"  {told['num_malformed']:,} malformed records were skipped ({kinds})",
            f"  the first of them is {told['first_malformed']}",
        ]
    if told["num_too_long"]:
        # complete data sets of version 0.1 have neither "records" nor "first_too_long"
        lines.append(
            f"  {told['num_too_long']:,} {told.get('records', 'dialogues')} were too long, of "
            f"which {told['num_cut']:,} lost their beginning and the others were left out"
        )
        if first := told.get("first_too_long"):
            lines.append(f"  the first of them is {first}")
    return lines

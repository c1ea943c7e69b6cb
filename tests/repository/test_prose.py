"""The English of the project: no known stumbles, and one sentence per line of Markdown.

`stumbles(text)` takes any text: a page without its code, a docstring, a message, a comment.
"""

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest
from support.paths import ROOT

PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *(
        page
        for folder in ("docs", "benchmarks", "configs")
        for page in sorted((ROOT / folder).rglob("*.md"))
    ),
]
PAGES = [page for page in PAGES if page.is_file()]
SOURCES = [
    ROOT / "setup.py",
    *(
        path
        for folder in ("llada_jax", "configs", "launch", "benchmarks", "docs", "tests")
        for path in sorted((ROOT / folder).rglob("*.py"))
        # This file quotes stumbles, and fixtures are what other versions wrote.
        if path != Path(__file__) and ROOT / "tests/fixtures" not in path.parents
    ),
]

# A quantity in front of "a host" shows that "per host" is meant: "4 bytes a parameter",
# "one process a node", "once a step". Without it, "a host reads its rows" is plain English.
QUANTITY = (
    r"(?:\d[\w.,]*|once|twice|times|one \w+|a (?:process|thread|pod|log|file|job|line|shard)|bits?|"
    r"bytes?|[KMGT]i?B|nats?|tokens?|FLOPs?|rows?|steps?|batches|threads|processes|devices|hosts|"
    r"chips|cores|GPUs|numbers|files|pods|shards|seconds|hours|lines)"
)
WHOLE = (
    r"(?:accelerator|batch|block|byte|chip|core|day|device|document|epoch|file|GPU|host|hour|index|"
    r"interval|layer|line|machine|microbatch|month|node|parameter|position|process|record|row|run|"
    r"second|shard|slice|split|step|token|unit|week)"
)

STUMBLES = {
    r"mend(?:s|ed|ing)?": "fix",
    r"beside": "next to, compared with, in addition to",
    r"tells(?! (?:\w+ ){0,4}apart)": "says, reports, shows",
    r"(?:is|are|was|were|be|been) told(?! (?:to|apart)\b)": "receives; or name what is said",
    r"nobody|anybody|somebody|everybody": "name who it is, or use the passive voice",
    r"(?<!user )(?<!who )(?<!you )wants": "needs, takes",
    r"(?:has|have|had) not (?:a|an|the|any|enough|its|their|yet a)": "does not have",
    r"(?<!there )(?:is|are|was|were) no "
    r"(?!longer|more|less|fewer|better|worse|doubt|matter|\w+er than)[a-z]\w*": ("is not a"),
    # None with a capital is a value of Python.
    r"(?<!there )(?:is|are) (?-i:none)(?! of)": "is not one",
    r"of an? [\w-]+ each": "with one ... per ...",
    rf"{QUANTITY} an? {WHOLE}(?! (?:that|is|has|takes|needs|holds|can|must|of\b))": "per",
    r"(?:stands?|stood) (?:in|on|at|here|there)(?! for\b)": "is",
    r"stood still": "hung",
    r"anew": "again",
    r"in the place of": "instead of",
    r"want an? (?:person|look|file|device|process)": "needs",
    r"stands? (?:above|between)": "is",
    r"without return": "cannot be undone",
    r"so many (?:of (?:its|the)|consecutive)": "how many; or give the number a name",
    r"train(?:s|ing)? on from": "continue from",
    r"train(?:s|ing)? (?:the )?(?:published )?(?:weights|model|network|LLaDA-\S+) on(?! \w)": (
        "continue to train"
    ),
    r"train(?:s|ing)? (?:[^\s,.]+ ){1,3}on with": "continue to train",
    r"multipl(?:y|ies|ied|ying) with": "multiply by",
    r"for ever": "forever",
    r"for want of": "because there is no ...",
    r"what came out": "the result",
    r"(?:here|there) it (?:has|is)(?=[.,;:])": "here it does; or repeat the noun",
    r"hardly (?:room|space|time|memory)": "hardly any",
    r"arguments are those of": "takes the arguments of",
}
EXPRESSIONS = {
    re.compile(rf"(?<![\w-])(?:{pattern})(?![\w-])", re.IGNORECASE): remedy
    for pattern, remedy in STUMBLES.items()
}


def stumbles(text: str) -> list[str]:
    """Returns for every stumble in a text its words, some context, and what to write instead."""
    text = " ".join(text.split())
    return [
        f"...{text[max(0, found.start() - 40) : found.end() + 30]}...: "
        f"instead of {found.group()!r} write: {remedy}"
        for expression, remedy in EXPRESSIONS.items()
        for found in expression.finditer(text)
    ]


def without_code(markdown: str) -> list[str]:
    """Returns the lines of a page: code blocks and equations are empty, inline code is `Code`."""
    lines, is_fenced, is_indented, is_equation, before = [], False, False, False, ""
    for line in markdown.splitlines():
        is_fence = line.lstrip().startswith("```")
        is_fenced ^= is_fence
        is_indented = (
            line.startswith("    ")
            and (is_indented or not before.strip())
            or (is_indented and not line.strip())
        )
        is_equation ^= line.count("$$") == 1
        is_code = is_fence or is_fenced or is_indented or is_equation or line.startswith("$$")
        line_before, before = before, line
        if is_code or (line_before.endswith("\\") and not lines[-1]):
            lines.append("")
            continue
        line = re.sub(r"`[^`]+`", "`Code`", line)
        line = re.sub(r"\$[^$]+\$", "Math", line)
        lines.append(re.sub(r"(!?)\[([^\]]*)\]\([^)]*\)", r"\1\2", line))
    return lines


ABBREVIATIONS = re.compile(
    r"\b(?:e\.g|i\.e|etc|vs|cf|al|eq|Eq|Fig|Sec|No|approx|incl|St|Mr|Mrs|Dr)\."
)
SENTENCE_END = re.compile(r"""[.!?]["'”*)\]]*\s+(?=["'“(*\[`]*[A-Z])""")


def prose(line: str) -> str:
    """Returns a line without its list marker, its bold heading, and the stops of abbreviations."""
    line = re.sub(r"^\s*(?:[-*+]|\d+\.)\s+", "", line)
    line = re.sub(r"^\*\*[^*]+\*\*", "", line)
    return ABBREVIATIONS.sub(lambda found: found.group().replace(".", ""), line)


def crowded_lines(markdown: str) -> list[str]:
    """Returns the lines of prose in which one sentence ends and the next begins."""
    lines = without_code(markdown)
    return [
        line
        for line in lines
        if not line.lstrip().startswith(("|", "#")) and SENTENCE_END.search(prose(line))
    ]


def wrapped_lines(markdown: str) -> list[str]:
    """Returns the lines of prose that end within a sentence, which goes on in the next line."""
    lines = without_code(markdown)
    is_prose = [bool(line.strip()) and not re.match(r"\s*(?:[|#<>]|!|---)", line) for line in lines]
    starts_item = [bool(re.match(r"\s*(?:[-*+]|\d+\.)\s", line)) for line in lines]
    return [
        lines[i]
        for i in range(len(lines) - 1)
        if is_prose[i]
        and is_prose[i + 1]
        and not starts_item[i + 1]
        and not re.search(r"""[.!?:]["'”*)\]]*$|\*\*$|  $|\\$""", lines[i].rstrip("\n"))
    ]


def texts(source: str) -> list[str]:
    """Returns the prose of a Python file: docstrings, texts of several words, comments."""
    found = []
    tree = ast.parse(source)
    in_formatted = {
        id(part)
        for node in ast.walk(tree)
        if isinstance(node, ast.JoinedStr)
        for part in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = (part.value if isinstance(part, ast.Constant) else "N" for part in node.values)
            found.append("".join(str(part) for part in parts))
        elif (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and id(node) not in in_formatted
        ):
            found.append(node.value)
    comments, line_before = [], -1
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            text = token.string.lstrip("# ")
            if token.start[0] == line_before + 1 and comments:
                comments[-1] += " " + text
            else:
                comments.append(text)
            line_before = token.start[0]
    return [text for text in [*found, *comments] if " " in text.strip()]


every_page = pytest.mark.parametrize(
    "page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix()
)


@every_page
def test_page_has_no_stumbles(page):
    found = stumbles("\n".join(without_code(page.read_text())))
    assert not found, "\n".join(found)


@every_page
def test_page_has_one_sentence_per_line(page):
    assert not crowded_lines(page.read_text())
    assert not wrapped_lines(page.read_text())


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_docstrings_messages_and_comments_have_no_stumbles(source):
    """Docstrings, messages and help texts (f-strings too, with N for their values), comments."""
    found = [each for text in texts(source.read_text()) for each in stumbles(text)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "text",
    [
        "mend it and run the command again",
        "it takes 12 bytes a parameter, and one process a node",
        "the gradient is reduced once a step",
        "'x' is no whole number",
        "12xh100 is no whole number of hosts",
        "the speed beside PyTorch",
        "a slice that nobody has rented yet",
        "it has not the checksum with which it was saved",
        "such a command wants one process",
        "all processes are told",
        "rows of a byte each",
        "the figures stand in the table",
        "Nobody has trained a model at scale",
        "any other status wants a person",
        "the heading stands above every message",
        "an upgrade is a step without return",
        "so many consecutive rows are one record",
        "how to train LLaDA-8B on.",
        "a config that trains on from them",
        "the product is multiplied with alpha / rank",
        "the processes wait for each other for ever",
        "it was not tested, for want of a GPU",
        "to try what came out",
        "it has no effect in the published code; here it has.",
        "the schedule has hardly room for a warm-up",
        "The arguments are those of sft_loss.",
    ],
)
def test_stumbles_are_found(text):
    assert stumbles(text)


@pytest.mark.parametrize(
    "text",
    [
        "There is no config file; besides, it is no longer read. A host reads its rows.",
        "It tells two processes apart. It is told to stop. Amend it. Every user wants a fast run.",
        "A step takes a batch. None of the files has changed. It is no larger than 4.",
        "It takes 12 bytes per parameter. This differs by a step. A stand-in runs.",
        "The text that it was trained on. For every token, the default is None. Here it has one.",
    ],
)
def test_plain_english_is_left_alone(text):
    assert not stumbles(text)


def test_crowded_and_wrapped_lines_are_found():
    page = "# A. Title\n\nOne sentence. `two` of them, e.g. These.\n"
    page += "A wrapped\nsentence, see Nie et al. Who.\n"
    page += (
        "\n- **Bold.** Item.\n- one\n  two\n\n    code. Code\n\n| a. B | c |\n\n```\nc. D\n```\n"
    )
    assert crowded_lines(page) == ["One sentence. `Code` of them, e.g. These."]
    assert wrapped_lines(page) == ["A wrapped", "- one"]

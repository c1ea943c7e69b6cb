"""`llada-jax chat`: a conversation with a model, in a terminal or through pipes."""

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator

import jax

from llada_jax.checkpoints.orbax_patches import drop_echoes
from llada_jax.conversation import Answer, Conversation, Question
from llada_jax.errors import UserError
from llada_jax.pretrained import load
from llada_jax.request_checks import length_hint, surprises
from llada_jax.samplers.denoise import DenoiseStep
from llada_jax.samplers.settings import check_request
from llada_jax.samplers.show import make_show, shown_generations
from llada_jax.sampling_flags import (
    add_checkpoint_flag,
    add_sampling_flags,
    check_unicode,
    more_flags,
    read_schedule,
    read_settings,
)
from llada_jax.storage import files
from llada_jax.streams import warn
from llada_jax.verbs.command_line import Parser, placement

# Defaults for an answer: its maximum length, and the maximum and minimum length of a block.
GEN_LENGTH, BLOCK_LENGTH, LEAST_BLOCK = 256, 32, 8
RESET = "/reset"
KEYS = f"{RESET} begins again, Ctrl-C stops an answer, Ctrl-D leaves."


def make_parser() -> Parser:
    parser = Parser(
        "chat",
        "A conversation with a model; its answers appear as they are denoised.",
        'llada-jax chat --checkpoint runs/sft_tiny --system "Be brief."',
    )
    parser.usage = "llada-jax chat --checkpoint CKPT [flags]"
    parser.epilog = f"{KEYS}\n\n{more_flags()}\n\n{parser.epilog}"
    add_checkpoint_flag(parser)
    parser.add_argument("--system", default="", metavar="TEXT", help="system message")
    add_sampling_flags(
        parser,
        gen_length_help=f"maximum tokens per answer ({GEN_LENGTH}, or half of the context)",
        block_length_help=f"tokens denoised together (default: at most {BLOCK_LENGTH})",
        append=None,
    )
    parser.add_ema_flag(is_listed=False)
    parser.add_placement_flags()
    return parser


def default_length(context: int) -> int:
    """Returns the most tokens of an answer: half of the context stays for the question."""
    half = max(1, min(GEN_LENGTH, context // 2))
    return half if half < BLOCK_LENGTH else half // BLOCK_LENGTH * BLOCK_LENGTH


def default_block(gen_length: int) -> int:
    """Returns the greatest number of tokens up to BLOCK_LENGTH that divides an answer; all of them
    where that would be fewer than LEAST_BLOCK.
    """
    block = max(size for size in range(1, BLOCK_LENGTH + 1) if gen_length % size == 0)
    return block if block >= LEAST_BLOCK else gen_length


def begin(args) -> Conversation:
    """Returns the conversation that the flags ask for. Every mistake in them is found before the
    model is loaded, as far as it does not depend on the model.
    """
    asked = {"block_length": args.block_length, "steps": args.steps}
    appends = args.lookahead is None if args.append is None else args.append
    is_asked = args.append is not None
    args.append = appends
    settings = read_settings(args)
    check_unicode([args.system], "--system", remedy="set the terminal to UTF-8")
    check_request(num_prompts=1, batch_size=1, seed=args.seed)
    if args.gen_length is not None:
        schedule = schedule_of(args)
    where = placement(args)
    if jax.process_count() > 1:
        raise UserError(
            f"A conversation is held by one process, and this run has {jax.process_count()}; use "
            "llada-jax sample --prompt-file on several hosts."
        )
    pretrained = load(
        args.checkpoint, ema=args.ema, tokenizer=args.tokenizer, needs_text=True, **where
    )
    if args.gen_length is None:
        args.gen_length = default_length(pretrained.record.sequence_length)
        schedule = schedule_of(args)
    if pretrained.record.mask.causal:
        schedule = {"gen_length": args.gen_length, **asked}
        if not is_asked:
            settings.pop("append", None)
    return Conversation(pretrained, system=args.system, **settings, **schedule)


def schedule_of(args) -> dict[str, int]:
    if args.block_length is None:
        args.block_length = default_block(args.gen_length)
    return read_schedule(args)


# ---- what the user says


def typed() -> Iterator[str]:
    """Yields what is typed in a terminal, line by line, until Ctrl-D."""
    # Where it is there, it gives `input` a history and keys that edit.
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401
    while True:
        try:
            if sys.stdout.isatty():
                line = input("> ")
            else:
                # stdout holds nothing but answers
                print("> ", end="", file=sys.stderr, flush=True)
                if not (line := sys.stdin.readline()):
                    raise EOFError
        except EOFError:
            print(file=sys.stderr)
            return
        except KeyboardInterrupt:
            print(file=sys.stderr)
            raise
        except UnicodeDecodeError:
            warn("this is not UTF-8; set the terminal to UTF-8.")
            continue
        yield line.strip()


def piped() -> Iterator[str]:
    """Yields the lines of stdin, each as soon as it is there.

    Raises:
        UserError: stdin cannot be read, or a line is not UTF-8.
    """
    number = 0
    with files.reading("stdin", remedy="give it a text with one message per line"):
        try:
            for number, line in enumerate(sys.stdin.buffer, 1):
                # "utf-8-sig" drops a byte order mark, which would become part of the first message.
                yield line.decode("utf-8" if number > 1 else "utf-8-sig").strip()
        except UnicodeDecodeError as error:
            raise UserError(
                f"Line {number} of stdin is not UTF-8 at byte {error.start}; convert it, for "
                "example with iconv -t utf-8."
            ) from error


# ---- what the model says


class Stopped(Exception):
    """The user does not want the rest of an answer."""


@contextlib.contextmanager
def stoppable() -> Iterator[Callable[[], None]]:
    """Keeps the first Ctrl-C for the function that it hands out, which raises Stopped; a second one
    raises KeyboardInterrupt at once.

    An interrupt that Python raises where it happens to be would break into JAX's own bookkeeping,
    and a terminal that is half drawn would stay so.
    """
    is_pressed = False

    def press(number, frame) -> None:
        nonlocal is_pressed
        if is_pressed:
            raise KeyboardInterrupt
        is_pressed = True

    def check() -> None:
        if is_pressed:
            raise Stopped

    before = signal.signal(signal.SIGINT, press)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, before)


def answer_shown(conversation: Conversation, question: Question) -> Answer:
    """Returns an answer, whose denoising is shown where stderr is a terminal.

    Raises:
        Stopped: by Ctrl-C.
    """
    if conversation.is_causal or not sys.stderr.isatty():
        show = None
    else:
        # Where stdout is the same terminal, the picture is removed at the end: the text is printed
        # in its place, whole and selectable.
        tokenizer = conversation.tokenizer
        show = make_show(
            tokenizer,
            shown_generations([""], gen_length=conversation.gen_length, mask_id=tokenizer.mask_id),
            stream=sys.stderr,
            transient=sys.stdout.isatty(),
        )

    with stoppable() as check:

        def on_step(rows: range, state: DenoiseStep) -> None:
            check()
            if show:
                show.on_step(rows, state)

        with show or contextlib.nullcontext():
            answer = conversation.answer(question, on_step=on_step)
        check()
    return answer


def warn_of_surprises(conversation: Conversation, question: Question) -> None:
    """Says what does not fit the context, and that a gap is not filled."""
    if question.num_dropped:
        turns = "turn is" if question.num_dropped == 1 else f"{question.num_dropped} turns are"
        warn(
            f"the oldest {turns} forgotten, because the model reads {conversation.context} tokens."
        )
    length = len(question.tokens) + conversation.gen_length
    for sentence in surprises([question.text], length=length, trained=conversation.context):
        warn(sentence)


def main(argv: list[str]) -> None:
    drop_echoes()
    args = make_parser().parse_args(argv)
    conversation = begin(args)
    is_terminal = sys.stdin.isatty()
    if not conversation.has_template:
        warn("the tokenizer has no chat template; messages are written under plain headings.")
    for sentence in length_hint(conversation.record, gen_length=conversation.gen_length):
        warn(sentence)
    if is_terminal:
        warn(KEYS)
    num_answers = 0
    for text in typed() if is_terminal else piped():
        if not text:
            continue
        if text == RESET:
            conversation.reset()
            continue
        try:
            check_unicode([text], "The message", remedy="set the terminal to UTF-8")
            question = conversation.ask(text)
            warn_of_surprises(conversation, question)
            if is_terminal:
                answer = answer_shown(conversation, question)
            else:
                answer = conversation.answer(question)
        except Stopped:
            warn("stopped; the message is forgotten.")
            continue
        except UserError as error:
            # In a terminal the user can say it in another way.
            if not is_terminal:
                raise
            warn(str(error))
            continue
        conversation.keep(question, answer)
        if num_answers and not is_terminal:
            print("---")
        # At once: who talks through pipes waits for it, and a reader that is gone is noticed.
        print(answer.text, flush=True)
        num_answers += 1
        if not answer.has_ended:
            warn(f"the answer takes all tokens of --gen-length {conversation.gen_length}.")

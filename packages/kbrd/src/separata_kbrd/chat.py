"""A conversation in the terminal: the verb ``chat``."""

import sys
from collections.abc import Callable
from pathlib import Path

from .conversation import Conversation, Turn
from .system import load_system

GREETING = "Tell me what you like; I recommend something. Ctrl-D ends."
NOT_TEXT = "bot: That line is not valid UTF-8, so I left it out. Please type it again."


def chat(
    *,
    run: Path = Path("runs/tiny"),
    beam: int | None = None,
    spotlight: str | None = None,
) -> None:
    """Talk with the system in the terminal.

    What you type goes to the models and, without ``spotlight``, nowhere else.

    Args:
        run: Run directory.
        beam: Hypotheses kept for each answer; default: the run's.
        spotlight: Address of a DBpedia Spotlight service that finds nodes in what you type;
            default: they are found by their names, on this machine.

    Raises:
        ValueError: The run cannot be read, or the service does not answer.
    """
    system = load_system(run, beam=beam, spotlight=spotlight)
    talk(Conversation(system), system.item_names, read=read_line, write=print)


def read_line() -> str | None:
    """A line of standard input; None at its end.

    A line that is not valid UTF-8 is asked for again: half of it would be another message.
    """
    while True:
        sys.stdout.write("you: ")
        sys.stdout.flush()
        line = sys.stdin.buffer.readline()
        try:
            return line.decode("utf-8").rstrip("\r\n") if line else None
        except UnicodeDecodeError:
            print(NOT_TEXT)


def talk(
    conversation: Conversation,
    names: dict[int, str],
    *,
    read: Callable[[], str | None],
    write: Callable[[str], object],
) -> None:
    """Answer lines until they end or Ctrl-C comes.

    Args:
        conversation: Answers.
        names: Names of the items by node.
        read: Gives a line; None ends the conversation.
        write: Shows a line.
    """
    write(GREETING)
    try:
        while (line := read()) is not None:
            for shown in lines_of(conversation.say(line), names):
                write(shown)
    except KeyboardInterrupt:
        pass
    write("\nBye.")


def lines_of(turn: Turn, names: dict[int, str]) -> list[str]:
    """A turn as lines of text."""
    lines = [f"     {note}" for note in turn.notes]
    lines.append(f"bot: {turn.text}")
    lines += [f"     {number}. {name}" for number, name in enumerate(turn.choices, start=1)]
    if turn.heard:
        lines.append(f"     (you mentioned {', '.join(turn.heard)})")
    if turn.reply is not None and not turn.reply.items:
        suggested = ", ".join(names[node] for node in turn.reply.suggestions[:3])
        lines.append(f"     (my best so far: {suggested})")
    return lines

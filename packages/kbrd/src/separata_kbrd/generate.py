"""Answers to dialogs from a file: the verb ``generate``."""

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

from separata_shared.files import read_lines, write_text

from .system import Context, System, load_system

BATCH = 32


def generate(
    *,
    run: Path = Path("runs/tiny"),
    input: Path | None = None,
    output: Path | None = None,
    weights: Path | None = None,
    beam: int | None = None,
    search: Literal["batched", "official"] | None = None,
) -> list[str]:
    """Answer dialogs, one per line.

    The messages of a dialog stand on one line with tabs between them. Items are found by their
    names, or as ``@`` and identifier; of several items with a name the most mentioned one is meant.

    Args:
        run: Run directory.
        input: Text file; default: standard input.
        output: Where the answers go; default: standard output.
        weights: Weights file of the dialog model; default: the best of the run.
        beam: Hypotheses kept for each answer; default: the run's.
        search: Rules of the search; default: the run's.

    Returns:
        One answer per dialog; to an empty line too, which is a dialog that the system opens.

    Raises:
        ValueError: The run or the input cannot be read.
    """
    lines = read_lines(input) if input else standard_input(sys.stdin.buffer)
    system = load_system(run, weights=weights, beam=beam, search=search)
    answers = respond_to_lines(system, lines)
    if output:
        write_text(output, "".join(f"{answer}\n" for answer in answers))
        print(output)
    else:
        for answer in answers:
            print(answer)
    return answers


def respond_to_lines(system: System, lines: Sequence[str]) -> list[str]:
    """Answers to dialogs whose messages have tabs between them."""
    contexts = []
    for line in lines:
        context = Context()
        for message in line.split("\t"):
            mentions = [one for one in system.titles.find(message) if one.other_year is None]
            system.hear(context, message, [(one, one.candidates[0]) for one in mentions])
        contexts.append(context)
    return [
        reply.text
        for start in range(0, len(contexts), BATCH)
        for reply in system.respond(contexts[start : start + BATCH])
    ]


def standard_input(stream: Iterable[bytes]) -> list[str]:
    """Lines of UTF-8 text.

    Raises:
        ValueError: A line is not valid, or there is none.
    """
    lines = []
    for number, line in enumerate(stream, start=1):
        try:
            lines.append(line.decode("utf-8").rstrip("\r\n"))
        except UnicodeDecodeError:
            raise ValueError(f"standard input: line {number} is not valid UTF-8") from None
    if not lines:
        raise ValueError("standard input: is empty")
    return lines

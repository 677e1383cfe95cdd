"""Tables for the terminal."""

from collections.abc import Iterable, Sequence


def table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Rows under their heads, columns of equal width.

    >>> print(table(["norm", "width"], [["a.norm", 8], ["b", 512]]))
    norm    width
    a.norm  8
    b       512
    """
    lines = [list(heads), *([_cell(value) for value in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = (
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        for line in lines
    )
    return "\n".join(line.rstrip() for line in padded)


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)

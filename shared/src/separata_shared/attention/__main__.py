"""``python -m separata_shared.attention build``: compile the CPU kernels before they are used."""

import sys
from collections.abc import Sequence

from jsonargparse import auto_cli

from separata_shared import native
from separata_shared.attention.topk import native as topk


def build() -> None:
    """Compile the CPU kernels of attention now, rather than on first use.

    Prints where the library lies and which instructions this machine will use. The exit status is
    2 where there is no compiler.
    """
    try:
        kernels = topk.library()
    except native.UnavailableError as error:
        print(f"separata_shared.attention: error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"library       {native.library_path(topk.SOURCE)}")
    print(f"instructions  {kernels.topk_level_name(kernels.topk_best_level()).decode()}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command that the command line names.

    Args:
        arguments: Command line without the program; that of the process by default.
    """
    auto_cli(
        {"build": build},
        args=None if arguments is None else list(arguments),
        prog="python -m separata_shared.attention",
    )


if __name__ == "__main__":
    main()

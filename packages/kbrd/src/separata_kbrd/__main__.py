"""The command ``separata-kbrd``."""

from separata_shared.cli import main as run_command

PACKAGE = "separata_kbrd"
VERBS: dict[str, str] = {}


def main() -> None:
    """Run the verb named on the command line."""
    run_command(VERBS, package=PACKAGE)


if __name__ == "__main__":
    main()

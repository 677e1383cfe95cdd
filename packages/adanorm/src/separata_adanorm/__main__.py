"""The command ``separata-adanorm``."""

from separata_shared.cli import main as run_command

PACKAGE = "separata_adanorm"
VERBS = {
    "prepare": "separata_shared.translation.preparation:prepare",
    "train": f"{PACKAGE}.train:train",
    "average-checkpoints": "separata_shared.training.average:average_checkpoints",
    "generate": f"{PACKAGE}.generate:generate",
    "evaluate": f"{PACKAGE}.evaluate:evaluate",
}


def main() -> None:
    """Run the verb named on the command line."""
    run_command(VERBS, package=PACKAGE)


if __name__ == "__main__":
    main()

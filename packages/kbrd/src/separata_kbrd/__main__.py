"""The command ``separata-kbrd``."""

from separata_shared.cli import main as run_command

PACKAGE = "separata_kbrd"
VERBS = {
    "prepare": f"{PACKAGE}.prepare:prepare",
    "train": f"{PACKAGE}.train:train",
    "train-rec": f"{PACKAGE}.train:train_rec",
    "train-autorec": f"{PACKAGE}.train:train_autorec",
    "train-dialog": f"{PACKAGE}.train_dialog:train_dialog",
    "evaluate": f"{PACKAGE}.evaluate:evaluate",
    "summarise": f"{PACKAGE}.evaluate:summarise",
    "recommend": f"{PACKAGE}.recommend:recommend",
    "generate": f"{PACKAGE}.generate:generate",
    "chat": f"{PACKAGE}.chat:chat",
    "explain": f"{PACKAGE}.explain:explain",
    "convert": f"{PACKAGE}.convert:convert",
    "web": f"{PACKAGE}.web:web",
}


def main() -> None:
    """Run the verb named on the command line."""
    run_command(VERBS, package=PACKAGE)


if __name__ == "__main__":
    main()

"""The command ``separata-imitation-nat``."""

from separata_shared.cli import main as run_command

PACKAGE = "separata_imitation_nat"
VERBS = {
    "prepare": "separata_shared.translation.preparation:prepare",
    "train-teacher": f"{PACKAGE}.train:train_teacher",
    "distill": f"{PACKAGE}.distill:distill",
    "train-demonstrator": f"{PACKAGE}.train:train_demonstrator",
    "train": f"{PACKAGE}.train:train",
    "train-mask-predict": f"{PACKAGE}.train:train_mask_predict",
    "average-checkpoints": "separata_shared.training.average:average_checkpoints",
    "translate": f"{PACKAGE}.generate:generate",
    "score": f"{PACKAGE}.generate:score",
    "evaluate": f"{PACKAGE}.evaluate:evaluate",
    "ablate": f"{PACKAGE}.ablate:ablate",
    "bench": f"{PACKAGE}.bench:bench",
    "plot": f"{PACKAGE}.plot:plot_latency",
    "explain": f"{PACKAGE}.explain:explain",
    "reproduce": f"{PACKAGE}.reproduce:reproduce",
}


def main() -> None:
    """Run the verb named on the command line."""
    run_command(VERBS, package=PACKAGE)


if __name__ == "__main__":
    main()

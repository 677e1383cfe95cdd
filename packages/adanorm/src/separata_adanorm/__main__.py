"""The command ``separata-adanorm``."""

from separata_shared.cli import main as run_command

PACKAGE = "separata_adanorm"
VERBS = {
    "prepare": "separata_shared.translation.preparation:prepare",
    "train": f"{PACKAGE}.train:train",
    "average-checkpoints": "separata_shared.training.average:average_checkpoints",
    "generate": f"{PACKAGE}.generate:generate",
    "evaluate": f"{PACKAGE}.evaluate:evaluate",
    "train-lm": f"{PACKAGE}.language_model:train_lm",
    "evaluate-lm": f"{PACKAGE}.language_model:evaluate_lm",
    "train-images": f"{PACKAGE}.classify:train_images",
    "evaluate-images": f"{PACKAGE}.classify:evaluate_images",
    "train-sentences": f"{PACKAGE}.classify:train_sentences",
    "evaluate-sentences": f"{PACKAGE}.classify:evaluate_sentences",
    "train-parser": f"{PACKAGE}.parsing:train_parser",
    "evaluate-parser": f"{PACKAGE}.parsing:evaluate_parser",
    "parse": f"{PACKAGE}.parsing:parse",
    "compare": f"{PACKAGE}.compare:compare",
    "gradient-stats": f"{PACKAGE}.statistics:gradient_stats",
    "plot-curves": f"{PACKAGE}.plot:plot_curves",
    "plot-phi": f"{PACKAGE}.plot:plot_phi",
}


def main() -> None:
    """Run the verb named on the command line."""
    run_command(VERBS, package=PACKAGE)


if __name__ == "__main__":
    main()

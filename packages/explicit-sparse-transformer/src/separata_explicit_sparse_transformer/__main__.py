"""The command ``separata-explicit-sparse-transformer``."""

from separata_shared.cli import main as run_command

PACKAGE = "separata_explicit_sparse_transformer"
VERBS = {
    "prepare": "separata_shared.translation.preparation:prepare",
    "train": f"{PACKAGE}.train:train",
    "average-checkpoints": "separata_shared.training.average:average_checkpoints",
    "generate": f"{PACKAGE}.generate:generate",
    "evaluate": f"{PACKAGE}.evaluate:evaluate",
    "plot-attention": f"{PACKAGE}.plot:plot_attention",
    "plot-span": f"{PACKAGE}.plot:plot_span",
    "sweep-k": f"{PACKAGE}.sweep:sweep_k",
    "ablate-phase": f"{PACKAGE}.sweep:ablate_phase",
    "convert": f"{PACKAGE}.convert:convert",
    "train-lm": f"{PACKAGE}.language_model:train_lm",
    "evaluate-lm": f"{PACKAGE}.language_model:evaluate_lm",
}


def main() -> None:
    """Run the verb named on the command line."""
    run_command(VERBS, package=PACKAGE)


if __name__ == "__main__":
    main()

"""The verb ``average-checkpoints``."""

from pathlib import Path

from separata_shared.training import Run, average_weights, save_weights
from separata_shared.training.run import step_of


def average_checkpoints(
    *,
    run: Path = Path("runs/tiny"),
    last: int = 5,
    upper: int | None = None,
    output: Path | None = None,
) -> Path:
    """Average the parameters of the newest weight files of a run.

    The paper's De-En recipe averages the last ten epochs for several upper bounds and picks by
    validation BLEU: call this with different ``upper`` and compare with ``evaluate --weights``.

    Args:
        run: Run directory of ``train``; ``train.keep`` says how many weight files it has.
        last: Number of files.
        upper: Newest training step to take; default: no bound.
        output: File to write; default: ``weights/average.safetensors`` in the run directory.

    Returns:
        The file written.

    Raises:
        ValueError: The run has fewer weight files than asked for, or ``output`` is one of them.
    """
    if last < 1:
        raise ValueError(f"last: must be at least 1, got {last}")
    files = [file for file in Run(run).weight_files() if upper is None or step_of(file) <= upper]
    if len(files) < last:
        raise ValueError(
            f"{run}: has {len(files)} weight files{'' if upper is None else f' up to {upper}'}, "
            f"{last} are needed; train with a larger train.keep or lower last"
        )
    chosen = files[-last:]
    path = output or Run(run).weights / "average.safetensors"
    if path.resolve() in [file.resolve() for file in Run(run).weight_files()]:
        raise ValueError(f"output: {path} holds the weights of a step of this run")
    save_weights(path, average_weights(chosen))
    print(f"{path}: mean of {', '.join(file.name for file in chosen)}")
    return path

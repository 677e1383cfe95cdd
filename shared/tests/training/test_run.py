import errno
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from separata_shared.training import Run, TrainConfig
from separata_shared.training.run import step_name, step_of


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model."""

    width: int = 4
    ratio: float = 1e-7
    top_k: int | None = None


def begin(path: Path, *, model: Model, train: TrainConfig | None = None, name: str = "a") -> Run:
    run = Run(path, {"model": model, "train": train or TrainConfig(), "name": name})
    run.begin(write=True)
    return run


def test_run_can_be_continued_with_other_training_but_not_with_another_model(
    tmp_path: Path,
) -> None:
    run = begin(tmp_path, model=Model())
    begin(tmp_path, model=Model(width=5))  # nothing was trained yet
    begin(tmp_path, model=Model())
    run.checkpoints.mkdir()
    begin(tmp_path, model=Model(), train=TrainConfig(steps=7))
    assert "steps: 7" in run.config.read_text()
    with pytest.raises(ValueError, match=r"config\.yaml: model is not what"):
        begin(tmp_path, model=Model(top_k=3))
    with pytest.raises(ValueError, match=r"config\.yaml: name is not what"):
        begin(tmp_path, model=Model(), name="b")


def test_only_the_writing_process_writes(tmp_path: Path) -> None:
    Run(tmp_path / "run", {"model": Model()}).begin(write=False)
    assert not (tmp_path / "run").exists()


def test_environment_is_recorded(tmp_path: Path) -> None:
    record = json.loads(begin(tmp_path, model=Model()).environment.read_text())
    assert record["python"] == ".".join(map(str, sys.version_info[:3]))
    assert {"torch", "separata-shared"} <= record["versions"].keys()
    assert record["processes"] == 1
    assert record["threads"] >= 1


def test_records_after_a_step_are_forgotten_also_a_torn_line(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.forget_after(3)
    for step in range(1, 6):
        run.record(step=step, loss=1 / step)
    with run.metrics.open("a") as file:
        file.write('{"step": 2, "lo')
    run.forget_after(3)
    assert [record["step"] for record in run.records()] == [1, 2, 3]


def test_best_weights_fall_back_to_the_newest(tmp_path: Path) -> None:
    run = Run(tmp_path)
    with pytest.raises(ValueError, match="no weights; train first"):
        run.best_weights()
    run.weights.mkdir()
    for step in (20, 100, 3):
        (run.weights / f"{step_name(step)}.safetensors").touch()
    assert step_of(run.best_weights()) == 100
    run.best.write_text('{"step": 20}')
    assert step_of(run.best_weights()) == 20


def test_full_disk_leaves_no_half_written_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = begin(tmp_path, model=Model())
    before = run.config.read_bytes()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        begin(tmp_path, model=Model(width=6))
    assert run.config.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "environment.json"]


def test_importing_the_library_costs_nothing_beside_torch() -> None:
    code = """if True:
        import sys
        import separata_shared
        assert "torch" not in sys.modules
        import torch, numpy, tqdm, safetensors.torch
        before = set(sys.modules)
        import separata_shared.attention, separata_shared.data, separata_shared.decoding
        import separata_shared.nn, separata_shared.training
        print(*(set(sys.modules) - before))
        """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    imported = {name for name in done.stdout.split() if not name.startswith("separata_shared")}
    # What takes longest to import besides torch itself; each is imported where it is used.
    slow = {
        "jsonargparse",
        "matplotlib",
        "sacrebleu",
        "sympy",
        "torch._dynamo",
        "torch.distributed.checkpoint",
        "torch.distributed.fsdp",
    }
    assert not imported & slow
    # Torch and numpy have a few small modules left that they import when they are used.
    assert len(imported) < 40, sorted(imported)


def test_a_torn_record_and_foreign_weight_files_are_no_surprise(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.record(step=1, loss=2.0)
    run.metrics.write_text(run.metrics.read_text() + '{"step": 2, "lo')
    with pytest.raises(ValueError, match=r"metrics\.jsonl: a line is not JSON"):
        run.records()
    run.weights.mkdir()
    for name in ("step_x.safetensors", "average.safetensors", "step_0000007.safetensors"):
        (run.weights / name).touch()
    assert [path.name for path in run.weight_files()] == ["step_0000007.safetensors"]

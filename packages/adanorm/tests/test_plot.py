"""Pictures."""

import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from separata_adanorm.plot import draw_phi, plot_curves, plot_phi
from separata_shared.training import Run


def size_of(path: Path) -> tuple[int, int]:
    """Width and height of a PNG, from its header."""
    header = path.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", header[16:24])
    return int(width), int(height)


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Two run directories with the records that training leaves."""
    directories = [tmp_path / "a" / "mnist", tmp_path / "b" / "mnist"]
    for number, directory in enumerate(directories):
        for step in (10, 20, 30):
            loss = (1 + number) / step
            Run(directory).record(kind="train", step=step, epoch=0, loss=loss, lr=1e-3)
            Run(directory).record(kind="evaluate", step=step, epoch=0, loss=loss, accuracy=step)
    return directories


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The axes of every picture, as they are when it is written."""
    pictures: list[Any] = []
    save = Figure.savefig

    def keep(self: Figure, *args: Any, **options: Any) -> None:
        pictures.append(self.axes)
        save(self, *args, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    return pictures


class TestCurves:
    @pytest.mark.parametrize("line", ["3", "[1]", "null", '{"kind": "train", "loss": 1.0}'])
    def test_a_line_that_is_no_record_is_named(self, runs: list[Path], line: str) -> None:
        with Run(runs[0]).metrics.open("a") as file:
            file.write(line + "\n")
        with pytest.raises(ValueError, match=r"metrics\.jsonl: line 7 is not the record of a step"):
            plot_curves(runs=runs)

    def test_training_and_validation_of_every_run(
        self, runs: list[Path], tmp_path: Path, drawn: list[Any]
    ) -> None:
        plot_curves(runs=runs, output=tmp_path / "deep" / "curves.png")
        assert min(size_of(tmp_path / "deep" / "curves.png")) > 200
        training, validation = drawn[0]
        assert [axis.get_title() for axis in drawn[0]] == ["training", "validation"]
        for axis in (training, validation):
            assert [line.get_label() for line in axis.lines] == [str(run) for run in runs]
            assert axis.lines[1].get_xydata().tolist() == [[s, 2 / s] for s in (10, 20, 30)]

    def test_a_number_of_evaluation_only_has_one_panel(
        self, runs: list[Path], tmp_path: Path, drawn: list[Any]
    ) -> None:
        plot_curves(runs=runs[:1], metric="accuracy", output=tmp_path / "curves.png")
        (axis,) = drawn[0]
        assert axis.get_title() == "validation"
        assert axis.lines[0].get_label() == "mnist"

    def test_unknown_numbers_and_runs_are_named(self, runs: list[Path], tmp_path: Path) -> None:
        output = tmp_path / "curves.png"
        with pytest.raises(ValueError, match=r"metrics\.jsonl: has no 'bleu'; there are accuracy,"):
            plot_curves(runs=runs, metric="bleu", output=output)
        with pytest.raises(ValueError, match=r"nowhere.*no such file"):
            plot_curves(runs=[tmp_path / "nowhere"], output=output)
        assert not output.exists()


class TestPhi:
    def test_the_curve_is_ada_norm(self, tmp_path: Path, drawn: list[Any]) -> None:
        plot_phi(C=2.0, output=tmp_path / "phi.png")
        (axis,) = drawn[0]
        curve = next(line for line in axis.lines if line.get_label() == "AdaNorm")
        y, z = curve.get_data()
        assert z.max() == pytest.approx(2.5 * 2.0, rel=1e-3)
        assert y[z.argmax()] == pytest.approx(5.0, abs=0.05)
        assert all(z[y > 10] < 0)
        (zone,) = axis.patches
        assert zone.get_x() == 10

    def test_features_of_a_batch_are_normalised_and_counted(
        self, tmp_path: Path, drawn: list[Any]
    ) -> None:
        x = np.random.default_rng(1).normal(3.0, 2.0, (20, 512)).astype(np.float32)
        x[0, 0] = 80.0
        np.save(tmp_path / "x.npy", x)
        plot_phi(values=tmp_path / "x.npy", output=tmp_path / "phi.png")
        bars = drawn[0][1].patches
        assert sum(bar.get_height() for bar in bars) == x.size
        assert sum(bar.get_height() for bar in bars if bar.get_x() > 10) == 1

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (None, "no such file"),
            (b"text", "not a readable .npy file"),
            (np.arange(4), "must hold floating-point features"),
            (np.zeros((0, 4)), "must hold floating-point features"),
            (np.array(None), "not a readable .npy file"),
        ],
    )
    def test_other_files_are_refused(self, tmp_path: Path, content: Any, message: str) -> None:
        path = tmp_path / "x.npy"
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content is not None:
            np.save(path, content)
        with pytest.raises(ValueError, match=rf"x\.npy: {message}"):
            plot_phi(values=path, output=tmp_path / "phi.png")

    def test_one_source_of_features_is_enough(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"^values and run: give one"):
            plot_phi(values=tmp_path / "x.npy", run=tmp_path, output=tmp_path / "phi.png")

    def test_k_must_be_positive(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"^k: must be positive"):
            plot_phi(k=0.0, output=tmp_path / "phi.png")


def test_missing_matplotlib_is_one_line_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match=r"pip install 'separata-adanorm\[plot\]'"):
        draw_phi(tmp_path / "phi.png")
    assert not list(tmp_path.iterdir())

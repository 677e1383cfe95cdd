"""Pictures."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from separata_imitation_nat.plot import draw_actions, mode_of, plot_latency

Drawn = list[list[Any]]


def row(system: str, search: str, precision: str, time: float, **changes: Any) -> dict[str, Any]:
    fixed = {"system": system, "search": search, "engine": "torch", "precision": precision}
    return fixed | {"batch": 1, "target_length": 32, "median_ms": time} | changes


ROWS = [
    row("NAT", "one pass", "float32", 50.0),
    row("NAT", "7 lengths, rescored", "float32", 400.0),
    row("AT 6-6", "greedy", "float32", 300.0),
    row("AT 6-6", "beam 4", "float32", 600.0),
    row("NAT", "one pass", "int8", 20.0),
    row("NAT", "one pass", "float32", 9.0, target_length=10),
    row("NAT", "one pass", "float32", 800.0, batch=32),
]


def score(value: float) -> dict[str, Any]:
    return {"raw": {"bleu_detokenised": {"value": value}}}


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    contents = {
        "bench": {"rows": ROWS},
        "NAT": {"translations": {"one_length": score(20.0), "rescored": score(25.0)}},
        "AT 6-6": {"translations": {"beam": score(28.0)}},
    }
    paths = {name: tmp_path / f"{name}.json" for name in contents}
    for name, path in paths.items():
        path.write_text(json.dumps(contents[name]))
    return paths


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Drawn:
    """The axes of every picture, as they are when it is written."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    pictures: Drawn = []
    save = FigureCanvasAgg.print_figure

    def keep(self: Any, *args: Any, **options: Any) -> None:
        pictures.append(self.figure.axes)
        save(self, *args, **options)

    monkeypatch.setattr(FigureCanvasAgg, "print_figure", keep)
    return pictures


def test_every_timed_and_scored_system_is_a_point(
    files: dict[str, Path], tmp_path: Path, drawn: Drawn
) -> None:
    output = tmp_path / "deep" / "latency.png"
    scores = {name: files[name] for name in ("NAT", "AT 6-6")}
    plot_latency(bench=files["bench"], scores=scores, output=output)
    assert output.read_bytes().startswith(b"\x89PNG")
    points = [tuple(xy) for dots in drawn[0][0].collections for xy in dots.get_offsets().tolist()]
    assert points == [(50.0, 20.0), (400.0, 25.0), (300.0, 28.0), (600.0, 28.0)]
    hollow = [
        not len(dots.get_facecolor()) for dots in drawn[0][0].collections if len(dots.get_offsets())
    ]
    assert hollow == [False, False, True, False]
    plot_latency(bench=files["bench"], scores=scores, batch=32, output=output)
    points = [tuple(xy) for dots in drawn[1][0].collections for xy in dots.get_offsets().tolist()]
    assert points == [(800.0, 20.0)]
    plot_latency(bench=files["bench"], scores=scores, precision="int8", output=output)
    points = [tuple(xy) for dots in drawn[2][0].collections for xy in dots.get_offsets().tolist()]
    assert points == [(20.0, 20.0)]


@pytest.mark.parametrize(
    ("search", "mode"),
    [("one pass", "one_length"), ("7 lengths, rescored", "rescored"), ("beam 4", "beam")],
)
def test_a_search_has_the_score_of_its_way_to_decode(search: str, mode: str) -> None:
    assert mode_of(search, {mode: {}}) == mode
    assert mode_of(search, {}) is None


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("bench", "[]", "is not what bench writes"),
        ("bench", '{"rows": [{"system": "NAT"}]}', "is not what bench writes"),
        ("bench", "{", "not valid JSON"),
        ("NAT", "[1]", "is not what evaluate writes"),
        ("NAT", '{"translations": {"one_length": {}}}', "has no number translations.one_length"),
    ],
)
def test_damaged_files_are_named(
    files: dict[str, Path], tmp_path: Path, name: str, content: str, message: str
) -> None:
    files[name].write_text(content)
    output = tmp_path / "latency.png"
    with pytest.raises(ValueError, match=rf"{name}\.json: {message}"):
        plot_latency(bench=files["bench"], scores={"NAT": files["NAT"]}, output=output)
    assert not output.exists()


def test_what_was_not_timed_is_refused(files: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match=r"^scores: none is of a system in .*; those are AT 6-6"):
        plot_latency(bench=files["bench"], scores={"AT 3-3": files["AT 6-6"]})
    with pytest.raises(ValueError, match=r"^batch: .* has no batch of 7; there are \[1, 32\]"):
        plot_latency(bench=files["bench"], scores={"NAT": files["NAT"]}, batch=7)


REPORT: dict[str, Any] = {
    "layers": [{"layer": 0, "same_action": 0.5}, {"layer": 3, "same_action": 1.0}],
    "sentence": [
        {
            "reference": word,
            "learner_word": "w",
            "demonstrator": {"action": [1, 2]},
            "learner": {"action": [own, 2]},
        }
        for word, own in (("a", 1), ("b", 4))
    ],
}


def test_actions_of_both_models_stand_in_one_cell(tmp_path: Path, drawn: Drawn) -> None:
    draw_actions(REPORT, tmp_path / "actions.png")
    assert (tmp_path / "actions.png").read_bytes().startswith(b"\x89PNG")
    (axes,) = drawn[0]
    cells = {tuple(text.get_position()): text.get_text() for text in axes.texts}
    assert cells == {(0, 0): "1\n1", (0, 1): "2\n2", (1, 0): "1\n4", (1, 1): "2\n2"}
    assert axes.images[0].get_array().tolist() == [[1.0, 0.0], [1.0, 1.0]]


def test_missing_matplotlib_is_one_line_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match=r"pip install 'separata-imitation-nat\[plot\]'"):
        draw_actions(REPORT, tmp_path / "actions.png")
    assert not list(tmp_path.iterdir())

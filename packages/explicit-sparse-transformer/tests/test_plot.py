import json
import math
import shutil
import struct
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from separata_explicit_sparse_transformer.generate import load_run
from separata_explicit_sparse_transformer.plot import attention_maps, plot_attention, plot_span
from separata_shared.data.vocabulary import EOS
from separata_shared.training import Run

SENTENCE = "s1 s2 s3 s4 s5 s0 s1"
FILES = {"attention.png", "word.png", "support.png", "attention.json"}


def size_of(path: Path) -> tuple[int, int]:
    """Width and height of a PNG, from its header."""
    header = path.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", header[16:24])
    return int(width), int(height)


def test_pictures_and_numbers_are_written(trained_run: Path, tmp_path: Path) -> None:
    output = tmp_path / "deep" / "pictures"
    report = plot_attention(run=trained_run, sentence=SENTENCE, output=output)
    assert {path.name for path in output.iterdir()} == FILES
    assert json.loads((output / "attention.json").read_text()) == report
    assert all(min(size_of(path)) > 200 for path in output.glob("*.png"))
    assert report["source"] == [*SENTENCE.split(), "</s>"]
    assert report["target"][0] == "</s>"
    assert len(report["attentions"]) == 6


def test_reported_numbers_are_those_of_a_selection_of_three(
    trained_run: Path, tmp_path: Path
) -> None:
    report = plot_attention(run=trained_run, sentence=SENTENCE, output=tmp_path)
    for name, numbers in report["attentions"].items():
        assert all(len(values) == 2 for values in numbers.values())  # heads
        for support, entropy, mass in zip(*numbers.values(), strict=True):
            # The first queries of a causal row have fewer than three keys.
            assert support <= 3
            if "decoder.layers" not in name or "cross" in name:
                assert support == 3
            assert 0 <= entropy <= math.log(3) + 1e-6
            assert 0 < mass <= 1 + 1e-6


def test_the_model_translates_the_sentence_without_one_given(
    trained_run: Path, tmp_path: Path
) -> None:
    report = plot_attention(run=trained_run, output=tmp_path, head=1, word=0)
    assert 8 <= len(report["source"]) <= 20


def test_maps_are_attention_weights(trained_run: Path) -> None:
    network = load_run(trained_run).network
    maps = attention_maps(network, torch.tensor([4, 5, 6, 7, EOS]), torch.tensor([EOS, 4, 5]))
    assert maps["encoder.layers.0.self_attention"].shape == (2, 5, 5)
    assert maps["decoder.layers.1.self_attention"].shape == (2, 3, 3)
    assert maps["decoder.layers.1.cross_attention"].shape == (2, 3, 5)
    for weights in maps.values():
        assert weights.sum(-1) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head": 2}, "^head: 2 does not exist, the model has heads 0 to 1"),
        ({"head": -1}, "^head: -1 does not exist"),
        ({"word": 99}, "^word: 99 does not exist"),
        ({"word": -1}, "^word: -1 does not exist"),
        ({"sentence": "s1 " * 16}, "^sentence has 17 tokens, more than the 16 positions"),
        ({"weights": Path("nowhere")}, "nowhere: no such file"),
    ],
)
def test_nothing_is_drawn_of_what_does_not_exist(
    trained_run: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        plot_attention(**{"run": trained_run, "sentence": SENTENCE, "output": tmp_path} | options)
    assert not list(tmp_path.iterdir())


def test_missing_matplotlib_is_one_line_before_anything_is_written(
    trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(
        ValueError, match=r"pip install 'separata-explicit-sparse-transformer\[plot"
    ):
        plot_attention(run=trained_run, sentence=SENTENCE, output=tmp_path)
    assert not list(tmp_path.iterdir())


def test_pictures_go_to_the_run_by_default(trained_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(trained_run, tmp_path / "run"))
    before = {path.name for path in run.iterdir()}
    weights = Run(run).weight_files()[0]
    plot_attention(run=run, sentence=SENTENCE, weights=weights)
    assert {path.name for path in run.iterdir()} - before == FILES


def test_span_is_drawn_for_each_run_of_a_language_model(tmp_path: Path) -> None:
    runs = [tmp_path / "dense", tmp_path / "sparse"]
    for run in runs:
        for step in (1, 2):
            Run(run).record(
                kind="evaluate", step=step, average_span=10.0 * step, bits_per_character=3.0 / step
            )
    plot_span(runs=runs, output=tmp_path / "span.png")
    assert min(size_of(tmp_path / "span.png")) > 200


def test_span_of_a_translation_model_is_refused(trained_run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no evaluation of a language model"):
        plot_span(runs=[trained_run], output=tmp_path / "span.png")
    with pytest.raises(ValueError, match="no such file"):
        plot_span(runs=[tmp_path / "nowhere"], output=tmp_path / "span.png")
    assert not list(tmp_path.iterdir())

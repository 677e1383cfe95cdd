"""The bench: every baseline or no ratio (acceptance check 14), and ratios that are those of times.

CTranslate2 is optional. Where it is missing its place is taken by our own search, so that all but
the conversion itself is tested.
"""

import csv
import importlib.util
import itertools
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from separata_imitation_nat import bench as bench_module
from separata_imitation_nat import outside
from separata_imitation_nat.__main__ import PACKAGE, VERBS
from separata_imitation_nat.bench import bench, largest_batch, load_models, slow_precisions
from separata_imitation_nat.build import build_teacher
from separata_imitation_nat.competitors import Models, Work, beam, greedy, one_pass, rescored
from separata_imitation_nat.config import ModelConfig
from separata_imitation_nat.outside import OutsideTranslator
from separata_imitation_nat.train import train_teacher
from separata_shared.cli import main
from separata_shared.data.vocabulary import EOS, PAD
from separata_shared.nn import Transformer

HAS_CTRANSLATE2 = importlib.util.find_spec("ctranslate2") is not None
TINY: dict[str, Any] = {"width": 16, "num_heads": 2, "hidden_width": 24, "num_actions": 8}
TINY |= {"encoder_layers": 2, "decoder_layers": 2, "max_length": 64}
OPTIONS: dict[str, Any] = {
    "model": ModelConfig(**TINY),
    "vocabulary": 30,
    "source_length": 6,
    "target_length": 5,
    "beam": 2,
    "candidates": 3,
    "rounds": 3,
    "seconds": 0.1,
}
# Two sentences: 2 matrices of 3 candidates, 6 places, 30 types and 4 bytes are 4320 bytes each.
TWO_SENTENCES = 2 * 4320 / 2**30


class Stand:
    """Takes the place of CTranslate2: greedy search of the network itself."""

    def __init__(
        self, network: Transformer, config: ModelConfig, *, precision: str, threads: int
    ) -> None:
        self.network = network

    def translate(
        self, source: Sequence[Sequence[int]], *, beam: int, shortest: int, longest: int
    ) -> list[list[int]]:
        assert shortest == longest
        work = Work(source=torch.tensor(source), target_length=longest, beam=1, candidates=1)
        return [[*row, EOS] for row in greedy(self.network, work)]


def stand_in(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("separata_imitation_nat.competitors.OutsideTranslator", Stand)
    patch.setattr(outside, "version", lambda: "0")


@pytest.fixture
def stand(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch)


def small_models(**changes: Any) -> Models:
    torch.manual_seed(3)
    return load_models(ModelConfig(**(TINY | changes)), 30, 1, None, None, None)


class TestRefusal:
    """Acceptance check 14."""

    def test_without_ctranslate2_nothing_is_timed_and_the_exit_status_is_2(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.setitem(sys.modules, "ctranslate2", None)
        output = tmp_path / "bench.csv"
        with pytest.raises(SystemExit) as leaving:
            main(VERBS, package=PACKAGE, arguments=["bench", "--output", str(output)])
        assert leaving.value.code == 2
        shown = capsys.readouterr()
        assert shown.out == ""
        assert len(shown.err.splitlines()) == 1
        assert "CTranslate2 is missing" in shown.err
        assert "pip install 'separata-imitation-nat[bench]'" in shown.err
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("given", [["teacher"], ["teacher", "learner"], ["shallow"]])
    def test_some_of_the_runs_are_not_enough(self, given: list[str], tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="missing; without every baseline there is no speed"):
            bench(**OPTIONS, **dict.fromkeys(given, tmp_path), output=tmp_path / "bench.csv")

    @pytest.mark.usefixtures("stand")
    def test_a_baseline_that_finds_other_words_is_refused(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        right = Stand.translate

        def wrong(self: Stand, source: Sequence[Sequence[int]], **options: Any) -> Any:
            return [[row[0] + 1, *row[1:]] for row in right(self, source, **options)]

        monkeypatch.setattr(Stand, "translate", wrong)
        with pytest.raises(ValueError, match=r"finds other words .* no baseline"):
            bench(**OPTIONS, output=tmp_path / "bench.csv")
        assert not list(tmp_path.iterdir())

    def test_float32_is_a_baseline_too(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"^precisions: float32 is a baseline"):
            bench(**OPTIONS, precisions=["int8"], output=tmp_path / "bench.csv")

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("rounds", 2), ("beam", 0), ("candidates", 0), ("threads", 0), ("target_length", 1),
            ("source_length", 1), ("vocabulary", 4), ("large_batch_gib", 0.0),
            ("rescoring_lengths", [1]),
        ],
    )  # fmt: skip
    def test_an_option_that_does_not_fit_is_named(
        self, name: str, value: Any, tmp_path: Path
    ) -> None:
        with pytest.raises(ValueError, match=f"^{name}: must be"):
            bench(**(OPTIONS | {name: value}), output=tmp_path / "bench.csv")

    @pytest.mark.usefixtures("stand")
    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("source_length", 65), ("target_length", 64), ("rescoring_lengths", [10, 64]),
            ("large_batch_gib", math.inf),
        ],
    )  # fmt: skip
    def test_what_would_fail_later_is_found_before_anything_is_timed(
        self, name: str, value: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(ValueError, match=f"^{name}: "):
            bench(**(OPTIONS | {name: value}), output=tmp_path / "bench.csv")
        assert capsys.readouterr().out == ""

    def test_an_output_that_cannot_be_one_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"^output: .*bench\.json is where the JSON file goes"):
            bench(**OPTIONS, output=tmp_path / "bench.json")
        with pytest.raises(ValueError, match=r"^output: .* is a directory"):
            bench(**OPTIONS, output=tmp_path)


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where ``rows`` writes."""
    return tmp_path_factory.mktemp("bench") / "deep" / "bench.csv"


@pytest.fixture(scope="module")
def rows(output: Path) -> list[dict[str, Any]]:
    """What a whole bench of small models gives."""
    with pytest.MonkeyPatch.context() as patch:
        stand_in(patch)
        patch.setattr(bench_module, "slow_precisions", lambda rows: set())  # whatever this CPU is
        return bench(**OPTIONS, large_batch_gib=TWO_SENTENCES, rescoring_lengths=[4], output=output)


class TestReport:
    def test_every_system_search_engine_and_precision_is_timed(
        self, rows: list[dict[str, Any]]
    ) -> None:
        ours = {
            (system, search, "torch", precision)
            for system, search in [
                *itertools.product(("AT 2-2", "AT 4-1"), ("greedy", "beam 2")),
                ("NAT", "one pass"),
                ("NAT", "3 lengths, rescored"),
            ]
            for precision in ("float32", "bfloat16", "int8")
        }
        outside_rows = set(
            itertools.product(
                ("AT 2-2", "AT 4-1"), ("greedy", "beam 2"), ("CTranslate2",), ("float32", "int8")
            )
        )
        plain = {("AT 2-2", "greedy"), ("NAT", "one pass")}
        expected = ours | outside_rows | {(*each, "torch, as trained", "float32") for each in plain}
        names = ("system", "search", "engine", "precision")
        first = {tuple(r[n] for n in names) for r in rows if r["batch"] == 1 and r["rounds"] == 3}
        assert expected <= first
        large = {tuple(row[name] for name in names) for row in rows if row["batch"] == 2}
        assert expected <= large
        short = [row for row in rows if row["target_length"] == 4]
        assert {row["search"] for row in short} == {"beam 2", "one pass", "3 lengths, rescored"}

    def test_csv_and_json_hold_the_rows_with_their_environment(
        self, rows: list[dict[str, Any]], output: Path
    ) -> None:
        path = output
        with path.open(newline="") as file:
            written = list(csv.DictReader(file))
        content = json.loads(path.with_suffix(".json").read_text())
        assert len(written) == len(rows) == len(content["rows"])
        for row, line, kept in zip(rows, written, content["rows"], strict=True):
            assert float(line["median_ms"]) == row["median_ms"] == kept["median_ms"]
            assert 0 < row["median_ms"] <= row["p90_ms"]
            assert line["threads"] == "1"
            assert line["clock"] == "CPU time"
            assert line["torch"] == torch.__version__
        assert content["environment"]["ctranslate2"] == "0"
        assert sorted(path.parent.iterdir()) == [path, path.with_suffix(".json")]

    def test_ratios_are_medians_of_the_rounds(
        self, rows: list[dict[str, Any]], output: Path
    ) -> None:
        content = json.loads(output.with_suffix(".json").read_text())
        table = [row for row in rows if row["batch"] == 1 and row["target_length"] == 5]
        seconds = {
            ", ".join(row[name] for name in ("system", "search", "engine", "precision")): row
            for row in table
        }
        base = seconds["AT 2-2, greedy, torch, float32"]
        for row in table:
            pairs = sorted(a / b for a, b in zip(row["seconds"], base["seconds"], strict=True))
            assert row["to_cached_greedy"] == pytest.approx(pairs[1], abs=1e-3)
        for line in content["ratios"]:
            if (line["batch"], line["target_length"]) == (1, 5):
                own, other = seconds[line["of"]]["seconds"], seconds[line["to"]]["seconds"]
                pairs = sorted(a / b for a, b in zip(own, other, strict=True))
                assert line["ratio"] == pytest.approx(pairs[1], abs=1e-3)
        wanted = {(line["of"].split(", torch")[0], line["to"]) for line in content["ratios"]}
        assert ("NAT, one pass", "AT 4-1, greedy, CTranslate2, int8") in wanted
        assert ("AT 2-2, greedy", "AT 2-2, greedy, CTranslate2, float32") in wanted
        assert ("NAT, 3 lengths, rescored", "AT 2-2, beam 2, torch, float32") in wanted

    def test_exact_systems_find_the_words_of_the_models_as_trained(
        self, rows: list[dict[str, Any]]
    ) -> None:
        exact = [row for row in rows if row["precision"] == "float32" and row["same_tokens"]]
        assert {row["engine"] for row in exact} == {"torch", "torch, as trained", "CTranslate2"}
        assert all(row["same_tokens"] == 1.0 for row in exact)


@pytest.mark.usefixtures("stand")
def test_trained_runs_are_timed(
    small: dict[str, Any], teacher: Path, learner: Path, tmp_path: Path
) -> None:
    settings = {n: v for n, v in small.items() if n not in ("parallel", "objective")}
    sizes = vars(small["model"]) | {"encoder_layers": 3, "decoder_layers": 1}
    shallow = tmp_path / "shallow"
    train_teacher(**(settings | {"model": ModelConfig(**sizes)}), run=shallow)
    rows = bench(
        **OPTIONS,
        precisions=["float32"],
        teacher=teacher,
        shallow=shallow,
        learner=learner,
        large_batch_gib=1e-9,
        output=tmp_path / "bench.csv",
    )
    assert {row["system"] for row in rows} == {"AT 2-2", "AT 3-1", "NAT"}
    with pytest.raises(ValueError, match="same numbers of layers"):
        bench(**OPTIONS, teacher=teacher, shallow=teacher, learner=learner)


def test_every_system_writes_the_target_length() -> None:
    models = small_models()
    source = torch.tensor([[5, 6, 7, 8, EOS], [9, 9, 4, 5, EOS]])
    work = Work(source=source, target_length=7, beam=3, candidates=3)
    teacher = models.autoregressive[models.deep]
    for found in (greedy(teacher, work), beam(teacher, work), one_pass(models.learner, work)):
        assert [len(row) for row in found] == [6, 6]
        assert all(token not in (EOS, PAD) for row in found for token in row)
    chosen = rescored(models.learner, teacher, work)
    assert all(len(row) in (5, 6, 7) for row in chosen)


def test_large_batches_are_powers_of_two_that_fit() -> None:
    models = small_models()
    work = Work(source=torch.zeros(1, 6).long(), target_length=5, beam=2, candidates=3)
    for sentences, batch in ((0.1, 1), (1.0, 1), (2.0, 2), (3.9, 2), (4.0, 4), (100.0, 64)):
        assert largest_batch(models, work, sentences * 4320 / 2**30) == batch


def test_precisions_that_do_not_pay_are_left_out_of_the_large_batch(
    capsys: pytest.CaptureFixture[str],
) -> None:
    times = {"float32": 3.0, "bfloat16": 9.0, "int8": 1.0}
    rows = [
        {"system": "NAT", "search": "one pass", "engine": "torch", "precision": p, "median_ms": t}
        for p, t in times.items()
    ]
    assert slow_precisions(rows) == {"bfloat16"}
    assert "bfloat16: slower than float32" in capsys.readouterr().out


def test_the_command_line_knows_the_verb() -> None:
    assert VERBS["bench"] == f"{bench_module.__name__}:bench"


@pytest.mark.skipif(not HAS_CTRANSLATE2, reason="CTranslate2 is optional")
class TestOutside:
    @pytest.mark.parametrize(
        "changes",
        [
            {},
            {"normalisation": "pre", "activation": "gelu", "positions": "learned"},
            {"embeddings": "separate", "encoder_layers": 3, "decoder_layers": 1},
        ],
    )
    def test_the_same_weights_give_the_same_words(self, changes: dict[str, Any]) -> None:
        torch.manual_seed(5)
        sizes = {"source_vocabulary_size": 30, "target_vocabulary_size": 30}
        config = ModelConfig(**(TINY | sizes | changes))
        network = build_teacher(config).eval()
        source = torch.randint(4, 30, (3, 6))
        source[:, -1] = EOS
        work = Work(source=source, target_length=9, beam=1, candidates=1)
        translator = OutsideTranslator(network, config, precision="float32", threads=1)
        found = translator.translate(source.tolist(), beam=1, shortest=9, longest=9)
        assert [row[:8] for row in found] == greedy(network, work)

    def test_rounding_to_8_bits_leaves_our_weights_alone(self) -> None:
        config = ModelConfig(**TINY, source_vocabulary_size=30, target_vocabulary_size=30)
        network = build_teacher(config).eval()
        before = {name: value.clone() for name, value in network.state_dict().items()}
        OutsideTranslator(network, config, precision="int8", threads=1)
        assert all(torch.equal(v, before[n]) for n, v in network.state_dict().items())

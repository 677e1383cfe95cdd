"""What ``explain`` says about actions is true."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from separata_imitation_nat import explain as module
from separata_imitation_nat.build import build_demonstrator, build_learner, initialise
from separata_imitation_nat.config import DataConfig, DecodeConfig, ModelConfig
from separata_imitation_nat.explain import (
    Actions,
    collect,
    explain,
    layers,
    meanings,
    output_table,
    positions,
)
from separata_shared.data.vocabulary import EOS, Vocabulary
from separata_shared.translation import Split, TrainedModel
from separata_shared.translation.data import Sequences

TYPES = 12
SIZES: dict[str, Any] = {"width": 16, "num_heads": 2, "hidden_width": 24, "max_length": 32}
SIZES |= {"encoder_layers": 1, "decoder_layers": 3, "num_actions": 6, "dropout": 0.0}
SIZES |= {"source_vocabulary_size": TYPES, "target_vocabulary_size": TYPES}
VOCABULARY = Vocabulary(
    b"", pieces=[f"w{n}" for n in range(TYPES)], segment=lambda line: [], join=str
)


def part(*pairs: tuple[list[int], list[int]]) -> Split:
    source, target = (
        Sequences.of(np.array([*pair[side], EOS], dtype=np.int32) for pair in pairs)
        for side in (0, 1)
    )
    return Split(source, target)


PART = part(([4, 5, 6], [7, 8]), ([4], [9, 10, 11, 4]), ([6, 6], [5]))


def trained(network: Any, config: ModelConfig) -> TrainedModel[ModelConfig]:
    return TrainedModel(
        run=Path("run"),
        weights=Path("weights"),
        network=network.eval(),
        model=config,
        data=DataConfig(),
        decode=DecodeConfig(),
        source_vocabulary=VOCABULARY,
        target_vocabulary=VOCABULARY,
    )


def models(**changes: Any) -> tuple[ModelConfig, Any, Any]:
    torch.manual_seed(2)
    config = ModelConfig(**(SIZES | changes))
    return config, build_learner(config).eval(), build_demonstrator(config).eval()


def test_every_real_position_of_every_sentence_is_there_once() -> None:
    _, learner, demonstrator = models()
    actions = collect(learner, demonstrator, PART, 3)
    assert actions.demonstrator.shape == actions.learner.shape == (3, 3 + 5 + 2, 6)
    for number, target in enumerate(([7, 8, EOS], [9, 10, 11, 4, EOS], [5, EOS])):
        assert actions.target[actions.sentence == number].tolist() == target
    for pi in (actions.demonstrator, actions.learner):
        torch.testing.assert_close(pi.sum(dim=-1), torch.ones(3, 10))
    alone = collect(learner, demonstrator, part(([4], [9, 10, 11, 4])), 1)
    torch.testing.assert_close(alone.learner, actions.learner[:, actions.sentence == 1])
    torch.testing.assert_close(alone.demonstrator, actions.demonstrator[:, actions.sentence == 1])


def test_the_demonstrator_is_read_teacher_forced() -> None:
    """Its distribution at a position does not change with later words of the reference."""
    _, learner, demonstrator = models()
    found = [
        collect(learner, demonstrator, part(([4, 5], target)), 1).demonstrator
        for target in ([7, 8, 9], [7, 10, 11])
    ]
    torch.testing.assert_close(found[0][:, :2], found[1][:, :2])
    assert not torch.allclose(found[0][:, 2:], found[1][:, 2:])
    with torch.no_grad():
        log_pi = demonstrator.actions(torch.tensor([[4, 5, EOS]]), torch.tensor([[EOS, 7, 8, 9]]))
    torch.testing.assert_close(found[0], log_pi[:, 0].exp())


def test_agreement_is_one_for_equal_and_zero_for_disjoint_distributions() -> None:
    equal = torch.eye(4)[None, [0, 1, 2, 3, 3]]
    other = torch.eye(4)[None, [1, 0, 3, 2, 2]]
    numbers = torch.zeros(5).long()
    same = layers(Actions(equal, equal, numbers, numbers, numbers))[0]
    assert same["same_action"] == same["overlap"] == 1.0
    apart = layers(Actions(equal, other, numbers, numbers, numbers))[0]
    assert apart["same_action"] == apart["overlap"] == 0.0
    assert same["learner"]["used"] == 4
    # Shares 1/5, 1/5, 1/5, 2/5: entropy log 5 - 2/5 log 2.
    assert same["learner"]["perplexity"] == pytest.approx(5 / 2**0.4)


def test_overlap_is_the_common_mass() -> None:
    one, other = torch.tensor([[[0.5, 0.3, 0.2]]]), torch.tensor([[[0.4, 0.1, 0.5]]])
    numbers = torch.zeros(1).long()
    found = layers(Actions(one, other, numbers, numbers, numbers))[0]
    assert found["overlap"] == pytest.approx(0.4 + 0.1 + 0.2)
    assert found["same_action"] == 0.0


@pytest.mark.parametrize("embeddings", ["joint", "separate"])
@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_the_nearest_tokens_are_those_whose_vectors_point_the_same_way(
    kind: str, embeddings: str
) -> None:
    config, learner, _ = models(actions=kind, embeddings=embeddings, action_layers=[0, 2])
    table = output_table(learner)
    pi = torch.full((2, 3, 6), 0.01)
    pi[0, :, 4], pi[1, :, 1] = 0.95, 0.95
    with torch.no_grad():
        learner.decoder.layers[0].action.codebook.A[4] = 3.0 * table[9]
        learner.decoder.layers[2].action.codebook.A[1] = 0.2 * table[5]
    found = meanings(trained(learner, config), pi, 2)
    first, second = (next(each for each in found if each["layer"] == layer) for layer in (0, 2))
    assert (first["action"], first["tokens"][0]) == (4, "w9")
    assert (second["action"], second["tokens"][0]) == (1, "w5")
    assert first["cosines"][0] == pytest.approx(1.0, abs=1e-4)
    assert first["share"] == pytest.approx(0.95)
    assert len(found) == 4


def test_positions_name_words_and_the_most_likely_actions() -> None:
    _, learner, demonstrator = models()
    actions = collect(learner, demonstrator, PART, 3)
    rows = positions(actions, 1, VOCABULARY)
    assert [row["reference"] for row in rows] == ["w9", "w10", "w11", "w4", f"w{EOS}"]
    here = (actions.sentence == 1).nonzero().flatten()
    for row, place in zip(rows, here, strict=True):
        assert row["learner"]["action"] == actions.learner[:, place].argmax(dim=-1).tolist()
        assert row["learner_word"] == f"w{actions.predicted[place]}"


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> dict[str, TrainedModel[ModelConfig]]:
    """What stands for two runs and their corpus."""
    config, learner, demonstrator = models()
    initialise(learner, demonstrator)
    found = {"learner": trained(learner, config), "demonstrator": trained(demonstrator, config)}

    class Corpus:
        valid = test = PART
        source_vocabulary = target_vocabulary = VOCABULARY

    monkeypatch.setattr(module, "load_learner", lambda run: found["learner"])
    monkeypatch.setattr(module, "load_demonstrator", lambda run: found["demonstrator"])
    monkeypatch.setattr(module, "load", lambda data: Corpus)
    return found


@pytest.mark.usefixtures("runs")
def test_the_report_is_printed_written_and_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    output = tmp_path / "deep" / "actions.json"
    report = explain(sentence=2, nearest=3, output=output)
    assert json.loads(output.read_text()) == report
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert [found["layer"] for found in report["layers"]] == [0, 1, 2]
    assert report["sentences"] == 3
    assert len(report["nearest"]) == 9
    shown = capsys.readouterr().out
    for word in ("w9", "w10", "w11", "w4"):
        assert f"\n{word} " in shown
    assert "layer 2: same action at" in shown


@pytest.mark.usefixtures("runs")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sentence": 4}, "sentence: 4 asked for, valid and limit leave 3"),
        ({"sentence": 2, "limit": 1}, "sentence: 2 asked for"),
        ({"sentence": 0}, "sentence: must be at least 1"),
        ({"nearest": 0}, "nearest: must be at least 1"),
        ({"limit": 0}, "limit: must be at least 1"),
    ],
)
def test_options_that_do_not_fit_are_named(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        explain(**options)  # type: ignore[arg-type]


def test_models_that_do_not_belong_together_are_refused(
    runs: dict[str, TrainedModel[ModelConfig]],
) -> None:
    own = runs["learner"]
    runs["learner"] = replace(own, model=replace(own.model, num_actions=0))
    with pytest.raises(ValueError, match="has no actions"):
        explain()
    runs["learner"] = replace(own, model=replace(own.model, num_actions=5))
    with pytest.raises(ValueError, match="has 6 actions in layers"):
        explain()
    foreign = Vocabulary(b"x", pieces=[], segment=lambda line: [], join=str)
    runs["learner"] = replace(own, target_vocabulary=foreign)
    with pytest.raises(ValueError, match="another vocabulary"):
        explain()

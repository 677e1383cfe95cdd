import io
import shutil
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from separata_shared import translation
from separata_shared.data import pad
from separata_shared.data.vocabulary import EOS, PAD
from separata_shared.nn import Transformer
from separata_shared.training import Run, read_weights, save_weights
from separata_shared.translation import (
    DecodeConfig,
    TransformerConfig,
    build_transformer,
    load,
    translate,
    translate_lines,
)
from separata_shared.translation.search import search, with_search
from torch import Tensor

TrainedModel = translation.TrainedModel[TransformerConfig]
load_run = partial(
    translation.load_run, TransformerConfig, partial(build_transformer, kind=Transformer)
)
generate = partial(translation.generate, load_run)

LINES = ["s1 s2 s3", "s0 s0 s4 s5 s1 s2 s3", "s5 s4 s3 s2"]


@pytest.fixture(scope="module")
def trained(trained_run: Path) -> TrainedModel:
    return load_run(trained_run)


def sources(trained: TrainedModel, lines: list[str]) -> list[Tensor]:
    return [torch.from_numpy(trained.source_vocabulary.encode(line)).long() for line in lines]


def log_probability(trained: TrainedModel, source: Tensor, target: Tensor) -> Tensor:
    """Summed log-probability of a target given its source, by teacher forcing."""
    begin = torch.tensor([EOS])
    with torch.no_grad():
        logits = trained.network(source[None], torch.cat([begin, target[:-1]])[None])
    return logits.log_softmax(-1)[0].gather(-1, target[:, None]).sum()


def test_a_loaded_run_is_the_trained_model(trained: TrainedModel, small: dict[str, Any]) -> None:
    assert not trained.network.training
    sizes = {"source_vocabulary_size": 10, "target_vocabulary_size": 10}
    assert trained.model == replace(small["model"], **sizes)
    assert trained.decode == small["decode"]
    stored = read_weights(trained.weights)
    state = trained.network.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in stored.items())
    assert trained.weights == Run(trained.run).best_weights()


def test_other_weights_of_the_run_can_be_used(trained: TrainedModel) -> None:
    first = Run(trained.run).weight_files()[0]
    other = load_run(trained.run, weights=first)
    assert other.weights == first != trained.weights
    name = "encoder.layers.0.self_attention.q_proj.weight"
    weight = other.network.get_parameter(name)
    assert not torch.equal(weight, trained.network.get_parameter(name))


def test_another_wiring_of_the_same_weights_can_be_used(trained: TrainedModel) -> None:
    dry = replace(trained.model, dropout=0.0)
    other = load_run(trained.run, model=dry)
    assert other.model == dry
    for name, tensor in trained.network.state_dict().items():
        assert torch.equal(other.network.state_dict()[name], tensor)


def test_scores_are_those_of_teacher_forcing(trained: TrainedModel) -> None:
    tokens = sources(trained, LINES)
    for source, hypotheses in zip(tokens, translate(trained, tokens), strict=True):
        assert len(hypotheses) == trained.decode.beam
        scores = [hypothesis.score for hypothesis in hypotheses]
        assert scores == sorted(scores, reverse=True)
        for found in hypotheses:
            expected = log_probability(trained, source, found.tokens) / len(found.tokens)
            assert found.score == pytest.approx(expected.item(), abs=1e-5)


def test_a_translation_does_not_depend_on_its_batch(trained: TrainedModel) -> None:
    together = translate_lines(trained, LINES)
    assert together == [translate_lines(trained, [line])[0] for line in LINES]
    small_batches = replace(trained, decode=replace(trained.decode, max_tokens=1))
    assert translate_lines(small_batches, LINES) == together
    assert translate_lines(trained, LINES[::-1]) == together[::-1]


def test_beam_of_one_takes_the_best_token_each_time(trained: TrainedModel) -> None:
    greedy = with_search(trained, beam=1, alpha=None)
    (source,) = sources(trained, LINES[:1])
    found = translate(greedy, [source])[0][0].tokens
    written = torch.tensor([EOS])
    for token in found[:-1]:
        with torch.no_grad():
            logits = trained.network(source[None], written[None])[0, -1]
        logits[PAD] = -torch.inf
        if len(written) == 1:
            logits[EOS] = -torch.inf  # fairseq: at least one token
        assert logits.argmax() == token
        written = torch.cat([written, token[None]])


def test_longest_output_follows_the_sentence_and_not_the_batch(trained: TrainedModel) -> None:
    decode = DecodeConfig(beam=2, max_length_factor=0.5, max_length_constant=1)
    tokens = sources(trained, ["s1 s2 s3", "s1 s2 s3 s4 s5 s0 s1"])
    network = load_run(trained.run).network
    project = network.output
    penalty = torch.zeros(10).index_fill(0, torch.tensor([EOS]), -1e4)
    network.output = lambda states: project(states) + penalty  # EOS comes only when it must
    found = search(network, pad(tokens, PAD), decode, max_length=trained.model.max_length)
    for source, hypotheses in zip(tokens, found, strict=True):
        for hypothesis in hypotheses:
            assert len(hypothesis.tokens) == int(0.5 * len(source)) + 1 + 1  # and EOS


def test_output_never_exceeds_the_positions(trained: TrainedModel) -> None:
    decode = DecodeConfig(beam=2, max_length_constant=10_000)
    found = search(trained.network, pad(sources(trained, LINES), PAD), decode, max_length=3)
    assert max(len(h.tokens) for hypotheses in found for h in hypotheses) <= 3


def test_length_penalty_is_the_configured_one(trained: TrainedModel) -> None:
    tokens = sources(trained, LINES[:1])
    summed = translate(with_search(trained, beam=None, alpha=0.0), tokens)[0]
    for found in summed:
        expected = found.positional_scores.sum().item()
        assert found.score == pytest.approx(expected, abs=1e-5)
    decode = replace(trained.decode, length_penalty="gnmt", alpha=0.6)
    for found in translate(replace(trained, decode=decode), tokens)[0]:
        penalty = ((5 + len(found.tokens)) / 6) ** 0.6
        assert found.score == pytest.approx(
            found.positional_scores.sum().item() / penalty, abs=1e-5
        )


def test_empty_lines_stay_empty_lines(trained: TrainedModel) -> None:
    lines = ["", LINES[0], "   ", LINES[1]]
    expected = translate_lines(trained, LINES[:2])
    assert translate_lines(trained, lines) == ["", expected[0], "", expected[1]]
    assert translate_lines(trained, ["", ""]) == ["", ""]


def test_words_outside_the_vocabulary_are_unknown_tokens(trained: TrainedModel) -> None:
    assert len(translate_lines(trained, ["never seen", "s1 never s2"])) == 2


def test_lowercased_data_lowercases_its_input(trained: TrainedModel) -> None:
    upper = [line.upper() for line in LINES]
    lowered = replace(trained, data=replace(trained.data, lowercase=True))
    assert translate_lines(lowered, upper) == translate_lines(trained, LINES)


def test_a_file_is_translated_line_by_line(
    trained: TrainedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, output = tmp_path / "in.txt", tmp_path / "deep" / "out.txt"
    path.write_text("\n".join(LINES) + "\n")
    returned = generate(run=trained.run, input=path)
    assert returned == translate_lines(trained, LINES)
    assert capsys.readouterr().out == "".join(f"{line}\n" for line in returned)
    assert generate(run=trained.run, input=path, output=output) == returned
    assert capsys.readouterr().out == ""
    assert output.read_text().splitlines() == returned
    assert generate(run=trained.run, input=path, limit=2) == returned[:2]


def stdin(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(content)))


def test_standard_input_is_read_without_a_file(
    trained: TrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    for mark in (b"", b"\xef\xbb\xbf"):
        stdin(monkeypatch, mark + "\r\n".join(LINES).encode())
        assert generate(run=trained.run) == translate_lines(trained, LINES)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "^standard input: is empty$"),
        (b"s1 s2\n\xff\xfe\n", "^standard input: line 2 is not valid UTF-8$"),
        (
            b"s1\n" + b"s1 " * 16,
            "^standard input: line 2 has 17 tokens, more than the 16 positions",
        ),
    ],
)
def test_unusable_input_is_refused(
    trained_run: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, message: str
) -> None:
    stdin(monkeypatch, content)
    with pytest.raises(ValueError, match=message):
        generate(run=trained_run)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beam": 0}, "beam: must be at least 1"),
        ({"limit": 0}, "^limit: must be at least 1"),
        ({"limit": -1}, "^limit: must be at least 1"),
        ({"alpha": float("nan")}, "alpha: must be a number"),
    ],
)
def test_impossible_options_are_refused(
    trained_run: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    path = tmp_path / "in.txt"
    path.write_text(LINES[0])
    with pytest.raises(ValueError, match=message):
        generate(run=trained_run, input=path, output=tmp_path / "out.txt", **options)
    assert list(tmp_path.iterdir()) == [path]


@pytest.fixture
def copy(trained_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained_run, tmp_path / "copy"))


def unusable(run: Path, message: str, **options: Any) -> None:
    with pytest.raises(ValueError, match=message):
        load_run(run, **options)


def test_a_directory_that_is_no_run_is_named(tmp_path: Path) -> None:
    unusable(tmp_path / "nowhere", "nowhere: not a run directory")
    unusable(tmp_path, "not a run directory")


def test_a_run_without_weights_is_named(copy: Path) -> None:
    shutil.rmtree(copy / "weights")
    unusable(copy, "copy/weights: no weights")


def test_missing_truncated_and_foreign_weights_are_named(copy: Path, tmp_path: Path) -> None:
    unusable(copy, "missing.safetensors: no such file", weights=tmp_path / "missing.safetensors")
    path = Run(copy).best_weights()
    whole = {name: tensor.clone() for name, tensor in read_weights(path).items()}
    path.write_bytes(path.read_bytes()[:1000])
    unusable(copy, f"{path.name}: not a readable safetensors file")
    path.write_bytes(b"\x80\x04pickle")
    unusable(copy, f"{path.name}: not a readable safetensors file")
    save_weights(path, {**whole, "extra": torch.zeros(1)})
    unusable(copy, f"{path.name}: unknown tensor extra")
    name = "encoder.layers.1.feed_forward.fc1.bias"
    save_weights(path, {n: tensor for n, tensor in whole.items() if n != name})
    unusable(copy, f"{path.name}: lacks {name}")
    save_weights(path, {**whole, name: torch.zeros(25)})
    unusable(copy, rf"{path.name}: {name} has shape \(25,\), the model needs \(24,\)")


def test_a_damaged_configuration_is_named(copy: Path) -> None:
    text = (copy / "config.yaml").read_text()
    for broken, message in (
        (text.replace("width: 16", "width: wide", 1), "config.yaml: .*width"),
        (text.replace("width: 16", "breadth: 16", 1), "config.yaml: .*breadth"),
        (text.partition("decode:")[0], "config.yaml: lacks the group 'decode'"),
        ("- 1\n", "config.yaml: not a configuration"),
        ("a: [", "config.yaml: not valid YAML"),
    ):
        (copy / "config.yaml").write_text(broken)
        unusable(copy, message)


def test_a_vocabulary_that_does_not_match_is_named(copy: Path) -> None:
    path = copy / "source.vocabulary"
    path.write_text(path.read_text() + "extra\n")
    unusable(copy, "source.vocabulary: has 11 types")
    path.unlink()
    unusable(copy, "source.vocabulary: no such file")


def test_a_damaged_record_of_the_best_step_is_named(copy: Path) -> None:
    for content in ("{}", "[]", "{", '{"step": "x"}'):
        (copy / "best.json").write_text(content)
        unusable(copy, "best.json")


def test_the_best_weights_are_those_of_the_lowest_validation_loss(trained_run: Path) -> None:
    records = [r for r in Run(trained_run).records() if r["kind"] == "evaluate"]
    best = min(records, key=lambda record: record["loss"])["step"]
    assert load_run(trained_run).weights.name == f"step_{best:07d}.safetensors"


def test_the_data_of_a_run_is_the_data_it_was_trained_on(trained: TrainedModel) -> None:
    corpus = load(trained.data)
    assert corpus.source_vocabulary.fingerprint == trained.source_vocabulary.fingerprint

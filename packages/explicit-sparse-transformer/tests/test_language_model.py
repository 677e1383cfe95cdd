import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from separata_explicit_sparse_transformer.data import DataConfig, load_characters
from separata_explicit_sparse_transformer.language_model import (
    LanguageModelConfig,
    build_language_model,
    check_processes,
    evaluate_lm,
    language_model_step,
    memory_of,
    train_lm,
)
from separata_shared.data import Batches
from separata_shared.language_model import (
    Block,
    language_model_loss,
    language_model_sums,
    reading_blocks,
    training_blocks,
)
from separata_shared.training import TrainConfig, read_weights

CONFIG = LanguageModelConfig(
    width=16,
    hidden_width=16,
    num_heads=2,
    num_layers=2,
    dropout=0.1,
    max_span=24,
    ramp=4,
    initial_span=0.2,
    top_k=4,
    streams=4,
    block=16,
)
DATA = DataConfig(dataset="tiny_characters", tiny_pairs=100)
TRAIN = TrainConfig(
    steps=6, optimizer="adagrad", lr=0.05, clip_norm=0.03, save_every=2, device="cpu"
)


def small(**changes: Any) -> LanguageModelConfig:
    return replace(CONFIG, vocabulary_size=30, **changes)


def blocks_of(symbols: Any, config: LanguageModelConfig) -> Batches[Block]:
    return training_blocks(
        symbols, streams=config.streams, block=config.block, parts=config.micro_batches, seed=1
    )


def test_scoring_does_not_depend_on_the_length_of_the_blocks() -> None:
    torch.manual_seed(0)
    model = build_language_model(small()).eval()
    symbols = np.random.default_rng(0).integers(30, size=200)
    losses = [
        language_model_loss(model, reading_blocks(symbols, 3, block))["loss"]
        for block in (7, 16, 500)
    ]
    assert losses == pytest.approx([losses[0]] * 3, abs=1e-5)


def test_loss_is_the_cross_entropy_plus_the_span_loss_of_each_character() -> None:
    torch.manual_seed(0)
    config = small(dropout=0.0)
    model, memory = build_language_model(config), memory_of(config)
    symbols = np.random.default_rng(0).integers(30, size=200)
    blocks = blocks_of(symbols, config)(0)
    losses = [language_model_step(model, memory, weight)(model, blocks[0]) for weight in (0.0, 0.5)]
    assert losses[0].count == 4 * 16
    logits, _ = model(blocks[0].tokens, model.start(4))
    logs = logits.log_softmax(-1).gather(-1, blocks[0].targets[..., None])
    torch.testing.assert_close(losses[0].total, -logs.sum())
    # Two layers of mean share 0.2 and L = 24.
    difference = (losses[1].total - losses[0].total).item()
    assert difference == pytest.approx(64 * 0.5 * 2 * 0.2 * 24, rel=1e-4)


def test_memory_connects_the_blocks_of_a_stream() -> None:
    torch.manual_seed(0)
    config = small(dropout=0.0, micro_batches=2, initial_span=1.0)
    model, memory = build_language_model(config), memory_of(config)
    symbols = np.random.default_rng(0).integers(30, size=200)
    blocks = blocks_of(symbols, config)(0)
    step = language_model_step(model, memory, 0.0)
    totals = [step(model, blocks[index]).total.item() for index in range(4)]
    rows = symbols[:200].reshape(4, 50)
    whole = torch.from_numpy(rows)
    logits, _ = model(whole[:, :32], model.start(4))
    logs = -logits.log_softmax(-1).gather(-1, whole[:, 1:33, None])[..., 0]
    expected = [logs[:2, :16], logs[2:, :16], logs[:2, 16:], logs[2:, 16:]]
    assert totals == pytest.approx([part.sum().item() for part in expected], rel=1e-5)


def weights_after(run: Path, **train: Any) -> dict[str, torch.Tensor]:
    config = replace(CONFIG, micro_batches=train.get("accumulate", 1))
    train_lm(language_model=config, data=DATA, train=replace(TRAIN, **train), run=run)
    return read_weights(run / "weights" / "step_0000006.safetensors")


def test_a_resumed_run_is_the_uninterrupted_run_bit_for_bit(tmp_path: Path) -> None:
    whole = weights_after(tmp_path / "whole")
    train_lm(
        language_model=CONFIG, data=DATA, train=replace(TRAIN, steps=4), run=tmp_path / "resumed"
    )
    resumed = weights_after(tmp_path / "resumed")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert not any("memory" in name for name in whole)


def test_accumulation_changes_nothing_without_dropout(tmp_path: Path) -> None:
    runs = []
    for parts in (1, 2):
        run = tmp_path / str(parts)
        train_lm(
            language_model=replace(CONFIG, dropout=0.0, micro_batches=parts),
            data=DATA,
            # Adagrad would turn rounding of a vanishing gradient into a whole step.
            train=replace(TRAIN, accumulate=parts, optimizer="sgd", lr=1.0),
            run=run,
        )
        runs.append(read_weights(run / "weights" / "step_0000006.safetensors"))
    for name, expected in runs[0].items():
        torch.testing.assert_close(runs[1][name], expected, atol=1e-5, rtol=0, msg=name)


def test_a_trained_model_is_scored_in_bits_per_character(tmp_path: Path) -> None:
    run = tmp_path / "run"
    result = train_lm(
        language_model=CONFIG,
        data=DATA,
        train=replace(TRAIN, steps=40, optimizer="adam", lr=5e-3, clip_norm=1.0),
        run=run,
    )
    scores = evaluate_lm(run=run)
    bits = scores["metrics"]["bits_per_character"]
    assert json.loads((run / "scores.json").read_text()) == scores
    characters = load_characters(DATA)
    assert bits["n"] == len(characters.test) - 1
    # Better than knowing the frequencies of the characters.
    shares = np.bincount(characters.train) / len(characters.train)
    shares = shares[shares > 0]
    assert bits["value"] < -(shares * np.log2(shares)).sum()
    assert result.metrics["evaluate/bits_per_character"] == pytest.approx(
        result.metrics["evaluate/loss"] / math.log(2)
    )
    assert 0 < scores["spans"]["average_span"] <= scores["spans"]["longest_span"] <= 24
    part = evaluate_lm(run=run, split="valid", characters=50, output=tmp_path / "part.json")
    assert part["metrics"]["bits_per_character"]["n"] == 49


def test_an_untrained_model_of_no_information_needs_log2_of_the_alphabet() -> None:
    model = build_language_model(small()).eval()
    torch.nn.init.zeros_(model.output.weight)
    torch.nn.init.zeros_(model.output.bias)
    symbols = np.random.default_rng(0).integers(30, size=50)
    losses = list(language_model_sums(model, reading_blocks(symbols, 2, 16)))
    total, count = (sum(part) for part in zip(*losses, strict=True))
    assert total / count == pytest.approx(math.log(30), rel=1e-5)


def test_bad_settings_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"language_model\.num_heads"):
        LanguageModelConfig(width=10, num_heads=3)
    with pytest.raises(ValueError, match=r"language_model\.micro_batches"):
        LanguageModelConfig(streams=4, micro_batches=3)
    with pytest.raises(ValueError, match=r"language_model\.top_k"):
        LanguageModelConfig(top_k=0)
    with pytest.raises(ValueError, match=r"train\.accumulate 1 times 1 processes"):
        train_lm(language_model=replace(CONFIG, micro_batches=2), data=DATA, train=TRAIN)
    with pytest.raises(ValueError, match=r"train\.parallel"):
        check_processes(
            replace(CONFIG, micro_batches=2), replace(TRAIN, parallel="fsdp"), processes=2
        )
    with pytest.raises(ValueError, match=r"language_model\.vocabulary_size"):
        train_lm(language_model=replace(CONFIG, vocabulary_size=7), data=DATA, train=TRAIN)
    with pytest.raises(ValueError, match="nowhere: not a run"):
        evaluate_lm(run=tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"language_model\.valid_characters"):
        LanguageModelConfig(valid_characters=-1)
    with pytest.raises(ValueError, match="streams: must be at least 1"):
        evaluate_lm(run=tmp_path, streams=0)
    with pytest.raises(ValueError, match="characters: must be at least 1"):
        evaluate_lm(run=tmp_path, characters=-5)
    with pytest.raises(ValueError, match=r"data\.dataset"):
        train_lm(language_model=CONFIG, data=DataConfig(dataset="sample"), train=TRAIN)

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from separata_adanorm import AdaNorm
from separata_adanorm.config import DataConfig
from separata_adanorm.language_model import (
    LanguageModelConfig,
    build_language_model,
    evaluate_lm,
    train_lm,
)
from separata_adanorm.recurrent import RecurrentTransformer, distance_vectors, shift
from separata_shared.language_model import language_model_loss, reading_blocks
from separata_shared.training import TrainConfig, read_weights
from separata_shared.translation import load_characters
from torch import nn

CONFIG = LanguageModelConfig(
    width=16, hidden_width=16, num_heads=2, num_layers=2, dropout=0.1, memory=24, streams=4,
    block=16,
)  # fmt: skip
DATA = DataConfig(dataset="tiny_characters", tiny_pairs=100)
TRAIN = TrainConfig(steps=6, lr=5e-3, clip_norm=1.0, save_every=2, device="cpu")


def built(**changes: Any) -> RecurrentTransformer:
    torch.manual_seed(0)
    return build_language_model(replace(CONFIG, vocabulary_size=30, **changes)).eval()


@pytest.mark.parametrize(("rows", "keys"), [(1, 1), (1, 5), (4, 4), (3, 7)])
def test_shift_gives_every_key_the_score_of_its_distance(rows: int, keys: int) -> None:
    distances = torch.arange(keys - 1, -1, -1.0).expand(2, 2, rows, keys)
    shifted = shift(distances)
    for i in range(rows):
        for j in range(i + keys - rows + 1):
            assert (shifted[..., i, j] == i + keys - rows - j).all()


def test_distances_are_the_sinusoids_of_transformers() -> None:
    vectors = distance_vectors(3, 4, like=torch.zeros(1))
    assert vectors[2].tolist() == [0, 0, 1, 1]
    expected = [math.sin(2), math.sin(0.02), math.cos(2), math.cos(0.02)]
    assert vectors[0].tolist() == pytest.approx(expected)


@pytest.mark.parametrize("normalisation", ["pre", "post"])
def test_blocks_with_a_long_memory_read_like_the_whole_text(normalisation: str) -> None:
    model = built(normalisation=normalisation, memory=100)
    tokens = torch.randint(30, (3, 20))
    with torch.no_grad():
        whole, _ = model(tokens, model.start(3))
        caches, parts = model.start(3), []
        for begin in (0, 7, 14):
            logits, caches = model(tokens[:, begin : begin + 7], caches)
            parts.append(logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-5, rtol=1e-5)


def test_no_symbol_depends_on_a_later_one_or_on_one_beyond_the_memory() -> None:
    model = built(memory=3, num_layers=1)
    tokens = torch.randint(30, (1, 12))
    with torch.no_grad():
        _, caches = model(tokens[:, :6], model.start(1))
        logits, _ = model(tokens[:, 6:], caches)
        assert caches[0].shape == (1, 3, 16)
        changed = tokens.clone()
        changed[0, :3] = 0  # before the last three of the first block
        changed[0, -1] = (tokens[0, -1] + 1) % 30
        _, caches = model(changed[:, :6], model.start(1))
        again, _ = model(changed[:, 6:], caches)
    assert torch.equal(logits[:, :-1], again[:, :-1])
    assert not torch.equal(logits[:, -1], again[:, -1])


def test_every_norm_is_the_one_asked_for() -> None:
    for normalisation, count in (("pre", 25), ("post", 24)):
        model = built(num_layers=12, normalisation=normalisation)
        assert sum(isinstance(module, AdaNorm) for module in model.modules()) == count
        assert not any(isinstance(module, nn.LayerNorm) for module in model.modules())


@pytest.mark.parametrize("norm", ["ada_norm", "layer_norm", "no_norm"])
def test_every_parameter_receives_a_gradient(norm: str) -> None:
    model = built(norm=norm)
    logits, _ = model(torch.randint(30, (2, 8)), model.start(2))
    logits.square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_an_untrained_model_of_no_information_needs_log2_of_the_alphabet() -> None:
    model = built()
    nn.init.zeros_(model.embedding.weight)
    losses = language_model_loss(model, reading_blocks(np.arange(50) % 30, 2, 16))
    assert losses["bits_per_character"] == pytest.approx(math.log2(30), rel=1e-5)


def weights_after(run: Path, steps: int) -> dict[str, torch.Tensor]:
    train_lm(language_model=CONFIG, data=DATA, train=replace(TRAIN, steps=steps), run=run)
    return read_weights(run / "weights" / f"step_{steps:07d}.safetensors")


def test_a_resumed_run_is_the_uninterrupted_run_bit_for_bit(tmp_path: Path) -> None:
    whole = weights_after(tmp_path / "whole", 6)
    weights_after(tmp_path / "resumed", 4)
    resumed = weights_after(tmp_path / "resumed", 6)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_trained_model_is_scored_in_bits_per_character(tmp_path: Path) -> None:
    training = replace(TRAIN, steps=60, lr=1e-2, save_every=60)
    train_lm(language_model=replace(CONFIG, dropout=0.0), data=DATA, train=training, run=tmp_path)
    scores = evaluate_lm(run=tmp_path)
    bits = scores["metrics"]["bits_per_character"]
    assert json.loads((tmp_path / "scores.json").read_text()) == scores
    text = load_characters(DATA)
    assert bits["n"] == len(text.test) - 1
    # Better than knowing the frequencies of the characters.
    shares = np.bincount(text.train) / len(text.train)
    shares = shares[shares > 0]
    assert bits["value"] < -(shares * np.log2(shares)).sum()
    part = evaluate_lm(run=tmp_path, split="valid", characters=50)
    assert part["metrics"]["bits_per_character"]["n"] == 49


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"width": 10, "num_heads": 3}, "num_heads"),
        ({"memory": 0}, "memory"),
        ({"dropout": 1.0}, "dropout"),
        ({"C": -1.0}, "C"),
        ({"valid_characters": -1}, "valid_characters"),
    ],
)
def test_impossible_settings_name_their_key(changes: dict[str, Any], key: str) -> None:
    with pytest.raises(ValueError, match=rf"^language_model\.{key}: "):
        LanguageModelConfig(**changes)


def test_what_cannot_be_trained_or_scored_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^train\.accumulate"):
        train_lm(language_model=CONFIG, data=DATA, train=replace(TRAIN, accumulate=2))
    with pytest.raises(ValueError, match=r"^language_model\.vocabulary_size: is 7"):
        train_lm(language_model=replace(CONFIG, vocabulary_size=7), data=DATA, train=TRAIN)
    with pytest.raises(ValueError, match="nowhere: not a run"):
        evaluate_lm(run=tmp_path / "nowhere")
    with pytest.raises(ValueError, match="characters: must be at least 1"):
        evaluate_lm(run=tmp_path, characters=-5)

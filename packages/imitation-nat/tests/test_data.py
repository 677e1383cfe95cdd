"""Corpora, and what the made multimodal text shows about distillation."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from separata_imitation_nat.config import (
    DecodeConfig,
    ModelConfig,
    ObjectiveConfig,
    ParallelDecodeConfig,
    StagesConfig,
)
from separata_imitation_nat.data import DataConfig, load, prepare
from separata_imitation_nat.distill import distill
from separata_imitation_nat.generate import open_run, sources_of
from separata_imitation_nat.train import train, train_teacher
from separata_shared.data.vocabulary import EOS, PAD
from separata_shared.training import TrainConfig

SYMBOLS = 3
MODES = ("a b", "c d", "e d")
SHARES = (0.4, 0.3, 0.3)


def test_targets_count_the_end_mark_and_inputs_begin_with_it(small: dict[str, Any]) -> None:
    # Position t of the learner and step t of the demonstrator both predict y_t.
    for batch in load(small["data"]).train.in_order(160):
        real = batch.target.ne(PAD)
        last = real.sum(dim=1) - 1
        assert (batch.target.gather(1, last[:, None]) == EOS).all()
        assert (batch.decoder_input[:, 0] == EOS).all()
        assert batch.decoder_input[:, 1:].equal(
            batch.target[:, :-1].masked_fill(batch.target[:, :-1] == EOS, PAD)
        )


def test_padding_is_on_the_right_of_both_sides(small: dict[str, Any]) -> None:
    for batch in load(small["data"]).train.in_order(160):
        for tokens in (batch.source, batch.target):
            real = tokens.ne(PAD).int()
            assert (real.diff(dim=1) <= 0).all()


def write_multimodal(folder: Path, *, repeats: int) -> None:
    """Every sentence of two symbols, in which each becomes one of its modes, in exact shares."""
    random = np.random.default_rng(1)
    folder.mkdir()
    modes = np.repeat(np.arange(len(MODES)), [round(share * repeats) for share in SHARES])
    sentences = [(s, t) for s in range(SYMBOLS) for t in range(SYMBOLS)]
    pairs = [
        (sentence, (first, second))
        for sentence in sentences
        for first, second in zip(random.permutation(modes), random.permutation(modes), strict=True)
    ]
    for part, chosen in (("train", pairs), ("valid", pairs[::repeats]), ("test", pairs[::repeats])):
        source = [" ".join(f"s{symbol}" for symbol in sentence) for sentence, _ in chosen]
        target = [" ".join(map(translation, sentence, taken)) for sentence, taken in chosen]
        (folder / f"{part}.src").write_text("".join(f"{line}\n" for line in source))
        (folder / f"{part}.tgt").write_text("".join(f"{line}\n" for line in target))


def translation(symbol: int, mode: int) -> str:
    """One mode of a symbol, such as ``a3 b3``."""
    return " ".join(f"{word}{symbol}" for word in MODES[mode].split())


def valid_pairs(run: Path) -> float:
    """Share of the pairs that a learner writes which are one of the three modes of their symbol."""
    translator = open_run(run)
    trained = translator.trained
    part = load(trained.data).test
    right = number = 0
    for line, row in zip(
        part.source_lines, translator.modes["one_length"](sources_of(part)), strict=True
    ):
        words = trained.target_vocabulary.decode(row).split()
        for place, symbol in enumerate(line.split()):
            number += 1
            pair = " ".join(words[2 * place : 2 * place + 2])
            right += pair in [translation(int(symbol[1:]), mode) for mode in range(len(MODES))]
    return right / number


@pytest.mark.slow
def test_distillation_makes_pairs_valid_that_independent_words_cannot(tmp_path: Path) -> None:
    # Best joint choice (a, b) with 40 %; best independent choice (a, d), which never occurs: a has
    # 40 % of the first words, d 60 % of the second.
    write_multimodal(tmp_path / "raw", repeats=20)
    data = DataConfig(
        dataset="text", raw=str(tmp_path / "raw"), prepared=str(tmp_path / "prepared"),
        source_language="src", target_language="tgt", segmentation="words", vocabulary_size=100,
        max_length=16, max_tokens=500,
    )  # fmt: skip
    prepare(data=data)
    settings: dict[str, Any] = {
        "model": ModelConfig(
            width=32, num_heads=2, hidden_width=64, encoder_layers=1, decoder_layers=2,
            dropout=0.0, normalisation="pre", max_length=32, num_actions=8, copy="soft_relative",
            copy_start=10.0,
        ),
        "data": data,
        "train": TrainConfig(
            steps=90, lr=5e-3, schedule="linear", warmup=10, clip_norm=1.0, log_every=90,
            device="cpu",
        ),
        "decode": DecodeConfig(beam=4, alpha=0.6, max_length_constant=10),
        "label_smoothing": 0.0,
    }  # fmt: skip
    stages = StagesConfig(initialise="none")
    train_teacher(**settings, stages=stages, run=tmp_path / "teacher")
    distill(teacher=tmp_path / "teacher", output=tmp_path / "distilled")
    share = {}
    for targets in ("raw", "distilled"):
        train(
            **settings,
            parallel=ParallelDecodeConfig(scorer="none"),
            objective=ObjectiveConfig(imitation=0.0),
            stages=StagesConfig(initialise="none", targets=targets),
            distilled=tmp_path / "distilled",
            run=tmp_path / targets,
        )
        share[targets] = valid_pairs(tmp_path / targets)
    assert share["raw"] < 0.10
    assert share["distilled"] > 0.95

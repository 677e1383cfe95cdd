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

SYMBOLS = 6
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


def write_multimodal(folder: Path, *, pairs: int, seed: int) -> None:
    """Text in which every symbol s becomes (a_s, b_s), (c_s, d_s) or (e_s, d_s)."""
    random = np.random.default_rng(seed)
    folder.mkdir()
    for part, count in (("train", pairs), ("valid", 100), ("test", 100)):
        rows = [random.integers(SYMBOLS, size=random.integers(1, 4)) for _ in range(count)]
        targets = [
            [MODES[m] for m in random.choice(len(MODES), size=len(row), p=SHARES)] for row in rows
        ]
        source = "".join(" ".join(f"s{s}" for s in row) + "\n" for row in rows)
        target = "".join(
            " ".join(
                f"{word}{s}" for s, mode in zip(row, modes, strict=True) for word in mode.split()
            )
            + "\n"
            for row, modes in zip(rows, targets, strict=True)
        )
        (folder / f"{part}.src").write_text(source)
        (folder / f"{part}.tgt").write_text(target)


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
            pair = words[2 * place : 2 * place + 2]
            name = symbol.removeprefix("s")
            right += " ".join(pair) in {
                " ".join(f"{word}{name}" for word in mode.split()) for mode in MODES
            }
    return right / number


@pytest.mark.slow
def test_distillation_makes_pairs_valid_that_independent_words_cannot(tmp_path: Path) -> None:
    # Best joint choice (a, b) with 40 %; best independent choice (a, d), which never occurs: a has
    # 40 % of the first words, d 60 % of the second.
    write_multimodal(tmp_path / "raw", pairs=1500, seed=1)
    data = DataConfig(
        dataset="text", raw=str(tmp_path / "raw"), prepared=str(tmp_path / "prepared"),
        source_language="src", target_language="tgt", segmentation="words", vocabulary_size=100,
        max_length=16, max_tokens=512,
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
            steps=250, lr=5e-3, schedule="inverse_sqrt", warmup=50, clip_norm=1.0, log_every=50,
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

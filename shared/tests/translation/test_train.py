import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from separata_shared import translation
from separata_shared.data.vocabulary import EOS
from separata_shared.nn import Transformer
from separata_shared.translation import (
    TransformerConfig,
    build_transformer,
    load,
    load_for,
    translation_step,
    validation_loss,
)
from separata_shared.translation.data import Sequences
from separata_shared.translation.train import with_vocabulary

Settings = dict[str, Any]

load_run = partial(
    translation.load_run, TransformerConfig, partial(build_transformer, kind=Transformer)
)


def test_validation_loss_counts_tokens_and_not_batches(trained_run: Path) -> None:
    trained = load_run(trained_run)
    valid = load(trained.data).valid
    whole = validation_loss(trained.network, valid, 10_000)
    parts = validation_loss(trained.network, valid, 20)
    assert whole["loss"] == pytest.approx(parts["loss"], abs=1e-6)
    assert whole["perplexity"] == pytest.approx(math.exp(whole["loss"]), rel=1e-12)
    step = translation_step(0.0)
    sums = [0.0, 0.0]
    with torch.no_grad():
        for n in range(len(valid)):
            loss = step(trained.network, valid.batch([n]))
            sums[0] += loss.total.item()
            sums[1] += loss.count.item()
    assert sums[1] == len(valid.target.tokens)
    assert whole["loss"] == pytest.approx(sums[0] / sums[1], abs=1e-6)


def test_vocabulary_sizes_come_from_the_data_or_must_equal_them(small: Settings) -> None:
    corpus = load(small["data"])
    assert with_vocabulary(small["model"], corpus).target_vocabulary_size == 10  # 6 and 4 special
    stated = replace(small["model"], source_vocabulary_size=10, target_vocabulary_size=10)
    assert with_vocabulary(stated, corpus) == stated
    for side in ("source", "target"):
        other = replace(small["model"], **{f"{side}_vocabulary_size": 11})
        with pytest.raises(ValueError, match=rf"model\.{side}_vocabulary_size: is 11, .* 10 types"):
            with_vocabulary(other, corpus)


def test_a_sentence_longer_than_the_positions_is_refused(small: Settings) -> None:
    with pytest.raises(ValueError, match=r"^model\.max_length: is 8, but the train part .* 10 tok"):
        load_for(replace(small["model"], max_length=8), small["data"])


def test_smoothing_is_spread_over_the_vocabulary() -> None:
    # Two types, logits of 0: every log-probability is -ln 2, whatever the smoothing.
    batch = translation.Split(*[Sequences.of([np.array([3, EOS])])] * 2).batch([0])
    for smoothing in (0.0, 0.1):
        loss = translation_step(smoothing)(lambda source, target: torch.zeros(1, 2, 4), batch)
        assert loss.count == 2
        assert loss.total.item() == pytest.approx(2 * math.log(4))


@pytest.mark.parametrize("smoothing", [-0.1, 1.0, math.nan])
def test_smoothing_outside_its_range_is_refused(smoothing: float) -> None:
    with pytest.raises(ValueError, match=r"^label_smoothing: "):
        translation_step(smoothing)

"""A language model so small that a step takes milliseconds; also a command, for tests that kill it.

``python toy.py fit --run r --train.steps 8`` trains one run, ``python toy.py jobs --file j.json``
several in the same process group.
"""

import json
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from separata_shared.attention import topk_attention
from separata_shared.cli import main
from separata_shared.data import MappedSequence, TokenBuckets, pad
from separata_shared.nn import MultiHeadAttention
from separata_shared.training import Loss, Run, TrainConfig, TrainResult
from separata_shared.training import fit as fit_model
from torch import Tensor, nn

SYMBOLS = 20
PADDING = 0


class Block(nn.Module):
    """Linear map, dropout and residual connection; the unit that FSDP2 shards.

    With ``impl``, top-k attention of that implementation comes first.
    """

    def __init__(self, width: int, dropout: float, impl: str | None) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)
        if impl is not None:
            attend = partial(topk_attention, top_k=2, impl=impl)
            self.attention = MultiHeadAttention(width, 2, attend=attend)

    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self, "attention"):
            x = x + self.attention(x, causal=True)
        return self.norm(x + self.dropout(F.relu(self.linear(x))))


class Toy(nn.Module):
    """Guesses the next symbol from this one; its output weights are its embeddings."""

    def __init__(self, *, width: int = 8, dropout: float = 0.3, impl: str | None = None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(SYMBOLS, width)
        self.blocks = nn.ModuleList(Block(width, dropout, impl) for _ in range(2))
        self.output = nn.Linear(width, SYMBOLS, bias=False)
        self.output.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.output(x)


def build(**settings: Any) -> Toy:
    torch.manual_seed(0)
    return Toy(**settings)


def sentences() -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.integers(1, SYMBOLS, length) for length in random.integers(2, 12, 60)]


def batches(epoch: int) -> Sequence[Tensor]:
    data = sentences()
    buckets = TokenBuckets([len(row) for row in data], max_tokens=36, seed=3)
    return MappedSequence(lambda i: pad([data[j] for j in i], PADDING), buckets(epoch))


def step(model: nn.Module, tokens: Tensor) -> Loss:
    target = tokens[:, 1:]
    logits = model(tokens[:, :-1])
    total = F.cross_entropy(
        logits.flatten(0, 1), target.flatten(), ignore_index=PADDING, reduction="sum"
    )
    return Loss(total, target.ne(PADDING).sum(), {"nll": total.detach()})


def evaluate(model: nn.Module) -> dict[str, float]:
    losses = [step(model, tokens) for tokens in batches(0)]
    return {"loss": float(sum(x.total for x in losses) / sum(x.count for x in losses))}


def fit(
    *,
    run: Path,
    train: TrainConfig,
    dropout: float = 0.3,
    impl: str | None = None,
    pause: float = 0.0,
) -> TrainResult:
    """Train a toy.

    Args:
        run: Run directory.
        train: Training.
        dropout: Dropout.
        impl: Implementation of top-k attention; none without.
        pause: Seconds to wait in each step.
    """

    def before_step(_: int) -> None:
        time.sleep(pause)

    return fit_model(
        build(dropout=dropout, impl=impl),
        batches,
        step,
        config=train,
        run=Run(run, {"train": train, "dropout": dropout}),
        evaluate=evaluate,
        blocks=(Block,),
        before_step=before_step,
    )


def jobs(*, file: Path) -> None:
    """Train several toys one after another.

    Args:
        file: JSON list of the settings of each.
    """
    for job in json.loads(file.read_text()):
        run, dropout = Path(job.pop("run")), job.pop("dropout", 0.3)
        impl = job.pop("impl", None)
        fit(run=run, train=TrainConfig(**job), dropout=dropout, impl=impl)


if __name__ == "__main__":
    main({"fit": fit, "jobs": jobs}, package="separata_shared")

"""A whole training step of a Transformer with six and six layers, made of the shared blocks."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
from _cases import Case
from _competitors import ALL, Competitor
from _operation import TOLERANCES, clear_rows
from separata_shared.attention import Attend
from separata_shared.nn import (
    Decoder,
    DecoderLayer,
    Encoder,
    EncoderLayer,
    FeedForward,
    MultiHeadAttention,
    PostNorm,
    SinusoidalPositions,
    TokenEmbedding,
)
from separata_shared.testing import timing
from torch import Tensor, nn
from torch.nn import functional as F

VOCABULARY, PADDING, LAYERS = 10_000, 1, 6


class Transformer(nn.Module):
    """An encoder-decoder whose one table of vectors serves source, target and output.

    Args:
        case: Width of a head and number of heads.
    """

    def __init__(self, case: Case) -> None:
        super().__init__()
        width = case.heads * case.width
        self.tokens = TokenEmbedding(VOCABULARY, width=width, padding_index=PADDING)
        self.positions = SinusoidalPositions(width, padding_index=PADDING, max_length=case.source)

        def attention() -> MultiHeadAttention:
            return MultiHeadAttention(width, case.heads)

        def residual() -> PostNorm:
            return PostNorm(width)

        def feed_forward() -> FeedForward:
            return FeedForward(width, 4 * width)

        self.encoder = Encoder(
            EncoderLayer(attention(), feed_forward(), residual=residual) for _ in range(LAYERS)
        )
        self.decoder = Decoder(
            DecoderLayer(attention(), attention(), feed_forward(), residual=residual)
            for _ in range(LAYERS)
        )

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Mean loss of ``target (B, T + 1)`` given ``source (B, S)``."""
        memory = self.encoder(self.embed(source))
        logits = self.tokens.project(self.decoder(self.embed(target[:, :-1]), memory))
        return F.cross_entropy(logits.flatten(0, 1), target[:, 1:].flatten())

    def embed(self, tokens: Tensor) -> Tensor:
        """Vectors of tokens at their positions."""
        embedded: Tensor = self.tokens(tokens) + self.positions(tokens)
        return embedded

    def use(self, attend: Callable[..., Tensor]) -> None:
        """Let all attentions be this one."""
        for module in self.modules():
            if isinstance(module, MultiHeadAttention):
                module.replace_attend(cast(Attend, attend))


class Step:
    """A training step: forward, backward and Adam; competitors train one model in turn.

    Args:
        case: Shape, with the length of source and target.
        device: Where to run.
    """

    def __init__(self, case: Case, device: str) -> None:
        self.case = case
        random = torch.Generator().manual_seed(0)
        torch.manual_seed(0)
        self.model = Transformer(case).to(device)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-6)
        self.tokens = [
            torch.randint(PADDING + 1, VOCABULARY, (case.batch, length), generator=random).to(
                device
            )
            for length in (case.source, case.queries + 1)
        ]

    def run(self, competitor: Competitor) -> Callable[[], object]:
        """What is timed."""
        attend = self.attend(competitor)

        def run() -> None:
            self.model.use(attend)
            with timing.matmul_precision(competitor.precision):
                self.optimizer.zero_grad()
                self.model(*self.tokens).backward()
                self.optimizer.step()

        return run

    def saved_mib(self, competitor: Competitor) -> float:
        """MiB held for the backward, weights included."""
        self.model.use(self.attend(competitor))
        return round(timing.saved_bytes(lambda: self.model(*self.tokens)) / 2**20, 1)

    def deviation(self, competitor: Competitor) -> float:
        """Largest deviation of an attention in the model, as a share of what is allowed."""
        attend = self.attend(competitor)
        expected = self.attend(ALL[competitor.expected or ""])
        errors: list[Tensor] = []

        def compare(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, **_: Any) -> Tensor:
            with timing.matmul_precision(competitor.precision):
                found = attend(q, k, v, causal=causal)
            true: Tensor = expected(q, k, v, causal=causal)
            clear = clear_rows(replace(self.case, causal=causal), q, k)
            errors.append(((found - true) * clear).abs().max() / true.abs().max())
            return true  # so that a selection that differs does not change the layers behind

        self.model.use(compare)
        with torch.no_grad():
            self.model(*self.tokens)
        return float(torch.stack(errors).max()) / TOLERANCES[self.case.dtype][0]

    def attend(self, competitor: Competitor) -> Callable[..., Tensor]:
        """An attention of the model; the model says which sites are causal."""
        sites = {
            causal: competitor.attend(replace(self.case, causal=causal)) for causal in (False, True)
        }

        def attend(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, **_: Any) -> Tensor:
            return sites[causal](q, k, v)

        return attend

    def floor(self, flops: float, bandwidth: float) -> None:
        """A floor is known for single operations only."""

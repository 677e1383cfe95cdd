"""Who is timed: dense attention, top-k attention and what others offer."""

import functools
import importlib
import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from _cases import Case
from separata_shared.attention import topk_attention
from separata_shared.testing.timing import Precision
from torch import Tensor
from torch.nn import functional as F

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]

# Bytes of scores and what is made of them that a competitor may hold at a time.
MOST_BYTES = 6 * 2**30
# Scores that dense attention computes at a time; more are taken some heads after the others.
MOST_SCORES = 2**27


@dataclass(frozen=True, kw_only=True)
class Competitor:
    """An attention operation and the rules under which it is timed.

    Attributes:
        attend: Makes the operation for a case.
        expected: The competitor it must agree with; None for another function of the scores.
        precision: Setting of float32 products.
        matrices: Copies of the scores in float32 that it holds forward, and in training.
        most_scores: Scores above which it is too slow to be timed.
        package: The other package that it comes from. Those select among scores rounded to the
            dtype of the inputs, so they are checked in float32.
    """

    attend: Callable[[Case], Attention]
    expected: Literal["dense", "reference"] | None = "reference"
    precision: Precision = "highest"
    matrices: tuple[int, int] = (0, 0)
    most_scores: float = math.inf
    package: str | None = None

    @property
    def missing(self) -> bool:
        """Whether its package is not installed."""
        return self.package is not None and importlib.util.find_spec(self.package) is None

    def too_large(self, case: Case) -> str:
        """Why this competitor is not timed in this case; empty where it is."""
        held = self.matrices[case.mode != "forward"] * case.scores * 4
        if held > MOST_BYTES:
            return f"would hold {held / 2**30:.0f} GiB, more than {MOST_BYTES >> 30}"
        if case.scores > self.most_scores:
            return f"slow: not timed above {self.most_scores:.0f} scores"
        return ""


def sdpa(case: Case) -> Attention:
    """The attention of torch itself."""
    return functools.partial(F.scaled_dot_product_attention, is_causal=case.causal)


def dense(case: Case) -> Attention:
    """Product, softmax, product, in the dtype of the inputs."""
    scores = score(case)
    heads = max(MOST_SCORES * case.batch * case.heads // case.scores, 1)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if case.scores <= MOST_SCORES:
            return scores(q, k).softmax(dim=-1) @ v
        parts = zip(*(torch.split(x.flatten(0, 1), heads) for x in (q, k, v)), strict=True)
        output = torch.empty_like(q)  # outputs between the matrices would fragment the memory
        for number, (q_part, k_part, v_part) in enumerate(parts):
            rows = slice(number * heads, (number + 1) * heads)
            output.view(-1, *q.shape[2:])[rows] = scores(q_part, k_part).softmax(dim=-1) @ v_part
        return output

    return attend


def score(case: Case) -> Callable[[Tensor, Tensor], Tensor]:
    """Scaled and, where causal, masked scores; the mask is made once."""
    hidden = torch.ones(case.queries, case.source, dtype=torch.bool).triu(1)

    def scores(q: Tensor, k: Tensor) -> Tensor:
        product: Tensor = (q * case.width**-0.5) @ k.mT
        return product.masked_fill(hidden.to(q.device), -torch.inf) if case.causal else product

    return scores


def top_k(name: Any) -> Callable[[Case], Attention]:
    """One of our implementations."""

    def make(case: Case) -> Attention:
        options: dict[str, Any] = {"top_k": case.top_k, "causal": case.causal, "impl": name}
        return functools.partial(topk_attention, **options)  # type: ignore[return-value]

    return make


def x_transformers(case: Case) -> Attention:
    """The attention of x-transformers with its option for top-k."""
    module = importlib.import_module("x_transformers.attend")
    attend = module.Attend(sparse_topk=case.top_k, causal=case.causal, heads=case.heads)
    return lambda q, k, v: attend(q, k, v)[0]


def entmax(name: str) -> Callable[[Case], Attention]:
    """Attention with a sparse function of package entmax in place of the softmax."""

    def make(case: Case) -> Attention:
        weights = getattr(importlib.import_module("entmax"), name)
        scores = score(case)
        return lambda q, k, v: weights(scores(q, k), dim=-1) @ v

    return make


ALL = {
    "sdpa": Competitor(attend=sdpa, expected="dense"),
    "dense": Competitor(attend=dense, expected="dense", matrices=(0, 2)),
    "reference": Competitor(attend=top_k("reference"), matrices=(6, 9), most_scores=2**25),
    "eager": Competitor(attend=top_k("eager"), matrices=(3, 4)),
    "blocked": Competitor(attend=top_k("blocked")),
    "native": Competitor(attend=top_k("native")),
    "triton": Competitor(attend=top_k("triton")),
    "auto": Competitor(attend=top_k("auto")),
    "x-transformers": Competitor(
        attend=x_transformers, matrices=(6, 8), most_scores=2**29, package="x_transformers"
    ),
    "sparsemax": Competitor(
        attend=entmax("sparsemax"),
        expected=None,
        matrices=(8, 10),
        most_scores=2**25,
        package="entmax",
    ),
    "entmax15": Competitor(
        attend=entmax("entmax15"),
        expected=None,
        matrices=(8, 10),
        most_scores=2**25,
        package="entmax",
    ),
}
DENSE = ("sdpa", "dense", "sdpa medium", "dense medium")


def competitors(case: Case, device: str) -> dict[str, Competitor]:
    """The competitors of a case by name."""
    other_kernel = "triton" if device == "cpu" else "native"
    names = [name for name in ALL if name != other_kernel]
    twice = ["sdpa", "dense"]  # with each library of float32 products
    if case.mode == "step":
        names = ["sdpa", "dense", "blocked", "auto"]
        twice = names
    found = {name: ALL[name] for name in names if not ALL[name].missing}
    if device == "cpu" and case.dtype == "float32":
        found |= {f"{name} medium": replace(ALL[name], precision="medium") for name in twice}
    return found

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


@dataclass(frozen=True, kw_only=True)
class Competitor:
    """An attention operation and the rules under which it is timed.

    Attributes:
        attend: Makes the operation for a case.
        expected: The competitor it must agree with; None for another function of the scores.
        precision: Setting of float32 products.
        whole: Whether it holds matrices of scores. It then gets some heads after the others,
            which costs it nothing and bounds the memory.
        most_scores: Scores above which it is not timed, because it is slow.
        package: The other package that it comes from. Those select among scores rounded to the
            dtype of the inputs, so they are checked in float32.
    """

    attend: Callable[[Case], Attention]
    expected: Literal["dense", "reference"] | None = "reference"
    precision: Precision = "highest"
    whole: bool = False
    most_scores: float = math.inf
    package: str | None = None

    @property
    def missing(self) -> bool:
        """Whether its package is not installed."""
        return self.package is not None and importlib.util.find_spec(self.package) is None


def sdpa(case: Case) -> Attention:
    """The attention of torch itself."""
    return functools.partial(F.scaled_dot_product_attention, is_causal=case.causal)


def dense(case: Case) -> Attention:
    """Product, softmax, product, in the dtype of the inputs."""
    scores = score(case)
    return lambda q, k, v: scores(q, k).softmax(dim=-1) @ v


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
    "dense": Competitor(attend=dense, expected="dense", whole=True),
    "reference": Competitor(attend=top_k("reference"), whole=True, most_scores=2**25),
    "eager": Competitor(attend=top_k("eager"), whole=True, most_scores=2**29),
    "blocked": Competitor(attend=top_k("blocked")),
    "native": Competitor(attend=top_k("native")),
    "triton": Competitor(attend=top_k("triton")),
    "auto": Competitor(attend=top_k("auto")),
    "x-transformers": Competitor(
        attend=x_transformers, whole=True, most_scores=2**29, package="x_transformers"
    ),
    "sparsemax": Competitor(
        attend=entmax("sparsemax"), expected=None, whole=True, most_scores=2**25, package="entmax"
    ),
    "entmax15": Competitor(
        attend=entmax("entmax15"), expected=None, whole=True, most_scores=2**25, package="entmax"
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

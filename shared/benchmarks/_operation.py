"""One attention operation on random inputs: its reference, its floor, and what is timed."""

from collections.abc import Callable

import torch
from _cases import Case
from _competitors import ALL, Attention, Competitor
from separata_shared.testing import timing
from torch import Tensor

# Largest deviations of output and gradients, as a share of the largest number; half precision
# rounds the weights as well.
TOLERANCES = {"float32": (1e-5, 5e-5), "bfloat16": (2e-2, 2e-2)}
# Scores this close to the threshold may fall on either side of it.
GAP = 1e-4
# Scores of the heads that a competitor gets at a time if it holds matrices of them. So many are
# compared, since the references do.
PART = 2**26


class Operation:
    """An attention operation of a case, forward or with its backward.

    Args:
        case: Shape and mode.
        device: Where to run.
    """

    def __init__(self, case: Case, device: str) -> None:
        self.case = case
        self.training = case.mode == "training"
        dtype = getattr(torch, case.dtype)
        random = torch.Generator().manual_seed(0)
        self.inputs, self.upstream = [], torch.empty(0)
        for length in (case.queries, case.source, case.source, case.queries):
            shape = (case.batch, case.heads, length, case.width)
            self.inputs.append(torch.randn(shape, generator=random).to(device, dtype))
        self.upstream = self.inputs.pop()
        self.heads = max(PART // (case.queries * case.source), 1)
        # Rows without a clear selection are not compared, nor do they send gradients to the keys.
        self.clear = clear_rows(case, *(self.first(x) for x in self.inputs[:2]))
        self.first(self.upstream).mul_(self.clear)
        self._known: dict[tuple[str, torch.dtype], list[Tensor]] = {}

    def first(self, tensor: Tensor) -> Tensor:
        """The heads of the first sentence that are compared ``(h, T, ...)``."""
        return tensor[0, : min(self.heads, self.case.heads)]

    def parts(self, competitor: Competitor) -> list[list[Tensor]]:
        """What a competitor gets at a time: query, key, value, and the gradient of the output."""
        tensors = [*self.inputs, self.upstream]
        if not competitor.whole or self.heads >= self.case.batch * self.case.heads:
            return [tensors]
        split = [torch.split(x.flatten(0, 1).unsqueeze(0), self.heads, dim=1) for x in tensors]
        return [list(part) for part in zip(*split, strict=True)]

    def run(self, competitor: Competitor) -> Callable[[], object]:
        """What is timed."""
        attend = competitor.attend(self.case)
        parts = self.parts(competitor)

        def run() -> None:
            with timing.matmul_precision(competitor.precision):
                for part in parts:
                    results(attend, part, self.training)

        return run

    def saved_mib(self, competitor: Competitor) -> float | None:
        """MiB held for the backward, inputs included."""
        if not self.training:
            return None
        attend = competitor.attend(self.case)
        total = 0
        for part in self.parts(competitor):
            inputs = [x.clone().requires_grad_() for x in part[:3]]
            total += timing.saved_bytes(lambda: attend(*inputs))  # noqa: B023
        return round(total / 2**20, 1)

    def deviation(self, competitor: Competitor) -> float:
        """Largest deviation from the reference, as a share of what is allowed."""
        if competitor.expected is None:
            return 0.0
        dtype = torch.float32 if competitor.package else self.upstream.dtype
        part = [x.to(dtype) for x in self.parts(competitor)[0]]
        with timing.matmul_precision(competitor.precision):
            found = results(competitor.attend(self.case), part, self.training)
        tolerance = TOLERANCES[str(dtype).removeprefix("torch.")]
        errors = []
        for number, (own, true) in enumerate(
            zip(self.comparable(found), self._expected(competitor.expected, dtype), strict=True)
        ):
            error = (own - true).abs().max() / true.abs().max()
            errors.append(error / tolerance[number > 0])
        return float(torch.stack(errors).max())  # NaN if there is one

    def comparable(self, tensors: list[Tensor]) -> list[Tensor]:
        """Output and gradients as far as they are compared."""
        output, *gradients = (self.first(x).float() for x in tensors)
        return [output * self.clear, *gradients]

    def _expected(self, name: str, dtype: torch.dtype) -> list[Tensor]:
        if (name, dtype) not in self._known:
            part = [self.first(x).unsqueeze(0).to(dtype) for x in (*self.inputs, self.upstream)]
            found = results(ALL[name].attend(self.case), part, self.training)
            self._known[name, dtype] = self.comparable(found)
        return self._known[name, dtype]

    def floor(self, flops: float, bandwidth: float) -> float:
        """Seconds that top-k attention takes at least.

        Each allowed pair costs one product, each kept one a few; inputs are read and results
        written once, but only the kept rows of the values are needed.

        Args:
            flops: Operations a second.
            bandwidth: Bytes a second.
        """
        case = self.case
        rows = case.batch * case.heads * case.queries
        pairs = rows * (case.source - (case.queries - 1) / 2 * case.causal)
        kept = rows * min(case.top_k, case.source)
        operations = 2 * case.width * (pairs + kept)
        queries, keys, _ = (x.nbytes for x in self.inputs)
        values = min(keys, kept * case.width * self.upstream.element_size())
        moved = 2 * queries + keys + values
        if self.training:
            operations += 8 * case.width * kept
            moved += queries + keys + values  # read again, with the gradient of the output
            moved += queries + 2 * keys + 16 * kept  # gradients; entries written and read
        return max(operations / flops, moved / bandwidth)


def results(attend: Attention, part: list[Tensor], training: bool) -> list[Tensor]:
    """The output, and in training the gradients for the upstream gradient at the end."""
    *inputs, upstream = part
    inputs = [x.detach().requires_grad_(training) for x in inputs]
    output = attend(*inputs)
    if not training:
        return [output]
    return [output.detach(), *torch.autograd.grad(output, inputs, upstream)]


def clear_rows(case: Case, query: Tensor, key: Tensor) -> Tensor:
    """Say in which rows ``(..., T, 1)`` rounding cannot change the selection."""
    scores = (query.float() * case.width**-0.5) @ key.float().mT
    if case.causal:
        scores.masked_fill_(
            torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1),
            -torch.inf,
        )
    largest = scores.topk(min(case.top_k + 1, case.source), dim=-1).values
    if case.top_k >= case.source:
        return torch.ones_like(query[..., :1], dtype=torch.bool)
    # Where fewer keys are allowed the difference is infinite or NaN, and the selection clear.
    tied: Tensor = (largest[..., -2:-1] - largest[..., -1:]) <= GAP
    return ~tied

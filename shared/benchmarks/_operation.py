"""One attention operation on random inputs: its reference, its floor, and what is timed."""

import functools
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
# Scores of the heads that are compared, since the references hold whole matrices.
COMPARED = 2**26


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
        heads = max(COMPARED // (case.queries * case.source), 1)
        self.compared = (slice(0, 1), slice(0, heads))  # of the first sentence
        # Rows without a clear selection are not compared, nor do they send gradients to the keys.
        self.clear = clear_rows(case, *(x[self.compared] for x in self.inputs[:2]))
        self.upstream[self.compared] *= self.clear
        self._expected = functools.cache(self._compute_expected)

    def run(self, competitor: Competitor) -> Callable[[], object]:
        """What is timed."""
        attend = competitor.attend(self.case)
        inputs = [x.detach().requires_grad_(self.training) for x in self.inputs]

        def run() -> list[Tensor]:
            with timing.matmul_precision(competitor.precision):
                return results(attend, inputs, self.upstream)

        return run

    def saved_mib(self, competitor: Competitor) -> float | None:
        """MiB held for the backward, inputs included."""
        attend = competitor.attend(self.case)
        inputs = [x.detach().requires_grad_() for x in self.inputs]
        if not self.training:
            return None
        return round(timing.saved_bytes(lambda: attend(*inputs)) / 2**20, 1)

    def deviation(self, competitor: Competitor) -> float:
        """Largest deviation from the reference, as a share of what is allowed."""
        if competitor.expected is None:
            return 0.0
        dtype = torch.float32 if competitor.package else self.upstream.dtype
        inputs = [x.detach().to(dtype).requires_grad_(self.training) for x in self.inputs]
        attend = competitor.attend(self.case)
        with timing.matmul_precision(competitor.precision):
            found = results(attend, inputs, self.upstream.to(dtype))
        found = [x[self.compared].float() for x in found]
        found[0] *= self.clear
        tolerance = TOLERANCES[str(dtype).removeprefix("torch.")]
        errors = []
        for number, (own, true) in enumerate(
            zip(found, self._expected(competitor.expected, dtype), strict=True)
        ):
            error = (own - true).abs().max() / true.abs().max()
            errors.append(error / tolerance[number > 0])
        return float(torch.stack(errors).max())  # NaN if there is one

    def _compute_expected(self, name: str, dtype: torch.dtype) -> list[Tensor]:
        inputs = [
            x[self.compared].detach().to(dtype).requires_grad_(self.training) for x in self.inputs
        ]
        reference = ALL[name].attend(self.case)
        expected = [
            x.float() for x in results(reference, inputs, self.upstream[self.compared].to(dtype))
        ]
        return [expected[0] * self.clear, *expected[1:]]

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


def results(attend: Attention, inputs: list[Tensor], upstream: Tensor) -> list[Tensor]:
    """The output, and the gradients where the inputs want them."""
    output = attend(*inputs)
    if not output.requires_grad:
        return [output]
    return [output.detach(), *torch.autograd.grad(output, inputs, upstream)]


def clear_rows(case: Case, query: Tensor, key: Tensor) -> Tensor:
    """Say in which rows ``(B, H, T, 1)`` rounding cannot change the selection."""
    scores = (query.float() * case.width**-0.5) @ key.float().mT
    if case.causal:
        scores.masked_fill_(torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1), -torch.inf)
    largest = scores.topk(min(case.top_k + 1, case.source), dim=-1).values
    if case.top_k >= case.source:
        return torch.ones_like(query[..., :1], dtype=torch.bool)
    # Where fewer keys are allowed the difference is infinite or NaN, and the selection clear.
    tied: Tensor = (largest[..., -2:-1] - largest[..., -1:]) <= GAP
    return ~tied

"""What norms do to gradients: the four cases of Theorem 1, for any model and batch.

With y = (x - mean) / s, the gradient g that arrives at y, its mean over the features and its
variance D, the gradient that leaves at x has, row by row,

================  ==============  ================
what is constant  mean            variance
================  ==============  ================
nothing           0               at most D / s^2
mean              mean(g) / s     at most D / s^2
s                 0               D / s^2
mean and s        mean(g) / s     D / s^2
================  ==============  ================

So the derivative of the mean re-centres the gradient, and that of s makes its variance smaller.
"""

import csv
import io
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, astuple, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from separata_shared.files import write_json, write_text
from torch import Tensor, nn

from .config import DataConfig, ModelConfig
from .find import affine_of, epsilon_of, layer_norms, shape_of
from .norms import AdaNorm, detach_norm, layer_norm_simple
from .plot import figure
from .probe import probe_function, probe_new, probe_run
from .text import table

Case = Literal["as built", "standard", "detach mean", "detach std", "detach both"]
CASES: tuple[Case, ...] = ("as built", "standard", "detach mean", "detach std", "detach both")

_ROUNDING = 1e-9  # of the theorem's terms, computed in float64


@dataclass(frozen=True)
class GradientStatistics:
    """Gradient of one norm before and after one of the cases; means over the rows."""

    module: str
    norm: str
    """Class of the module."""
    case: Case
    """``as built`` is the gradient of the module itself, the others are Theorem 1's."""
    rows: int
    """Rows with a gradient; padding has none."""
    violations: int
    """Rows that are not as the theorem says; the gradient ``as built`` is not judged."""
    mean_before: float
    """Mean over the features of the gradient that arrives at y, its absolute value."""
    variance_before: float
    mean_after: float
    """The same of the gradient that leaves at x."""
    variance_after: float
    mean_over_s: float
    """``|mean(g)| / s``."""
    variance_over_s2: float
    """``D / s^2``."""


@dataclass
class _Call:
    """What went through a norm in one call, and later its gradients."""

    name: str
    x: Tensor
    output: Tensor | None = None


def gradient_stats(
    *,
    model: ModelConfig,
    data: DataConfig,
    run: Path | None = None,
    function: str | None = None,
    weights: Path | None = None,
    output: Path | None = None,
) -> list[GradientStatistics]:
    """Measure mean and variance of gradients before and after every norm; draw them.

    The gradient of each norm as it is stands beside the four cases of the paper's Theorem 1 for the
    same input. Written are ``gradients.csv``, ``gradients.json`` and ``gradients.png``. Dropout is
    off. Without ``run`` and ``function`` a translation model with fresh parameters is measured.

    Args:
        model: Sizes, wiring and norms of that model.
        data: Its corpus.
        run: Run directory of any training verb.
        function: Your own model: ``module:function`` or ``file.py:function``, a function that gives
            the model and a function of nothing that gives its loss on a batch.
        weights: Weights file of the run; default: its best.
        output: Directory to write; default: beside the run and named after it, as
            ``runs/tiny-gradients`` is for ``runs/tiny``. Of a function the name counts, and without
            either it is ``runs/tiny-gradients``.

    Returns:
        What was written.

    Raises:
        ValueError: The run or the function cannot be used, there are no layer norms, or matplotlib
            is missing.
    """
    if run is not None and function is not None:
        raise ValueError("run and function: give one of the two")
    if run is not None:
        probe = probe_run(run, weights=weights)
        measured = run if run.name.strip(".") else run.resolve()  # "." has a name too
    elif function is not None:
        probe = probe_function(function)
        measured = Path("runs", function.rpartition(":")[2])
    else:
        probe = probe_new(model, data)
        measured = Path("runs/tiny")
    output = output or measured.with_name(f"{measured.name}-gradients")
    records = gradient_statistics(*probe)
    write_statistics(records, output)
    print(statistics_table(records))
    print(output)
    return records


def gradient_statistics(model: nn.Module, loss: Callable[[], Tensor]) -> list[GradientStatistics]:
    """Mean and variance of the gradient before and after every norm of a model.

    Args:
        model: Any model with layer norms; its parameters get no ``grad``.
        loss: Runs the model on a batch and gives a scalar with a gradient.

    Returns:
        Five records for each norm that the loss depends on, one per case.

    Raises:
        ValueError: The model has no layer norms, the loss does not depend on any, or it is not a
            single number.
    """
    norms = layer_norms(model)
    if not norms:
        raise ValueError(f"{type(model).__name__} has no layer norms")
    with torch.enable_grad(), _recorded(model, norms) as calls:
        total = loss()
        if not isinstance(total, Tensor) or total.numel() != 1:
            given = tuple(total.shape) if isinstance(total, Tensor) else type(total).__name__
            raise ValueError(f"the loss must be a tensor of one number, not {given}")
        if not total.requires_grad:
            raise ValueError("the loss has no gradient; was it computed under torch.no_grad()?")
        found = [call for call in calls if call.output is not None]
        tensors = [t for call in found for t in (call.x, call.output) if t is not None]
        gradients = iter(torch.autograd.grad(total, tensors, allow_unused=True) if tensors else ())
    sums: dict[str, Tensor] = {}
    for call, leaving, arriving in zip(found, gradients, gradients, strict=True):
        if leaving is not None and arriving is not None:
            added = _sums(norms[call.name], call.x.detach(), arriving, leaving)
            sums[call.name] = sums.get(call.name, 0) + added
    if not sums:
        raise ValueError("the loss depends on none of the model's layer norms")
    return [
        GradientStatistics(
            name,
            type(norms[name]).__name__,
            case,
            int(count),
            int(violations),
            *(value / max(count, 1) for value in values),
        )
        for name, total in sums.items()
        for case, (count, *values, violations) in zip(CASES, total.tolist(), strict=True)
    ]


@contextmanager
def _recorded(model: nn.Module, norms: dict[str, nn.Module]) -> Iterator[list[_Call]]:
    """Keep input and output of every call of a norm, as tensors that a gradient can be asked of."""
    calls: list[_Call] = []
    with ExitStack() as stack:
        for name, norm in norms.items():
            before = norm.register_forward_pre_hook(partial(_enter, calls, name), with_kwargs=True)
            after = norm.register_forward_hook(partial(_leave, calls))
            stack.callback(before.remove)
            stack.callback(after.remove)
        yield calls


def _enter(
    calls: list[_Call], name: str, norm: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    given = inputs[0] if inputs else next(iter(named.values()))
    # A tensor of its own: its gradient comes from this call alone.
    x = given.view_as(given) if given.requires_grad else given.detach().requires_grad_()
    calls.append(_Call(name, x))
    if inputs:
        return (x, *inputs[1:]), named
    return inputs, {**named, next(iter(named)): x}


def _leave(calls: list[_Call], norm: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    calls[-1].output = output
    return output.clone()  # what follows may change it in place


def _sums(norm: nn.Module, x: Tensor, arriving: Tensor, leaving: Tensor) -> Tensor:
    """Number of rows, sums of six statistics over the rows, violations: (cases, 8)."""
    width = math.prod(shape_of(norm) or x.shape[-1:])
    x, g, dx = (tensor.double().reshape(-1, width) for tensor in (x, arriving, leaving))
    g = g * _slope(norm, x)
    kept = (g != 0).any(dim=-1)
    x, g, dx = x[kept], g[kept], dx[kept]
    s = _scale(norm, x)
    before = (g.mean(-1).abs(), g.var(-1, correction=0))
    over = (before[0] / s, before[1] / s.square())
    rows = []
    for case in CASES:
        after = dx if case == "as built" else _gradient(norm, case, x, g)
        mean, variance = after.mean(-1).abs(), after.var(-1, correction=0)
        wrong = _violations(case, mean, variance, over, g, s)
        values = (torch.ones_like(mean), *before, mean, variance, *over, wrong.to(mean))
        rows.append(torch.stack([value.sum() for value in values]))
    return torch.stack(rows)


def _slope(norm: nn.Module, x: Tensor) -> Tensor | float:
    """What a gradient is multiplied with between the output of a norm and y."""
    if isinstance(norm, AdaNorm):
        return norm.C * (1 - norm.k * layer_norm_simple(x, norm.eps, norm.convention))
    gain = affine_of(norm).gain
    return 1.0 if gain is None else gain.detach().double().flatten()


def _scale(norm: nn.Module, x: Tensor) -> Tensor:
    """The divisor s of each row."""
    eps = epsilon_of(norm)
    if getattr(norm, "convention", "torch") == "torch":
        return (x.var(-1, correction=0) + eps).sqrt()
    return x.std(-1) + eps


def _gradient(norm: nn.Module, case: Case, x: Tensor, g: Tensor) -> Tensor:
    """Gradient of LayerNorm-simple at ``x`` with some of its statistics constant."""
    settings: Any = {
        "eps": epsilon_of(norm),
        "convention": getattr(norm, "convention", "torch"),
    }
    x = x.requires_grad_()
    if case == "standard":
        y = layer_norm_simple(x, **settings)
    else:
        y = detach_norm(
            x,
            detach_mean=case in ("detach mean", "detach both"),
            detach_std=case in ("detach std", "detach both"),
            **settings,
        )
    (gradient,) = torch.autograd.grad(y, x, g)
    return gradient


def _violations(
    case: Case,
    mean: Tensor,
    variance: Tensor,
    over: tuple[Tensor, Tensor],
    g: Tensor,
    s: Tensor,
) -> Tensor:
    """Rows in which Theorem 1 does not hold; the gradient of the module itself is not judged."""
    if case == "as built":
        return torch.zeros_like(mean, dtype=torch.bool)
    slack = _ROUNDING * g.abs().amax(-1) / s
    expected = over[0] if "mean" in case or "both" in case else torch.zeros_like(mean)
    right = (mean - expected).abs() <= slack
    excess = variance - over[1]
    if case in ("detach std", "detach both"):
        excess = excess.abs()
    right &= excess <= slack.square() + _ROUNDING * over[1]
    return ~right  # what is not finite is not right


def statistics_table(records: list[GradientStatistics]) -> str:
    """The records as text, one line each."""
    heads = ("module", "norm", "case", "mean", "of mean(g)/s", "variance", "of D/s^2", "violations")
    names = [
        *heads[:3],
        "mean_after",
        "mean_over_s",
        "variance_after",
        "variance_over_s2",
        heads[7],
    ]
    return table(heads, ([getattr(record, name) for name in names] for record in records))


def write_statistics(records: list[GradientStatistics], directory: Path) -> None:
    """Write ``gradients.csv``, ``gradients.json`` and, as a figure, ``gradients.png``."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([field.name for field in fields(GradientStatistics)])
    writer.writerows(astuple(record) for record in records)
    write_text(directory / "gradients.csv", text.getvalue())
    write_json(directory / "gradients.json", [asdict(record) for record in records])
    draw_statistics(records, directory / "gradients.png")


def draw_statistics(records: list[GradientStatistics], output: Path) -> None:
    """Draw what leaves each norm as a share of Theorem 1's terms, and beside what arrives."""
    names = list(dict.fromkeys(record.module for record in records))
    by_case = {case: [r for r in records if r.case == case] for case in CASES}
    size = (14.0, 2.5 + 0.3 * len(names))
    with figure(output, columns=3, size=size) as (means, variances, sizes):
        for number, (case, chosen) in enumerate(by_case.items()):
            # One below the other, for equal numbers hide each other.
            places = [place + 0.13 * (2 - number) for place in range(len(names))]
            style = {"marker": "o<>^s"[number], "ls": "none", "label": case}
            means.plot([_share(r.mean_after, r.mean_over_s) for r in chosen], places, **style)
            after = [_share(r.variance_after, r.variance_over_s2) for r in chosen]
            variances.plot(after, places, **style)
        built = by_case["as built"]
        sizes.plot([r.variance_before for r in built], range(len(names)), "k|", label="arrives")
        sizes.plot([r.variance_after for r in built], range(len(names)), "o", label="leaves")
        means.set_xlabel("|mean| that leaves / (|mean(g)| / s)")
        variances.set_xlabel("variance that leaves / (D / s^2)")
        sizes.set_xlabel("variance, as built")
        sizes.set_xscale("log")
        for axis in (means, variances, sizes):
            axis.set_yticks(range(len(names)), names if axis is means else [""] * len(names))
            axis.tick_params(axis="y", labelsize=7)
            axis.grid(axis="x", alpha=0.3)
            axis.legend(fontsize=7)


def _share(value: float, whole: float) -> float:
    return value / whole if whole else 0.0

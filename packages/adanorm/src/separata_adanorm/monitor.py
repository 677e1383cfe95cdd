"""How often the normalised features y of a model are so large that AdaNorm behaves oddly.

``z = C (1 - k y) y`` has its peak at ``y = 1 / (2 k)`` and changes its sign at ``y = 1 / k``, with
the published k = 0.1 at 5 and at 10.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import astuple, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .find import check_model, layer_norms, normalised
from .text import table


@dataclass(frozen=True)
class Outliers:
    """Shares of the features of one norm, over all its calls."""

    module: str
    features: int
    """Number of features seen: rows times width."""
    largest: float
    """Largest ``|y|``."""
    above_peak: float
    """Share with ``|y| > 1 / (2 k)``."""
    above_flip: float
    """Share with ``|y| > 1 / k``."""
    flipped: float
    """Share with ``y > 1 / k``, where AdaNorm's output has the other sign."""


class OutlierMonitor:
    """Counts kept on the device of the model; reading the report is what waits for it.

    Args:
        k: Constant of the norms that have none of their own.
    """

    def __init__(self, k: float) -> None:
        self.k = k
        self._counts: dict[str, Tensor] = {}
        self._largest: dict[str, Tensor] = {}
        self._features: dict[str, int] = {}

    @torch.no_grad()
    def add(self, name: str, norm: nn.Module, x: Tensor) -> None:
        """Count in the input ``x (..., H)`` of a call of ``norm``."""
        k = getattr(norm, "k", self.k)
        y = normalised(norm, x)
        size = y.abs()
        limits = (size * abs(k) > 0.5, size * abs(k) > 1, y * k > 1)  # none where k is 0
        counts = torch.stack([limit.sum() for limit in limits])
        largest = size.amax() if size.numel() else size.new_zeros(())
        if name in self._counts:
            counts = counts + self._counts[name]
            largest = torch.maximum(largest, self._largest[name])
        self._counts[name], self._largest[name] = counts, largest
        self._features[name] = self._features.get(name, 0) + y.numel()

    def report(self) -> list[Outliers]:
        """One record per norm that was called, in the order of the calls."""
        return [
            Outliers(
                name,
                features,
                self._largest[name].item(),
                *(count / max(features, 1) for count in self._counts[name].tolist()),
            )
            for name, features in self._features.items()
        ]

    def __str__(self) -> str:
        heads = ("module", "features", "largest |y|", "|y| > peak", "|y| > flip", "y > flip")
        return table(heads, map(astuple, self.report()))


@contextmanager
def monitor_outliers(model: nn.Module, *, k: float = 0.1) -> Iterator[OutlierMonitor]:
    """Count outliers in what every layer norm of a model is given inside the block.

    Outside the block the model has no hooks and costs nothing. Inside, each norm is computed once
    more, and nothing waits for the device. What was compiled before the block does not see hooks;
    run the model itself.

    Args:
        model: Model with norms of this package or LayerNorms, on any device.
        k: Constant of AdaNorm, for norms that have none: what would happen after a replacement.

    Yields:
        The counts; ``report()`` gives them as records, ``print`` as a table.
    """
    monitor = OutlierMonitor(k)
    with _watched(model, monitor.add):
        yield monitor


@contextmanager
def record_normalised(model: nn.Module) -> Iterator[list[Tensor]]:
    """Keep the normalised features y of every call of a layer norm inside the block.

    Args:
        model: As in ``monitor_outliers``.

    Yields:
        The features (..., H) in the order of the calls, detached.
    """
    features: list[Tensor] = []

    @torch.no_grad()
    def keep(name: str, norm: nn.Module, x: Tensor) -> None:
        features.append(normalised(norm, x.detach()))

    with _watched(model, keep):
        yield features


@contextmanager
def _watched(model: nn.Module, see: Callable[[str, nn.Module, Tensor], None]) -> Iterator[None]:
    """Show ``see`` the name, the module and the input of every call of a layer norm."""

    def hook(name: str, norm: nn.Module, inputs: Any, named: dict[str, Any]) -> None:
        see(name, norm, [*inputs, *named.values()][0])

    check_model(model)
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, nn.TransformerEncoder):
                # Its fused path hands nested tensors to layers that the hooks make take another.
                stack.callback(setattr, module, "use_nested_tensor", module.use_nested_tensor)
                module.use_nested_tensor = False
        for name, norm in layer_norms(model).items():
            handle = norm.register_forward_pre_hook(partial(hook, name), with_kwargs=True)
            stack.callback(handle.remove)
        yield

from functools import partial

import pytest
import torch
from separata_shared.nn import PostNorm, PreNorm, SandwichNorm
from torch import Tensor, nn
from torch.testing import assert_close


def plus_one(x: Tensor) -> Tensor:
    return 3 * x + 1


X = torch.tensor([[1.0, 5.0]])


def normed(x: Tensor) -> Tensor:
    return nn.functional.layer_norm(x, (2,))


@pytest.mark.parametrize(
    ("wiring", "expected"),
    [
        (PostNorm, normed(X + plus_one(X))),
        (PreNorm, X + plus_one(normed(X))),
        (SandwichNorm, X + normed(plus_one(normed(X)))),
    ],
)
def test_formula(wiring: type[nn.Module], expected: Tensor) -> None:
    assert_close(wiring(2)(X, plus_one), expected)


@pytest.mark.parametrize("wiring", [PostNorm, PreNorm, SandwichNorm])
def test_dropout_drops_the_sublayer_only(wiring: type[nn.Module]) -> None:
    module = wiring(2, norm=lambda _: nn.Identity(), dropout=1.0)
    assert torch.equal(module(X, plus_one), X)
    assert torch.equal(module.eval()(X, plus_one), X + plus_one(X))


@pytest.mark.parametrize(("wiring", "count"), [(PostNorm, 1), (PreNorm, 1), (SandwichNorm, 2)])
def test_every_norm_comes_from_the_factory(wiring: type[nn.Module], count: int) -> None:
    module = wiring(8, norm=partial(nn.RMSNorm, eps=1e-3))
    assert sum(isinstance(each, nn.RMSNorm) for each in module.modules()) == count
    assert not any(isinstance(each, nn.LayerNorm) for each in module.modules())

import torch
from separata_shared.nn import FeedForward
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close


def test_formula_and_names() -> None:
    module = FeedForward(4, 6, activation=F.gelu)
    x = torch.randn(2, 3, 4)
    state = module.state_dict()
    assert set(state) == {"fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"}
    hidden = F.gelu(x @ state["fc1.weight"].T + state["fc1.bias"])
    assert_close(module(x), hidden @ state["fc2.weight"].T + state["fc2.bias"])


def test_default_activation_is_relu() -> None:
    module = FeedForward(4, 6)
    nn.init.constant_(module.fc1.bias, -100.0)
    nn.init.constant_(module.fc2.bias, 3.0)
    assert_close(module(torch.randn(2, 4)), torch.full((2, 4), 3.0))


def test_dropout_acts_on_the_hidden_units() -> None:
    module = FeedForward(4, 1000, dropout=0.25)
    nn.init.zeros_(module.fc1.weight)
    nn.init.ones_(module.fc1.bias)
    nn.init.constant_(module.fc2.weight, 1 / 1000)
    kept = module(torch.zeros(1, 4))[0, 0] * 0.75
    # The share of 1000 units kept has standard deviation 0.014.
    assert 0.68 < kept < 0.82
    assert_close(module.eval()(torch.zeros(1, 4)), torch.ones(1, 4))

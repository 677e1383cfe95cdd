from collections.abc import Callable
from functools import partial

import pytest
import torch
from separata_shared.attention import Attend, dense_attention, topk_attention
from separata_shared.nn import (
    Decoder,
    DecoderLayer,
    Encoder,
    EncoderLayer,
    FeedForward,
    MultiHeadAttention,
    PostNorm,
)
from torch import nn

WIDTH = 16
RESIDUAL = partial(PostNorm, WIDTH)

ATTENDS = {
    "dense": dense_attention,
    "top_k": partial(topk_attention, top_k=3),
    "ratio": partial(topk_attention, ratio=2.5, min_keys=2),
    "per_head": partial(topk_attention, top_k=torch.tensor([[1], [2], [3], [30]])),
}


@pytest.fixture(params=ATTENDS.values(), ids=ATTENDS)
def attend(request: pytest.FixtureRequest) -> Attend:
    return request.param


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def _attention(attend: Attend) -> MultiHeadAttention:
    return MultiHeadAttention(WIDTH, 4, attend=attend)


def build_encoder(
    *,
    attend: Attend = dense_attention,
    residual: Callable[[], nn.Module] = RESIDUAL,
    final_norm: nn.Module | None = None,
) -> Encoder:
    layers = [
        EncoderLayer(_attention(attend), FeedForward(WIDTH, 24), residual=residual)
        for _ in range(2)
    ]
    return Encoder(layers, final_norm=final_norm)


def build_decoder(
    *,
    attend: Attend = dense_attention,
    residual: Callable[[], nn.Module] = RESIDUAL,
    final_norm: nn.Module | None = None,
) -> Decoder:
    layers = [
        DecoderLayer(
            _attention(attend), _attention(attend), FeedForward(WIDTH, 24), residual=residual
        )
        for _ in range(2)
    ]
    return Decoder(layers, final_norm=final_norm)


@pytest.fixture
def make_encoder() -> Callable[..., Encoder]:
    return build_encoder


@pytest.fixture
def make_decoder() -> Callable[..., Decoder]:
    return build_decoder

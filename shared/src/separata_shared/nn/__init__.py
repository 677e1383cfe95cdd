"""Transformer blocks. What varies is passed in: the attention function, the norm, the wiring."""

from separata_shared.nn.attention import MultiHeadAttention, padding_mask
from separata_shared.nn.cache import DecoderState
from separata_shared.nn.embedding import LearnedPositions, SinusoidalPositions, TokenEmbedding
from separata_shared.nn.feed_forward import FeedForward
from separata_shared.nn.layer import DecoderLayer, EncoderLayer
from separata_shared.nn.recording import record_attention
from separata_shared.nn.residual import PostNorm, PreNorm, SandwichNorm
from separata_shared.nn.stack import Decoder, Encoder
from separata_shared.nn.transformer import InputEmbedding, Transformer

__all__ = [
    "Decoder",
    "DecoderLayer",
    "DecoderState",
    "Encoder",
    "EncoderLayer",
    "FeedForward",
    "InputEmbedding",
    "LearnedPositions",
    "MultiHeadAttention",
    "PostNorm",
    "PreNorm",
    "SandwichNorm",
    "SinusoidalPositions",
    "TokenEmbedding",
    "Transformer",
    "padding_mask",
    "record_attention",
]

"""The outside baseline of ``bench``: an autoregressive model of ours, run by CTranslate2.

CTranslate2 is optional (extra ``bench``); nothing else here needs it.
"""

import tempfile
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from separata_shared.data.vocabulary import EOS, PAD, UNK
from separata_shared.nn import MultiHeadAttention, Transformer
from torch import Tensor, nn

from .config import ModelConfig

Array = NDArray[np.float32]


def version() -> str:
    """Version of CTranslate2.

    Raises:
        ValueError: It is not installed.
    """
    return str(_library().__version__)


def _library() -> Any:
    try:
        import ctranslate2
    except ImportError:
        raise ValueError(
            "the baseline CTranslate2 is missing, and without it there is no speed-up to print: "
            "pip install 'separata-imitation-nat[bench]'"
        ) from None
    return ctranslate2


class OutsideTranslator:
    """Greedy and beam search by CTranslate2 with the weights of a Transformer of ours.

    Args:
        network: The model, on a CPU.
        config: Its sizes.
        precision: Of weights and products.
        threads: Threads of one translation.

    Raises:
        ValueError: CTranslate2 is not installed, or cannot run such a model.
    """

    def __init__(
        self,
        network: Transformer,
        config: ModelConfig,
        *,
        precision: Literal["float32", "int8"],
        threads: int,
    ) -> None:
        library = _library()
        spec = _filled(library.specs, network, config)
        self._source = _names(config.source_vocabulary_size)
        target = _names(config.target_vocabulary_size)
        self._numbers = {name: number for number, name in enumerate(target)}
        spec.register_source_vocabulary(self._source)
        spec.register_target_vocabulary(target)
        for token in ("decoder_start_token", "eos_token", "bos_token"):
            setattr(spec.config, token, target[EOS])
        spec.config.unk_token = target[UNK]
        spec.validate()
        spec.optimize(quantization=None if precision == "float32" else precision)
        with tempfile.TemporaryDirectory() as folder:
            spec.save(folder)
            self._translator = library.Translator(
                folder,
                device="cpu",
                compute_type=precision,
                inter_threads=1,
                intra_threads=threads,
            )

    def translate(
        self, source: Sequence[Sequence[int]], *, beam: int, shortest: int, longest: int
    ) -> list[list[int]]:
        """The best translation of each sentence, without end mark.

        Args:
            source: Tokens of each sentence, ending in EOS.
            beam: Beam size; 1 is greedy search.
            shortest: Fewest tokens.
            longest: Most tokens.
        """
        results = self._translator.translate_batch(
            [[self._source[token] for token in row] for row in source],
            beam_size=beam,
            min_decoding_length=shortest,
            max_decoding_length=longest,
            max_batch_size=0,
        )
        return [[self._numbers[name] for name in result.hypotheses[0]] for result in results]


def _names(size: int) -> list[str]:
    """A name for every token: CTranslate2 reads and writes names."""
    names = [f"t{number}" for number in range(size)]
    names[PAD], names[EOS] = "<pad>", "</s>"
    return names


def _filled(specs: Any, network: Transformer, config: ModelConfig) -> Any:
    """The specification of CTranslate2 with copies of our weights."""
    activations = {"relu": specs.Activation.RELU, "gelu": specs.Activation.GELU}
    is_pre = config.normalisation == "pre"
    spec = specs.TransformerSpec.from_config(
        (config.encoder_layers, config.decoder_layers),
        config.num_heads,
        pre_norm=is_pre,
        activation=activations[config.activation],
    )
    encoder, decoder = spec.encoder, spec.decoder
    source: Any = network.source
    target: Any = network.target
    encoder.embeddings[0].weight = _array(source.tokens.weight)
    decoder.embeddings.weight = _array(target.tokens.weight)
    encoder.position_encodings.encodings = _positions(source.positions)
    decoder.position_encodings.encodings = _positions(target.positions)
    output = network.output
    table = output.weight if isinstance(output, nn.Linear) else target.tokens.weight
    decoder.projection.weight = _array(table)
    decoder.projection.weight[PAD] = 0.0  # our search never writes padding
    for place, layer in zip(encoder.layer, network.encoder.layers, strict=True):
        _fill_self_attention(place.self_attention, layer)
        _fill_feed_forward(place.ffn, layer)
    for place, layer in zip(decoder.layer, network.decoder.layers, strict=True):
        _fill_self_attention(place.self_attention, layer)
        cross: Any = layer.cross_attention
        _fill_linear(place.attention.linear[0], cross.q_proj)
        _fill_linear(place.attention.linear[1], cross.k_proj, cross.v_proj)
        _fill_linear(place.attention.linear[2], cross.out_proj)
        _fill_norm(place.attention.layer_norm, layer.cross_attention_residual.norm)
        _fill_feed_forward(place.ffn, layer)
    if is_pre:
        _fill_norm(encoder.layer_norm, network.encoder.final_norm)
        _fill_norm(decoder.layer_norm, network.decoder.final_norm)
    return spec


def _fill_self_attention(place: Any, layer: Any) -> None:
    attention: MultiHeadAttention = layer.self_attention
    _fill_linear(place.linear[0], attention.q_proj, attention.k_proj, attention.v_proj)
    _fill_linear(place.linear[1], attention.out_proj)
    _fill_norm(place.layer_norm, layer.self_attention_residual.norm)


def _fill_feed_forward(place: Any, layer: Any) -> None:
    _fill_linear(place.linear_0, layer.feed_forward.fc1)
    _fill_linear(place.linear_1, layer.feed_forward.fc2)
    _fill_norm(place.layer_norm, layer.feed_forward_residual.norm)


def _fill_linear(place: Any, *parts: nn.Linear) -> None:
    place.weight = np.concatenate([_array(part.weight) for part in parts])
    place.bias = np.concatenate([_array(part.bias) for part in parts])


def _fill_norm(place: Any, norm: Any) -> None:
    place.gamma, place.beta = _array(norm.weight), _array(norm.bias)


def _positions(positions: Any) -> Array:
    """The table of positions, from the first on."""
    table: Tensor = positions.weight if isinstance(positions, nn.Embedding) else positions.table
    return _array(table[PAD + 1 :])


def _array(tensor: Tensor) -> Array:
    # A copy: the conversion to 8 bits rounds what it is given in place.
    array: Array = tensor.detach().to(torch.float32).numpy().copy()
    return array

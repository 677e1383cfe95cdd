"""The dialog model of the authors' code in our names and layout.

Names and checks are those of the last commit of their code: the embeddings are stored three times,
the tables of positions twice, and ``START`` is a constant. V vocabulary, M model width, d numbers
of a user vector.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from separata_shared.files import read_json
from torch import Tensor

from .config import DialogConfig
from .dialog import DialogModel, Positions, count_places
from .words import START

RECOMMENDER_PREFIX = "kbrd."
EMBEDDINGS = "embeddings.weight"
_COPIES = ("encoder.embeddings.weight", "decoder.embeddings.weight")
_POSITIONS = ("encoder.position_embeddings.weight", "decoder.position_embeddings.weight")
_BIAS = "user_representation_to_bias"
# Of a layer, theirs and ours.
_ATTENTION = {f"{part}_lin": f"{part}_proj" for part in ("q", "k", "v", "out")}
_FEED_FORWARD = {"ffn.lin1": "feed_forward.fc1", "ffn.lin2": "feed_forward.fc2"}
_ENCODER = {
    **{f"attention.{theirs}": f"self_attention.{ours}" for theirs, ours in _ATTENTION.items()},
    **_FEED_FORWARD,
    "norm1": "self_attention_residual.norm",
    "norm2": "feed_forward_residual.norm",
}
_DECODER = {
    **{f"self_attention.{theirs}": f"self_attention.{ours}" for theirs, ours in _ATTENTION.items()},
    **{
        f"encoder_attention.{theirs}": f"cross_attention.{ours}"
        for theirs, ours in _ATTENTION.items()
    },
    **_FEED_FORWARD,
    "norm1": "self_attention_residual.norm",
    "norm2": "cross_attention_residual.norm",
    "norm3": "feed_forward_residual.norm",
}


@dataclass(frozen=True, kw_only=True)
class Converted:
    """A dialog model that was read."""

    config: DialogConfig
    """The given choices with the sizes of the file."""
    state: dict[str, Tensor]
    """Its tensors in our names."""
    num_tokens: int
    """V."""


def dialog_names(encoder_layers: int, decoder_layers: int) -> dict[str, str]:
    """Our name of each parameter of the authors' dialog model; the recommender is left out."""
    names = {EMBEDDINGS: "transformer.source.tokens.weight"}
    pieces = {f"{_BIAS}_1": "bias.first", f"{_BIAS}_2": "bias.second"}
    for layer in range(encoder_layers):
        ours = f"transformer.encoder.layers.{layer}.layer"
        pieces |= {f"encoder.layers.{layer}.{n}": f"{ours}.{own}" for n, own in _ENCODER.items()}
    for layer in range(decoder_layers):
        ours = f"transformer.decoder.layers.{layer}"
        pieces |= {f"decoder.layers.{layer}.{n}": f"{ours}.{own}" for n, own in _DECODER.items()}
    for theirs, ours in pieces.items():
        names |= {f"{theirs}.{part}": f"{ours}.{part}" for part in ("weight", "bias")}
    return names


def dialog_from_authors(
    state: dict[str, Tensor], config: DialogConfig, *, user_width: int, source: object
) -> Converted:
    """Read the dialog model of a checkpoint of the authors' code.

    Args:
        state: Tensors of their dialog model; those of the recommender in it are not looked at.
        config: What tensors cannot say: the heads, dropout, how it writes.
        user_width: d of the recommender.
        source: What messages call the state.

    Raises:
        ValueError: A tensor is missing, unknown, not finite or of another shape, or the model has
            trained positions or several embeddings.
    """
    own = {name: t for name, t in state.items() if not name.startswith(RECOMMENDER_PREFIX)}
    names = dialog_names(_count(own, "encoder"), _count(own, "decoder"))
    constants = (*_COPIES, *_POSITIONS, "START")
    for name, tensor in own.items():
        if name not in names and name not in constants:
            raise ValueError(f"{source}: unknown tensor {name}; it is of another model")
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{source}: {name} holds NaN or infinite numbers")
    missing = [name for name in (*names, *_POSITIONS) if name not in own]
    if missing:
        more = f" and {len(missing) - 1} others" if missing[1:] else ""
        raise ValueError(f"{source}: lacks {missing[0]}{more}; it is of another model")
    sizes = _sizes(own, source)
    config = _resized(config, own, sizes, source)
    _check_constants(own, config, source)
    network = DialogModel(config, num_tokens=sizes[EMBEDDINGS][0], user_width=user_width)
    wanted = network.state_dict()
    found = {}
    for theirs, ours in names.items():
        if own[theirs].shape != wanted[ours].shape:
            raise ValueError(
                f"{source}: {theirs} has shape {tuple(own[theirs].shape)}, "
                f"the model needs {tuple(wanted[ours].shape)}"
            )
        found[ours] = own[theirs].float().contiguous()
    return Converted(config=config, state=found, num_tokens=sizes[EMBEDDINGS][0])


def check_options(path: Path, config: DialogConfig) -> None:
    """Compare with the options that ParlAI wrote beside the checkpoint, if they are still there.

    Raises:
        ValueError: They cannot be read, or speak of another model.
    """
    if not path.exists():
        return
    options: Any = read_json(path)
    if not isinstance(options, dict):
        raise ValueError(f"{path}: not the options of a model")
    heads = options.get("n_heads", config.num_heads)
    if heads != config.num_heads:
        raise ValueError(
            f"{path}: the model has {heads} heads, but dialog.num_heads is {config.num_heads}"
        )
    if options.get("embeddings_scale", True) is not True:
        raise ValueError(f"{path}: embeddings that are not scaled are not supported")


def _count(state: dict[str, Tensor], side: str) -> int:
    """Layers of a side; at least one, so that a model without any lacks something."""
    found = {n.split(".")[2] for n in state if n.startswith(f"{side}.layers.") and n.count(".") > 2}
    return max(1, len(found))


def _sizes(state: dict[str, Tensor], source: object) -> dict[str, tuple[int, int]]:
    """Shapes of the tables that the sizes of the model are read from."""
    sizes = {}
    for name in (EMBEDDINGS, "encoder.layers.0.ffn.lin1.weight", f"{_BIAS}_1.weight", *_POSITIONS):
        if state[name].dim() != 2 or not state[name].numel():
            raise ValueError(
                f"{source}: {name} has shape {tuple(state[name].shape)}, not two dimensions"
            )
        sizes[name] = (state[name].shape[0], state[name].shape[1])
    return sizes


def _resized(
    config: DialogConfig,
    state: dict[str, Tensor],
    sizes: dict[str, tuple[int, int]],
    source: object,
) -> DialogConfig:
    try:
        return replace(
            config,
            width=sizes[EMBEDDINGS][1],
            hidden_width=sizes["encoder.layers.0.ffn.lin1.weight"][0],
            encoder_layers=_count(state, "encoder"),
            decoder_layers=_count(state, "decoder"),
            bias_width=sizes[f"{_BIAS}_1.weight"][0],
            max_length=sizes[_POSITIONS[0]][0],
        )
    except ValueError as error:
        raise ValueError(f"{source}: its sizes do not fit the configuration ({error})") from None


def _check_constants(state: dict[str, Tensor], config: DialogConfig, source: object) -> None:
    """Make sure that what our model computes or shares is the same in the file."""
    start = state.get("START")
    if start is not None and start.flatten().tolist() != [START]:
        raise ValueError(f"{source}: START is {start.flatten().tolist()}, not [{START}]")
    for name in _COPIES:
        if name in state and not torch.equal(state[name], state[EMBEDDINGS]):
            raise ValueError(f"{source}: {name} is not {EMBEDDINGS}; one table is supported")
    table = Positions(config.width, number=count_places, max_length=config.max_length).table
    for name in _POSITIONS:
        found = state[name]
        same = found.shape == table.shape
        # They may be stored in half precision; sines of another platform differ in the last bit.
        if not same or (found - table.to(found.dtype)).abs().max() > 1e-6:
            raise ValueError(f"{source}: {name} is not the table of sines; it may be trained")

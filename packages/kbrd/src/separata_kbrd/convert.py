"""Weights of the authors' code as a run directory of this package: the verb ``convert``."""

import pickle
from pathlib import Path
from typing import Any

import torch
from separata_shared.cli import to_yaml
from separata_shared.files import write_json, write_text
from separata_shared.training import Run, save_weights
from torch import Tensor

from .config import Aggregate, DataConfig, DialogConfig, RecommenderConfig
from .convert_dialog import (
    EMBEDDINGS,
    RECOMMENDER_PREFIX,
    Converted,
    check_options,
    dialog_from_authors,
)
from .data import load
from .graph import KnowledgeGraph
from .runs import DIALOG, RECOMMENDER
from .system import RECOMMENDER_RECORD, VOCABULARY, recommender_record
from .words import Vocabulary

# Theirs, with the library of 2019 and of today, and ours.
NAMES = {
    "rgcn.basis": "graph.basis",
    "rgcn.weight": "graph.basis",
    "rgcn.att": "graph.att",
    "rgcn.comp": "graph.att",
    "rgcn.root": "graph.root",
    "rgcn.bias": "graph.bias",
    "self_attn.a": "user.a",
    "self_attn.b": "user.b",
    "output.bias": "output_bias",
}
# What the authors' checkpoints store and nothing reads.
UNUSED = ("entity_emb.weight", "relation_emb.weight", "output.weight")
OURS = set(NAMES.values())


def convert(
    *,
    checkpoint: Path,
    data: DataConfig,
    dialog: DialogConfig,
    aggregate: Aggregate = "sum",
    run: Path = Path("runs/converted"),
) -> Path:
    """Read a checkpoint of the authors' code and write it as a run directory.

    A checkpoint of the dialog model holds its recommender as well; both are read if the data names
    the dictionary of ParlAI that lies beside the checkpoint, and else only the recommender. Nothing
    in the file is executed. The tensors ``entity_emb``, ``relation_emb`` and ``output.weight`` of
    the recommender, which the authors' code stores and never reads, are left out.

    Args:
        checkpoint: File that ParlAI saved.
        data: What it was trained on, prepared from the authors' files; for the dialog model with
            ``dictionary`` and with ``slots: shared``.
        dialog: What the file does not say about the dialog model: heads, dropout, how it writes.
            Its sizes are those of the file.
        aggregate: What a node does with its neighbours: sum if the checkpoint was trained with
            torch_geometric before 1.6, mean otherwise; the file does not say.
        run: Run directory to write.

    Returns:
        The weights file of the recommender.

    Raises:
        ValueError: The file is missing, damaged, of another model, or does not fit the data.
    """
    for part in (RECOMMENDER, DIALOG):
        if Run(run / part).config.exists():
            raise ValueError(f"{run / part}: holds a run already; choose another run directory")
    corpus = load(data)
    stored = read_checkpoint(checkpoint)
    state = _recommender(stored, corpus.graph, source=checkpoint)
    _, B, d = state["graph.basis"].shape
    talker = None
    if EMBEDDINGS in stored and data.dictionary is not None:
        check_options(checkpoint.with_name(f"{checkpoint.name}.opt"), dialog)
        talker = dialog_from_authors(stored, dialog, user_width=d, source=checkpoint)
        _check_vocabulary(talker, corpus.vocabulary, checkpoint)
    config = RecommenderConfig(width=d, num_bases=B, aggregate=aggregate)
    weights = _write(run / RECOMMENDER, state, {"data": data, "recommender": config})
    print(weights)
    if talker is not None:
        corpus.vocabulary.save(run / DIALOG / VOCABULARY)
        write_json(run / DIALOG / RECOMMENDER_RECORD, recommender_record(weights))
        print(_write(run / DIALOG, talker.state, {"data": data, "dialog": talker.config}))
    elif EMBEDDINGS in stored:
        print("the dialog model was left out: it needs its dictionary (data.dictionary)")
    return weights


def _recommender(
    stored: dict[str, Tensor], graph: KnowledgeGraph, *, source: Path
) -> dict[str, Tensor]:
    """The recommender's tensors in our names, of the shapes that the graph needs."""
    state = from_authors(stored, num_nodes=graph.num_nodes, source=source)
    _, B, d = state["graph.basis"].shape
    N, R = graph.num_nodes, graph.num_relations
    shapes = {"graph.basis": (N, B, d), "graph.att": (R, B), "graph.root": (N, d)}
    shapes |= {"graph.bias": (d,), "user.a": (d, d), "user.b": (d, 1), "output_bias": (N,)}
    for name, shape in shapes.items():
        if state[name].shape != shape:
            found = tuple(state[name].shape)
            raise ValueError(f"{source}: {name} has shape {found}, the graph needs {shape}")
    return state


def _check_vocabulary(talker: Converted, vocabulary: Vocabulary, source: Path) -> None:
    if vocabulary.slots != "shared":
        raise ValueError(
            f"{source}: its dialog model has one token for items and unknown words; "
            "prepare the data with data.slots shared"
        )
    if talker.num_tokens != len(vocabulary):
        raise ValueError(
            f"{source}: {EMBEDDINGS} has {talker.num_tokens} rows, but the dictionary has "
            f"{len(vocabulary)} tokens"
        )


def _write(path: Path, state: dict[str, Tensor], config: dict[str, Any]) -> Path:
    directory = Run(path)
    weights = directory.weights / "step_0000000.safetensors"
    save_weights(weights, state)
    write_text(directory.config, to_yaml(config))
    return weights


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The tensors of the model in a checkpoint of ParlAI, by name.

    Raises:
        ValueError: The file is missing, damaged, or holds more than tensors and plain values.
    """
    try:
        stored: Any = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except pickle.UnpicklingError as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{path}: refused, since loading it could run code ({reason})") from None
    except (LookupError, TypeError):  # bytes that are no pickle at all
        raise ValueError(f"{path}: not a readable checkpoint (torch did not write it)") from None
    except (RuntimeError, OSError, EOFError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "it ends too early"
        raise ValueError(f"{path}: not a readable checkpoint ({reason})") from None
    if isinstance(stored, dict) and isinstance(stored.get("model"), dict):
        stored = stored["model"]
    if not isinstance(stored, dict) or not all(isinstance(t, Tensor) for t in stored.values()):
        raise ValueError(f"{path}: holds no model")
    return stored


def from_authors(state: dict[str, Tensor], *, num_nodes: int, source: object) -> dict[str, Tensor]:
    """The recommender's tensors in our names and layout.

    The authors set N to 64,368, six more than their graph has nodes. Such rows at the end belong to
    no node; they are left out.

    Args:
        state: Tensors of the authors' recommender, or of their dialog model with a recommender in
            ``kbrd.``.
        num_nodes: N of the graph.
        source: What messages call the state.

    Raises:
        ValueError: A tensor is missing, unknown or not finite.
    """
    prefix = RECOMMENDER_PREFIX
    inner = {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
    found: dict[str, Tensor] = {}
    for name, tensor in (inner or state).items():
        if name in UNUSED:
            continue
        if name not in NAMES:
            raise ValueError(f"{source}: unknown tensor {name}; it is of another model")
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{source}: {name} holds NaN or infinite numbers")
        found[NAMES[name]] = tensor.float()
    missing = sorted(OURS - found.keys())
    if missing:
        raise ValueError(f"{source}: lacks {', '.join(missing)}; it is of another model")
    if found["graph.basis"].dim() != 3:
        raise ValueError(f"{source}: the bases need three dimensions (B, N, d)")
    found["graph.basis"] = found["graph.basis"].transpose(0, 1)
    for name in ("graph.basis", "graph.root", "output_bias"):
        found[name] = found[name][:num_nodes].contiguous()
    return found

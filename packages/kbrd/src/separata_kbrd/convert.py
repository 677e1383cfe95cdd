"""Weights of the authors' code as a run directory of this package: the verb ``convert``."""

import pickle
from pathlib import Path
from typing import Any

import torch
from separata_shared.cli import to_yaml
from separata_shared.files import write_text
from separata_shared.training import Run, save_weights
from torch import Tensor

from .config import Aggregate, DataConfig, RecommenderConfig
from .data import load
from .runs import RECOMMENDER

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
    aggregate: Aggregate = "sum",
    run: Path = Path("runs/converted"),
) -> Path:
    """Read the recommender of a checkpoint of the authors' code and write it as a run directory.

    A checkpoint of the dialog model holds its recommender as well, which is then read. Nothing in
    the file is executed. The tensors ``entity_emb``, ``relation_emb`` and ``output.weight``, which
    the authors' code stores and never reads, are left out.

    Args:
        checkpoint: File that ParlAI saved.
        data: The graph that it was trained on, prepared from the authors' files.
        aggregate: What a node does with its neighbours: sum if the checkpoint was trained with
            torch_geometric before 1.6, mean otherwise; the file does not say.
        run: Run directory to write.

    Returns:
        The weights file that was written.

    Raises:
        ValueError: The file is missing, damaged, of another model, or does not fit the graph.
    """
    graph = load(data).graph
    state = from_authors(read_checkpoint(checkpoint), num_nodes=graph.num_nodes, source=checkpoint)
    _, B, d = state["graph.basis"].shape
    N, R = graph.num_nodes, graph.num_relations
    shapes = {"graph.basis": (N, B, d), "graph.att": (R, B), "graph.root": (N, d)}
    shapes |= {"graph.bias": (d,), "user.a": (d, d), "user.b": (d, 1), "output_bias": (N,)}
    for name, shape in shapes.items():
        if state[name].shape != shape:
            found = tuple(state[name].shape)
            raise ValueError(f"{checkpoint}: {name} has shape {found}, the graph needs {shape}")
    config = RecommenderConfig(width=d, num_bases=B, aggregate=aggregate)
    directory = Run(run / RECOMMENDER)
    if directory.config.exists():
        raise ValueError(f"{directory.path}: holds a run already; choose another run directory")
    weights = directory.weights / "step_0000000.safetensors"
    save_weights(weights, state)
    write_text(directory.config, to_yaml({"data": data, "recommender": config}))
    print(weights)
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
    except (RuntimeError, OSError, EOFError, ValueError, LookupError, TypeError) as error:
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
    inner = {n.removeprefix("kbrd."): t for n, t in state.items() if n.startswith("kbrd.")}
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

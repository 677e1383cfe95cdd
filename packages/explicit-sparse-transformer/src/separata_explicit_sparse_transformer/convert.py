"""Make a trained dense model sparse, and report what the selection takes away.

Shapes: B batch, H heads, T queries, S keys.
"""

import inspect
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch
from separata_shared.cli import from_yaml
from separata_shared.data.vocabulary import PAD
from separata_shared.files import write_json
from separata_shared.nn import MultiHeadAttention, record_attention
from separata_shared.training import Run, TrainConfig
from torch import Tensor, nn

from .config import AttentionConfig, Site
from .data import ParallelBatch, load
from .generate import TrainedModel, load_run
from .model import TopKAttention, sparse_attentions
from .multihead import TopKMultiheadAttention, check_selection

Batch = TypeVar("Batch")
Row = dict[str, Any]

_TORCH_ARGUMENTS = tuple(inspect.signature(nn.MultiheadAttention.forward).parameters)[1:]


def make_sparse(
    model: nn.Module, top_k: int, *, chosen: Callable[[str], bool] = lambda name: True
) -> list[str]:
    """Let the attentions of a trained model keep ``top_k`` keys; the parameters stay as they are.

    Understood are ``separata_shared.nn.MultiHeadAttention``, whose attention function is replaced,
    and ``torch.nn.MultiheadAttention``, which becomes a ``TopKMultiheadAttention``.

    Args:
        model: Model to change in place.
        top_k: Keys to keep per query.
        chosen: Says of a module's name whether it becomes sparse; all do by default.

    Returns:
        Names of the modules that became sparse.

    Raises:
        ValueError: There is no attention to change, one cannot become sparse, or ``top_k`` is no
            number of keys; the model is as it was.
        TypeError: ``model`` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, not {type(model).__name__}")
    check_selection({"top_k": top_k})
    if isinstance(model, nn.MultiheadAttention):
        raise ValueError(
            "a model that is itself an nn.MultiheadAttention cannot be changed in place; make "
            "another with TopKMultiheadAttention.from_dense"
        )
    # All are made before the first takes its place: one that cannot be made leaves the model whole.
    replacements: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if not chosen(name):
            continue
        if isinstance(module, MultiHeadAttention):
            replacements[name] = TopKAttention(top_k)
        elif isinstance(module, nn.MultiheadAttention):
            replacements[name] = TopKMultiheadAttention.from_dense(module, top_k=top_k)
    if not replacements:
        raise ValueError("the model has no attention that could become sparse")
    for name, replacement in replacements.items():
        module = model.get_submodule(name)
        if isinstance(module, MultiHeadAttention):
            module.replace_attend(replacement)
        else:
            model.set_submodule(name, replacement)
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder):
            # Its fused path hands nested tensors to the layers, which only torch's attention reads.
            module.use_nested_tensor = False
    return list(replacements)


@torch.no_grad()
def measure_attention(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    top_k: int,
    call: Callable[[nn.Module, Batch], Any],
    real_queries: Callable[[str, Batch], Tensor | None] = lambda name, batch: None,
) -> list[Row]:
    """Say how much a dense model would lose if every query kept ``top_k`` keys only.

    Args:
        model: Dense model, in evaluation mode.
        batches: What to run it on.
        top_k: Keys to keep per query.
        call: Runs the model on a batch.
        real_queries: Boolean (B,T), False where a query of the named module is padding; None
            counts all queries.

    Returns:
        One row per module and head: ``module``, ``head``, ``queries`` counted, and means over
        them: ``mass_kept`` (dense probability of the kept keys), ``support`` and ``support_dense``
        (keys with weight), ``entropy`` and ``entropy_dense`` (nats).

    Raises:
        ValueError: Nothing was attended, or ``top_k`` is no number of keys.
    """
    check_selection({"top_k": top_k})
    sums: dict[str, Tensor] = {}
    with _recorded(model) as weights:
        for batch in batches:
            call(model, batch)
            for name, dense in weights.items():
                statistics = _statistics(dense.double(), top_k, real_queries(name, batch))
                sums[name] = sums.get(name, 0) + statistics
            weights.clear()
    if not sums:
        raise ValueError("nothing was attended: no batches, or a model without attention")
    rows = []
    for name, total in sums.items():
        for head, (queries, *values) in enumerate(total.T.tolist()):
            means = [value / max(queries, 1) for value in values]
            row = dict(zip(_STATISTICS, means, strict=True))
            rows.append({"module": name, "head": head, "queries": int(queries), **row})
    return rows


_STATISTICS = ("mass_kept", "support", "support_dense", "entropy", "entropy_dense")


def _statistics(dense: Tensor, top_k: int, real_queries: Tensor | None) -> Tensor:
    """Number of queries and the sums over them of ``_STATISTICS``: ``(6, H)``."""
    counted = dense.sum(dim=-1) > 0  # (B, H, T); rows without any allowed key do not count
    if real_queries is not None:
        counted &= real_queries[:, None]
    kept = dense.topk(min(top_k, dense.shape[-1]), dim=-1).values
    mass = kept.sum(dim=-1)
    sparse = kept / mass.clamp(min=1e-12).unsqueeze(-1)
    values = (
        torch.ones_like(mass),
        mass,
        (sparse > 0).sum(dim=-1),
        (dense > 0).sum(dim=-1),
        torch.special.entr(sparse).sum(dim=-1),
        torch.special.entr(dense).sum(dim=-1),
    )
    return torch.stack([(value * counted).sum(dim=(0, 2)) for value in values])


@contextmanager
def _recorded(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Keep the weights ``(B, H, T, S)`` of our attentions and of torch's, by module name."""
    with record_attention(model) as weights, ExitStack() as stack:
        for name, module in model.named_modules():
            if isinstance(module, nn.TransformerEncoder):
                stack.callback(setattr, module, "use_nested_tensor", module.use_nested_tensor)
                module.use_nested_tensor = False
            if isinstance(module, nn.MultiheadAttention):
                for handle in _record_torch_attention(module, name, weights):
                    stack.callback(handle.remove)
        yield weights


def _record_torch_attention(
    module: nn.MultiheadAttention, name: str, weights: dict[str, Tensor]
) -> Iterator[Any]:
    def ask(module: nn.Module, inputs: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        given = dict(zip(_TORCH_ARGUMENTS, inputs, strict=False)) | options
        return (), given | {"need_weights": True, "average_attn_weights": False}

    def keep(module: nn.Module, inputs: Any, output: tuple[Tensor, Tensor]) -> None:
        found = output[1].detach()
        weights[name] = found if found.dim() == 4 else found[None]

    yield module.register_forward_pre_hook(ask, with_kwargs=True)
    yield module.register_forward_hook(keep)


def attention_table(rows: Iterable[Row]) -> str:
    """The rows of ``measure_attention`` as text, one line each."""
    lines = [f"{'attention':<42} {'head':>4} {'mass kept':>9} {'keys':>13} {'entropy (nats)':>15}"]
    for row in rows:
        lines.append(
            f"{row['module']:<42} {row['head']:>4} {row['mass_kept']:>9.4f} "
            f"{row['support_dense']:>6.1f}->{row['support']:>5.1f} "
            f"{row['entropy_dense']:>7.3f}->{row['entropy']:>6.3f}"
        )
    return "\n".join(lines)


def convert(
    *,
    run: Path = Path("runs/tiny-dense"),
    output: Path = Path("runs/tiny-converted"),
    top_k: int = 8,
    sites: list[Site] | None = None,
    weights: Path | None = None,
    batches: int = 20,
) -> dict[str, Any]:
    """Turn a trained dense model into a sparse one and report what the selection takes away.

    The new run directory has the same parameters and a configuration with top-k attention; it can
    be evaluated and used like any other. ``report.json`` says for each attention and head how much
    of the dense probability the kept keys hold on validation sentences.

    Args:
        run: Run directory of a dense model.
        output: Run directory to write.
        top_k: Keys to keep per query.
        sites: Attentions to make sparse: encoder_self, decoder_self, cross; default: all.
        weights: Weights file; default: the best of the run.
        batches: Validation batches to measure on.

    Returns:
        The report.

    Raises:
        ValueError: The run cannot be read or is not dense, or ``output`` holds something.
    """
    if output.exists() and any(output.iterdir()):
        raise ValueError(f"{output}: is not empty; choose another directory")
    if batches < 1:
        raise ValueError(f"batches: must be at least 1, got {batches}")
    attention = AttentionConfig(kind="topk", top_k=top_k)
    attention = attention if sites is None else replace(attention, sites=sites)
    dense = load_run(run, weights=weights)
    if sparse_attentions(dense.network):
        raise ValueError(
            f"{run}: the model has sparse attention already; convert one that was trained with "
            "--model.attention.kind dense"
        )
    split = load(dense.data).valid
    device = next(dense.network.parameters()).device
    chosen = islice(split.in_order(dense.data.max_tokens), batches)
    rows = measure_attention(
        dense.network,
        (batch.to(device) for batch in chosen),
        top_k=top_k,
        call=lambda network, batch: network(batch.source, batch.decoder_input),
        real_queries=_real_queries,
    )
    report = {
        "top_k": top_k,
        "sites": attention.sites,
        "weights": dense.weights.name,
        "split": "valid",
        "attentions": rows,
    }
    _write_run(dense, replace(dense.model, attention=attention), report, output)
    print(attention_table(rows))
    print(output)
    return report


def _real_queries(name: str, batch: ParallelBatch) -> Tensor:
    queries = batch.source if name.startswith("encoder.") else batch.decoder_input
    return queries != PAD


def _write_run(trained: TrainedModel, model: Any, report: dict[str, Any], output: Path) -> None:
    """Write the run directory of ``trained`` with another wiring, whole or not at all."""
    old = Run(trained.run)
    settings = from_yaml(old.config, {"train": TrainConfig, "label_smoothing": float})
    groups = {"model": model, "data": trained.data, "decode": trained.decode, **settings}
    temporary = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    new = Run(temporary, groups)
    try:
        new.weights.mkdir(parents=True)
        # A name that counts as the weights of a step, also for an average.
        name = (
            trained.weights.name if "step_" in trained.weights.name else "step_0000000.safetensors"
        )
        shutil.copyfile(trained.weights, new.weights / name)
        for path in trained.run.glob("*.vocabulary"):
            shutil.copyfile(path, temporary / path.name)
        new.begin(write=True)
        write_json(temporary / "report.json", report)
        if output.exists():
            output.rmdir()  # empty, as checked
        temporary.rename(output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)

"""Other norms in anybody's model, with a report of what happened to every one."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from .build import norm_factory
from .find import (
    OURS,
    affine_of,
    check_model,
    epsilon_of,
    is_final,
    norm_modules,
    objection,
    shape_of,
)
from .fold import Affine, Consumers, Folder, LinearMap
from .options import Convention
from .text import table

Scope = Literal["all", "final_only"]
Gains = Literal["fold", "drop"]
Factory = Callable[[Any], nn.Module]
"""Makes a norm for a width or a shape."""


@dataclass(frozen=True)
class Replacement:
    """What happened to one norm."""

    name: str
    """Name of the module; of the first, if it is used under several names."""
    old: str
    """Class before."""
    new: str
    """Class after."""
    width: tuple[int, ...]
    """Shape that is normalised."""
    gain: str
    """What became of gain and bias."""


@dataclass(frozen=True)
class Report:
    """What ``replace_norms`` did; printed as a table."""

    replaced: list[Replacement]
    """Every norm replaced, in the order of the model."""
    left: dict[str, str] = field(default_factory=dict)
    """Names of the norms that stayed, and why."""

    def __len__(self) -> int:
        return len(self.replaced)

    def __str__(self) -> str:
        heads = ("module", "old", "new", "width", "gain and bias")
        rows = ((r.name, r.old, r.new, "x".join(map(str, r.width)), r.gain) for r in self.replaced)
        lines = [table(heads, rows)]
        lines += [f"{name}: stays, {reason}" for name, reason in self.left.items()]
        return "\n".join([*lines, f"{len(self)} norms replaced"])


def replace_norms(
    model: nn.Module,
    kind: str | Factory,
    *,
    scope: Scope = "all",
    include: str | Sequence[str] = "*",
    exclude: str | Sequence[str] = (),
    gains: Gains = "fold",
    consumers: Consumers | None = None,
    C: float = 1.0,
    convention: Convention = "official",
) -> Report:
    """Replace the layer norms of a model in place, all of them or none.

    A norm is an ``nn.LayerNorm``, one of this package's, or a module without children whose class
    is called LayerNorm or RMSNorm in some spelling. The last sort is called on random numbers, and
    refused unless it computes what ``F.layer_norm`` does. Functional norms inside a ``forward`` are
    not modules and are not found.

    The new norm has no gain and no bias. Those of a norm that was never trained, 1 and 0, are not
    missed. Trained ones are folded into the linear maps that read the norm, where it is known that
    nothing else does: in the pre-norm layers of torch and of this library, in an ``nn.Sequential``
    that goes on with an ``nn.Linear``, and where ``consumers`` says so.

    Optimizers made before hold the old parameters: make them afterwards.

    Args:
        model: Any model.
        kind: Kind of norm as in ``norm_factory``, or a function that makes a norm for a width.
        scope: ``all`` norms, or ``final_only``: those behind a stack of layers, beside it. Such a
            norm stands inside no layer of the stack, its parent also holds the stack, and its name
            does not say that it belongs to the input (``emb`` or ``pre``).
        include: Patterns of module names to replace, as in a shell.
        exclude: Patterns of module names to leave.
        gains: ``fold`` trained gains and biases or refuse; ``drop`` gives them up.
        consumers: Linear maps that alone read a norm, such as
            ``{"blocks.*.norm1": ["blocks.*.attn.qkv"]}``. A star of a target is what the star of
            the norm stands for, further stars match everything. Parts of an
            ``nn.MultiheadAttention`` are named ``cross:q`` or ``cross:kv``.
        C: Mean of the scaling of AdaNorm.
        convention: ``official`` with the authors' eps, or ``torch`` with the eps of the norm that
            is replaced; only the latter computes what a LayerNorm without gain and bias does.

    Returns:
        Every norm replaced, and what became of its gain and bias.

    Raises:
        ValueError: Nothing is found, a norm is of another sort, a trained gain would be lost, or
            there is no such scope or use of gains; the message names the modules or the argument,
            and the model is as it was.
        TypeError: ``model`` is no module.
    """
    check_model(model)
    _check_choice("scope", scope, Scope)
    _check_choice("gains", gains, Gains)
    if not list(model.children()):
        raise ValueError(
            f"{type(model).__name__} has no modules inside; replace it where it is used"
        )
    names, left = _choose(model, scope, _several(include), _several(exclude))
    make = partial(_make, kind, C, convention)
    folder = Folder(model, consumers=consumers)
    folder.check(list(names))
    plans = [_plan(model, alike, make, gains, folder) for alike in names.values()]
    stuck = [plan.name for plan in plans if plan.maps is None]
    if stuck:
        raise ValueError(
            f"the gain and bias of {', '.join(stuck)} are trained, and it is not known that only "
            "linear maps read these norms; name the maps in consumers, exclude the norms, or give "
            "up gain and bias with gains='drop'"
        )
    for plan in plans:
        _install(model, plan)
    _leave_fast_paths(model)
    _guard(model, [plan.name for plan in plans if not list(plan.new.parameters())])
    return Report([plan.record() for plan in plans], left)


def load_layer_norm_checkpoint(
    model: nn.Module,
    state: Mapping[str, Tensor],
    *,
    gains: Gains = "fold",
    consumers: Consumers | None = None,
) -> dict[str, str]:
    """Load a checkpoint with the gains and biases of LayerNorms into a model that has none.

    Args:
        model: Model whose norms were replaced, or built without gain and bias.
        state: State dict of the same model with LayerNorms.
        gains: As in ``replace_norms``.
        consumers: As in ``replace_norms``.

    Returns:
        Names of the norms, and what became of gain and bias.

    Raises:
        ValueError: A trained gain would be lost, or the checkpoint is of another model; the message
            names the keys, and the model is as it was.
        TypeError: ``model`` is no module.
    """
    check_model(model)
    _check_choice("gains", gains, Gains)
    norms = {
        name: Affine(state.get(f"{name}.weight"), state.get(f"{name}.bias"))
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, OURS) and not list(module.parameters())
    }
    keys = {f"{name}.{key}" for name in norms for key in ("weight", "bias")}
    rest = {key: tensor for key, tensor in state.items() if key not in keys}
    _check_rest(model, rest)
    folder = Folder(model, consumers=consumers)
    folder.check(list(norms))
    found = {
        name: _destination(name, affine, gains, folder)
        for name, affine in norms.items()
        if affine.gain is not None or affine.bias is not None
    }
    stuck = [name for name, (maps, _) in found.items() if maps is None]
    if stuck:
        raise ValueError(
            f"{', '.join(f'{name}.weight' for name in stuck)}: trained, and it is not known that "
            "only linear maps read these norms; name the maps in consumers, or give up gain and "
            "bias with gains='drop'"
        )
    model.load_state_dict(rest)
    for name, (maps, _) in found.items():
        for linear in maps or ():
            linear.fold(norms[name])
    return {name: text for name, (_, text) in found.items()}


@dataclass(frozen=True)
class _Plan:
    name: str
    names: list[str]
    old: nn.Module
    new: nn.Module
    affine: Affine
    maps: list[LinearMap] | None
    gain: str

    def record(self) -> Replacement:
        old, new = type(self.old).__name__, type(self.new).__name__
        return Replacement(self.name, old, new, shape_of(self.old), self.gain)


def _check_choice(name: str, value: str, choices: Any) -> None:
    if value not in get_args(choices):
        raise ValueError(f"{name} must be one of {', '.join(get_args(choices))}, not {value!r}")


def _several(patterns: str | Sequence[str]) -> Sequence[str]:
    return [patterns] if isinstance(patterns, str) else patterns


def _choose(
    model: nn.Module, scope: Scope, include: Sequence[str], exclude: Sequence[str]
) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Norms to replace, and those to leave with the reason."""
    norms = norm_modules(model)
    for argument, patterns in (("include", include), ("exclude", exclude)):
        for pattern in patterns:
            if norms and not any(_matches(names, [pattern]) for names in norms.values()):
                raise ValueError(
                    f"{argument}: {pattern!r} matches none of the norms {', '.join(norms)}"
                )
    chosen, left = {}, {}
    for name, names in norms.items():
        if scope == "final_only" and not is_final(model, name):
            left[name] = "not a final norm"
        elif not _matches(names, include):
            left[name] = "not included"
        elif _matches(names, exclude):
            left[name] = "excluded"
        else:
            chosen[name] = names
    if not chosen:
        others = f"; there are {', '.join(norms)}" if norms else ""
        raise ValueError(f"the model has no norm to replace with scope={scope!r}{others}")
    _check_sorts(model, chosen)
    return chosen, left


def _check_sorts(model: nn.Module, names: Iterable[str]) -> None:
    """Refuse modules that are only called layer norms."""
    reasons: dict[str, list[str]] = {}
    for name in names:
        reason = objection(model.get_submodule(name))
        if reason is not None:
            reasons.setdefault(reason, []).append(name)
    if reasons:
        listed = "; ".join(f"{', '.join(found)}: {text}" for text, found in reasons.items())
        raise ValueError(f"{listed}; exclude what shall stay as it is")


def _matches(names: Sequence[str], patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)


def _plan(
    model: nn.Module,
    names: list[str],
    make: Callable[[nn.Module], nn.Module],
    gains: Gains,
    folder: Folder,
) -> _Plan:
    name = names[0]
    old = model.get_submodule(name)
    new = make(old).train(old.training)
    affine = affine_of(old)
    reference = next(old.parameters(), None)
    if reference is not None:
        new = new.to(reference)
    if isinstance(getattr(new, "weight", None), nn.Parameter):
        return _Plan(name, names, old, new, affine, [], "kept")
    maps, text = _destination(name, affine, gains, folder)
    return _Plan(name, names, old, new, affine, maps, text)


def _make(kind: str | Factory, C: float, convention: Convention, old: nn.Module) -> nn.Module:
    """The norm that takes the place of ``old``."""
    shape = shape_of(old)
    if isinstance(kind, str):
        as_torch = convention == "torch" or kind in ("layer_norm", "clipped")
        eps = epsilon_of(old) if as_torch else 1e-5
        factory: Factory = norm_factory(kind, C=C, eps=eps, convention=convention)
    else:
        factory = kind
    return factory(shape[0] if len(shape) == 1 else shape)


def _destination(
    name: str, affine: Affine, gains: Gains, folder: Folder
) -> tuple[list[LinearMap] | None, str]:
    """Where gain and bias of a norm go, None if that is not known; and the same in words."""
    if affine.gain is None and affine.bias is None:
        return [], "none"
    if not affine.is_trained:
        return [], "1 and 0, not missed"
    if gains == "drop":
        return [], f"dropped ({affine})"
    maps = folder.behind(name, affine)
    return maps or None, "folded into " + ", ".join(linear.name for linear in maps)


def _install(model: nn.Module, plan: _Plan) -> None:
    for linear in plan.maps or ():
        linear.fold(plan.affine)
    if plan.gain == "kept":
        _copy(plan.affine, plan.new)
    for name in plan.names:
        model.set_submodule(name, plan.new)


@torch.no_grad()
def _copy(affine: Affine, norm: nn.Module) -> None:
    for name, tensor in (("weight", affine.gain), ("bias", affine.bias)):
        target = getattr(norm, name, None)
        if tensor is not None and isinstance(target, nn.Parameter):
            target.copy_(tensor)
            target.requires_grad_(tensor.requires_grad)


def _leave_fast_paths(model: nn.Module) -> None:
    """Keep torch from its fused encoder layers, which compute LayerNorm whatever the norm is."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and not _plain(module):
            module.activation_relu_or_gelu = 0  # what a layer with another activation has
        if isinstance(module, nn.TransformerEncoder):
            layers = [m for m in module.layers if isinstance(m, nn.TransformerEncoderLayer)]
            if not all(_plain(layer) for layer in layers):
                module.use_nested_tensor = False


def _plain(layer: nn.TransformerEncoderLayer) -> bool:
    return type(layer.norm1) is nn.LayerNorm and type(layer.norm2) is nn.LayerNorm


def _guard(model: nn.Module, names: list[str]) -> None:
    """Let loading refuse gains and biases, also where torch would ignore unknown keys."""
    for module, inside in [(model, names), *((model.get_submodule(n), [""]) for n in names)]:
        hook = partial(_refuse_gains, inside)
        module.register_load_state_dict_pre_hook(hook)  # type: ignore[no-untyped-call]


def _refuse_gains(
    names: list[str],
    module: nn.Module,
    state: Mapping[str, Tensor],
    prefix: str,
    *others: object,
) -> None:
    modules = dict(module.named_modules())
    # A norm may have been replaced once more, by one with a gain.
    bare = [name for name in names if name in modules and not list(modules[name].parameters())]
    paths = [prefix + f"{name}." if name else prefix for name in bare]
    keys = [path + key for path in paths for key in ("weight", "bias") if path + key in state]
    if keys:
        raise ValueError(
            f"the state holds gain and bias of norms that have none now: {', '.join(keys)}; use "
            "load_layer_norm_checkpoint, which folds them into the next layers or drops them"
        )


def _check_rest(model: nn.Module, rest: Mapping[str, Tensor]) -> None:
    own = model.state_dict()
    if strange := sorted(rest.keys() ^ own.keys()):
        raise ValueError(
            "the checkpoint is of another model; only one of the two has " + ", ".join(strange)
        )
    for name, tensor in rest.items():
        if tensor.shape != own[name].shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, the model needs {tuple(own[name].shape)}"
            )

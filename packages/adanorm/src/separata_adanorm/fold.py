"""Gain and bias of a LayerNorm moved into the linear maps that read its output.

With ``n = gain * y + bias`` and a map ``W n + c``, the map ``(W gain) y + (W bias + c)`` of the
normalised ``y`` gives the same numbers. That is only right when nothing else reads ``n``; in a
post-norm layer, for instance, the residual connection does.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from separata_shared.nn import DecoderLayer, EncoderLayer, FeedForward, MultiHeadAttention, PreNorm
from torch import Tensor, nn

Consumers = Mapping[str, Sequence[str]]
"""Names of the linear maps that alone read a norm, by the norm's name; both may have stars."""


@dataclass(frozen=True)
class Affine:
    """Gain and bias (H) of a LayerNorm; None stands for 1 and 0."""

    gain: Tensor | None
    bias: Tensor | None

    @property
    def is_trained(self) -> bool:
        """Whether they change anything. Tensors without storage have nothing to lose."""
        gain, bias = (None if t is None or t.is_meta else t for t in (self.gain, self.bias))
        return (gain is not None and bool((gain != 1).any())) or (
            bias is not None and bool(bias.any())
        )

    def __str__(self) -> str:
        named = {"gain": self.gain, "bias": self.bias}
        parts = [
            f"{name} {tensor.min().item():.3g} to {tensor.max().item():.3g}"
            for name, tensor in named.items()
            if tensor is not None
        ]
        return ", ".join(parts)


@dataclass(frozen=True)
class LinearMap:
    """Rows of a weight that are applied to the output of a norm."""

    name: str
    """As a user names it, such as ``blocks.0.qkv`` or ``layers.0.self_attn:q``."""
    weight: nn.Parameter
    """``(rows, H)``, or ``(H, rows)`` if ``transposed``."""
    bias: nn.Parameter | None
    """``(rows)``."""
    rows: slice
    transposed: bool = False

    @torch.no_grad()
    def fold(self, affine: Affine) -> None:
        """Take up a gain and a bias, in place."""
        weight = (self.weight.mT if self.transposed else self.weight)[self.rows]
        old = weight.double()
        if affine.bias is not None and self.bias is not None:
            bias = self.bias[self.rows]
            bias.copy_(bias.double() + old @ affine.bias.double())
        if affine.gain is not None:
            weight.copy_(old * affine.gain.double())


class Folder:
    """Finds the linear maps behind the norms of a model.

    Args:
        model: The model. Norms are looked up by name, whatever their class is by now.
        consumers: What the caller knows, as in ``replace_norms``; it goes before what is known of
            torch's and this library's own pre-norm layers.
    """

    def __init__(self, model: nn.Module, *, consumers: Consumers | None = None) -> None:
        self._modules = dict(model.named_modules(remove_duplicate=False))
        self._names: dict[int, list[str]] = defaultdict(list)
        for name, module in self._modules.items():
            self._names[id(module)].append(name)
        owners = Counter(
            id(parameter)
            for module in model.modules()
            for parameter in module._parameters.values()
            if parameter is not None
        )
        self._tied = {parameter for parameter, count in owners.items() if count > 1}
        self._given = {_compiled(norm): targets for norm, targets in (consumers or {}).items()}
        self._known = {
            _joined(name, norm): [_joined(name, target) for target in targets]
            for name, module in self._modules.items()
            for norm, targets in _known_consumers(module)
        }
        self._taken: dict[tuple[int, int | None], str] = {}

    def check(self, norms: Sequence[str]) -> None:
        """Check that each of the caller's patterns names one of ``norms``.

        Raises:
            ValueError: One does not.
        """
        for pattern in self._given:
            if not any(pattern.fullmatch(name) for name in norms):
                glob = pattern.pattern.replace("(.*)", "*").replace("\\", "")
                raise ValueError(f"consumers: {glob!r} names no norm that is replaced")

    def behind(self, norm: str, affine: Affine) -> list[LinearMap]:
        """The maps that alone read ``norm``, ready to take up ``affine``; none if not known.

        Raises:
            ValueError: A map that the caller names does not exist or cannot take them up.
        """
        names = self._names[id(self._modules[norm])]
        wanted = [self._wanted(name) for name in names]
        if not all(wanted):
            return []
        found = {}
        for target in dict.fromkeys(target for targets in wanted for target in targets):
            for linear in self._linear_maps(target, norm):
                self._check(linear, norm, affine)
                if len(self._names[id(self._modules[target.partition(":")[0]])]) != len(names):
                    raise ValueError(_USED_TWICE.format(linear.name, norm))
                place = (id(linear.weight), linear.rows.start)
                if self._taken.setdefault(place, names[0]) != names[0]:
                    raise ValueError(
                        f"consumers: {linear.name} is named for {self._taken[place]} and {norm}"
                    )
                found[place] = linear
        return list(found.values())

    def _wanted(self, norm: str) -> list[str]:
        """Names of the maps behind ``norm``: the caller's, or those that are known."""
        targets: list[str] = []
        for pattern, globs in self._given.items():
            match = pattern.fullmatch(norm)
            for glob in globs if match else ():
                assert match is not None
                for part in match.groups():
                    glob = glob.replace("*", part, 1)
                name, colon, parts = glob.partition(":")
                names = [n for n in self._modules if _compiled(name).fullmatch(n)]
                if not names:
                    raise ValueError(f"consumers: the model has no module {name}")
                targets += [n + colon + parts for n in names]
        return targets or self._known.get(norm, [])

    def _linear_maps(self, target: str, norm: str) -> Iterator[LinearMap]:
        name, _, parts = target.partition(":")
        module = self._modules[name]
        if isinstance(module, nn.MultiheadAttention) and "in_proj_weight" in module._parameters:
            for part in parts or "qkv":
                if part not in "qkv":
                    raise ValueError(f"consumers: {target}: an attention has the parts q, k and v")
                start = "qkv".index(part) * module.embed_dim
                rows = slice(start, start + module.embed_dim)
                yield LinearMap(f"{name}:{part}", module.in_proj_weight, module.in_proj_bias, rows)
        elif not parts and _is_linear(module):
            transposed = type(module).__name__ == "Conv1D"
            weight = module._parameters.get("weight")
            assert weight is not None
            yield LinearMap(name, weight, module.bias, slice(None), transposed)
        else:
            raise ValueError(
                f"consumers: {target} ({type(module).__name__}) cannot take up the gain of {norm}; "
                "name an nn.Linear or the input of an nn.MultiheadAttention"
            )

    def _check(self, linear: LinearMap, norm: str, affine: Affine) -> None:
        width = linear.weight.shape[0 if linear.transposed else 1]
        for tensor in (affine.gain, affine.bias):
            if tensor is not None and tensor.shape != (width,):
                raise ValueError(
                    f"consumers: {linear.name} reads {width} features, {norm} has "
                    f"the shape {tuple(tensor.shape)}"
                )
        if id(linear.weight) in self._tied:
            raise ValueError(_USED_TWICE.format(linear.name, norm))
        if linear.bias is None and affine.bias is not None and bool(affine.bias.any()):
            raise ValueError(
                f"{linear.name} has no bias to take up that of {norm}; give it one of zeros first, "
                "or give up gain and bias with gains='drop'"
            )


_USED_TWICE = (
    "{} cannot take up the gain of {}: it or its weight is used elsewhere too, as a tied embedding "
    "is; untie it, or give up gain and bias with gains='drop'"
)


def _compiled(glob: str) -> re.Pattern[str]:
    """A pattern whose groups are what the stars of ``glob`` stand for."""
    return re.compile("(.*)".join(re.escape(part) for part in glob.split("*")))


def _joined(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _is_linear(module: nn.Module) -> bool:
    """An nn.Linear that computes what its name says, or the transposed one of transformers."""
    is_linear = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
    return "weight" in module._parameters and (is_linear or type(module).__name__ == "Conv1D")


def _known_consumers(module: nn.Module) -> Iterator[tuple[str, list[str]]]:
    """Norms below ``module`` that provably only linear maps read, and those."""
    if type(module) is nn.TransformerEncoderLayer and module.norm_first:
        yield "norm1", ["self_attn"]
        yield "norm2", ["linear1"]
    elif type(module) is nn.TransformerDecoderLayer and module.norm_first:
        yield "norm1", ["self_attn"]
        yield "norm2", ["multihead_attn:q"]
        yield "norm3", ["linear1"]
    elif type(module) in (EncoderLayer, DecoderLayer):
        inputs = {
            "self_attention": ["q_proj", "k_proj", "v_proj"],
            "cross_attention": ["q_proj"],
            "feed_forward": ["fc1"],
        }
        for part, names in inputs.items():
            known = type(getattr(module, part, None)) in (MultiHeadAttention, FeedForward)
            if known and type(getattr(module, f"{part}_residual")) is PreNorm:
                yield f"{part}_residual.norm", [f"{part}.{name}" for name in names]
    elif type(module) is nn.Sequential:
        parts = list(module.named_children())
        for (name, _), (after, reader) in pairwise(parts):
            if type(reader) is nn.Linear:
                yield name, [after]

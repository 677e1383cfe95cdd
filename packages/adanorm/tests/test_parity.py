"""Numbers printed by the authors' code; ``--goldens DIR`` compares with other such files."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from separata_adanorm.build import norm_factory
from separata_adanorm.config import ModelConfig
from separata_adanorm.model import build_model
from separata_adanorm.norms import clipped_layer_norm
from separata_shared.data.vocabulary import EOS, PAD
from separata_shared.decoding import beam_search, power_penalty
from separata_shared.nn import Transformer, padding_mask
from separata_shared.testing.parity import Tolerance, assert_close, load_golden, prefixed
from separata_shared.translation import from_fairseq
from torch import Tensor, nn
from torch.nn import functional as F

Arrays = dict[str, Tensor]

# Kind of input: largest deviation of output and of gradient; with "relative" times the largest
# entry. Other kinds of input are compared as the specification's acceptance checks say.
NORM = {
    "randn": (2e-6, 5e-6, "absolute"),
    "offset": (5e-5, 5e-5, "absolute"),
    "outlier": (2e-5, 5e-6, "absolute"),
    "one_constant_row": (1e-6, 2e-7, "relative"),
}
OTHER_NORM = (2e-5, 1e-5, "relative")
FLOAT64 = (1e-12, 1e-12, "absolute")
CLIPPED = Tolerance("clipped", 1e-5)
MODEL = Tolerance("tiny model", 1e-5)
MODEL_LOSS = Tolerance("summed loss", 1e-3)
MODEL_GRADIENT = Tolerance("gradient of the tiny model", 1e-4)
BEAM_SCORE = Tolerance("beam score", 1e-4)

VARIANTS = {
    "layernorm": "layer_norm",
    "layernorm_simple": "layer_norm_simple",
    "detach_mean": "detach_mean",
    "detach_std": "detach_std",
    "detachnorm": "detach_norm",
    "gradnorm": "grad_norm",
    "no_norm": "no_norm",
}


def test_golden(golden_path: Path) -> None:
    golden = load_golden(golden_path)
    KINDS[golden.config["case"]](golden.config, golden.arrays)


def factory(variant: str, config: dict[str, Any]) -> Callable[[int], nn.Module]:
    """The norm of a variant's name; ``adanorm_c0p8`` is AdaNorm with C = 0.8."""
    name, _, constant = variant.partition("_c")
    if name == "adanorm":
        C = float(constant.replace("p", "."))
        return norm_factory("ada_norm", C=C, k=config["k"], eps=config["eps"])
    return norm_factory(VARIANTS[variant], eps=config["eps"])


def check_norm(config: dict[str, Any], arrays: Arrays) -> None:
    forward, backward, unit = NORM.get(config["input"], OTHER_NORM)
    if config["dtype"] == "float64":
        forward, backward, unit = FLOAT64
    width = config["shape"][-1]
    for variant in config["variants"]:
        if width == 1 and variant not in ("layernorm", "no_norm"):
            # There is no deviation of one entry: the authors' code gives NaN, ours says so.
            with pytest.raises(ValueError, match="H - 1"):
                factory(variant, config)(width)
            continue
        norm = factory(variant, config)(width).to(arrays["x"].dtype)
        found = prefixed(arrays, f"{variant}__")
        if variant == "layernorm":
            affine = {name: arrays[f"layernorm_{name}"] for name in ("weight", "bias")}
            norm.load_state_dict(affine)
        x = arrays["x"].clone().requires_grad_()
        out = norm(x)
        assert_close(out, found.pop("out"), Tolerance("forward", forward), f"{variant} out")
        (out * arrays["grad_out"]).sum().backward()
        gradients = {"grad_x": x.grad} | {f"grad_{n}": p.grad for n, p in norm.named_parameters()}
        assert gradients.keys() == found.keys()
        for name, expected in found.items():
            scale = expected.abs().max().item() if unit == "relative" else 1.0
            tolerance = Tolerance("backward", backward * scale)
            assert_close(gradients[name], expected, tolerance, f"{variant} {name}")


def check_clipped(config: dict[str, Any], arrays: Arrays) -> None:
    kept = arrays["x"].clone()
    out = clipped_layer_norm(arrays["x"], eps=config["eps"], fraction=config["sigma"])
    assert_close(out, arrays["out"], CLIPPED, "out")
    assert torch.equal(arrays["x"], kept)  # the authors' code overwrites it
    norm = norm_factory("clipped", eps=config["eps"], fraction=config["sigma"])
    assert_close(norm(config["shape"][-1])(kept), arrays["out"], CLIPPED, "out of the module")


def norm_kind(config: dict[str, Any]) -> str:
    """Our name of a model's norm."""
    detached = {
        (0, 0): "layer_norm_simple",
        (1, 0): "detach_mean",
        (0, 1): "detach_std",
        (1, 1): "detach_norm",
    }
    return {
        "adanorm": "ada_norm",
        "nowb": detached[config["mean_detach"], config["std_detach"]],
        "gradnorm": "grad_norm",
        "no_norm": "no_norm",
        "layernorm": "layer_norm",
    }[config["norm"]]


def tiny_transformer(config: dict[str, Any], arrays: Arrays) -> Transformer:
    model = build_model(
        ModelConfig(
            width=config["embed_dim"],
            num_heads=config["heads"],
            hidden_width=config["ffn"],
            encoder_layers=config["layers"],
            decoder_layers=config["layers"],
            dropout=0.0,
            normalisation="pre" if config["prenorm"] else "post",
            embeddings="joint",
            source_vocabulary_size=config["vocab"],
            target_vocabulary_size=config["vocab"],
            norm=norm_kind(config),  # type: ignore[arg-type]
            C=config["C"],
            scope=config["norm_scope"],
        )
    )
    state = from_fairseq(prefixed(arrays, "param_"))
    # Gain and bias of norms that have none: allocated and never used by the authors' code.
    dead = {name for name in state if name not in model.state_dict()}
    assert len(dead) == len(config["unused_params"])
    model.load_state_dict({name: state[name] for name in state.keys() - dead})
    assert model.source.tokens.scale == config["embed_scale"]
    assert (config["pad"], config["eos"]) == (PAD, EOS)
    return model.eval()


def check_tiny_transformer(config: dict[str, Any], arrays: Arrays) -> None:
    model = tiny_transformer(config, arrays)
    source, target_input = arrays["src_tokens"], arrays["prev_output_tokens"]
    memory, mask = model.encode(source)
    assert_close(memory.transpose(0, 1), arrays["encoder_out"], MODEL, "encoder_out")
    # fairseq also masks padded target tokens; only the rows of padding depend on it.
    states = model.decoder(
        model.target(target_input),
        memory,
        memory_mask=mask,
        self_mask=padding_mask(target_input, PAD),
    )
    logits = model.output(states)
    assert_close(logits, arrays["logits"], MODEL, "logits")
    assert_close(logits.log_softmax(dim=-1), arrays["log_probs"], MODEL, "log_probs")
    real = target_input != PAD
    whole = model(source, target_input)
    assert_close(whole[real], arrays["logits"][real], MODEL, "logits of the model's own forward")

    flat, target = logits.flatten(0, 1), arrays["target"].flatten()
    nll = F.cross_entropy(flat, target, ignore_index=PAD, reduction="sum")
    loss = F.cross_entropy(
        flat, target, ignore_index=PAD, reduction="sum", label_smoothing=config["label_smoothing"]
    )
    assert_close(loss, arrays["loss_sum"], MODEL_LOSS, "loss_sum")
    assert_close(nll, arrays["nll_sum"], MODEL_LOSS, "nll_sum")
    loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters(remove_duplicate=False)}
    expected = from_fairseq(prefixed(arrays, "grad_"))
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        assert_close(gradients[name], gradient, MODEL_GRADIENT, f"grad_{name}")
    check_beam(config, arrays, model)


def check_beam(config: dict[str, Any], arrays: Arrays, model: Transformer) -> None:
    sentences, length = arrays["src_tokens"].shape
    limit = int(config["max_len_a"] * length + config["max_len_b"])
    with torch.no_grad():
        results = beam_search(
            model.step,
            model.start(arrays["src_tokens"]),
            torch.full((sentences,), EOS),
            beam_size=config["beam"],
            max_lengths=[limit] * sentences,
            eos_index=EOS,
            padding_index=PAD,
            length_penalty=power_penalty(config["len_penalty"]),
        )
    for sentence, hypotheses in enumerate(results):
        best = arrays["beam_tokens"][sentence, 0]
        assert hypotheses[0].tokens.tolist() == best[best != PAD].tolist()
        scores = torch.tensor([hypothesis.score for hypothesis in hypotheses])
        assert_close(scores, arrays["beam_scores"][sentence], BEAM_SCORE, "beam_scores")


KINDS: dict[str, Callable[[dict[str, Any], Arrays], None]] = {
    "norm": check_norm,
    "clip_topk_norm": check_clipped,
    "tiny_transformer": check_tiny_transformer,
}

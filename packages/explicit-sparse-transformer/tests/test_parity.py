"""Every file of a folder of goldens (``--goldens DIR``) against this implementation.

What a file pins down is read from its stored ``config`` and the names of its arrays. Tolerances
are those of goldens/README.md.
"""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.tokenizers.tokenizer_intl import TokenizerV14International
from separata_explicit_sparse_transformer.build import build_model
from separata_explicit_sparse_transformer.config import ModelConfig
from separata_explicit_sparse_transformer.model import ExplicitSparseTransformer
from separata_explicit_sparse_transformer.selection import (
    attention_with,
    entmax15_attention,
    official_joint_heads_softmax,
    official_ratio_attention,
    official_top_k,
    selection_before_masking_softmax,
    softmax_topk,
    softmax_topk_softmax,
    sparsemax_attention,
)
from separata_explicit_sparse_transformer.span import AdaptiveSpan, build_span_language_model
from separata_shared.attention import Attend, dense_attention, topk_attention
from separata_shared.data.vocabulary import BOS, EOS, PAD, UNK
from separata_shared.decoding import beam_search, power_penalty
from separata_shared.metrics import bleu
from separata_shared.nn import MultiHeadAttention, padding_mask, record_attention
from separata_shared.nn.cache import GrowingCache
from separata_shared.testing.parity import (
    Tolerance,
    assert_close,
    assert_same_support,
    load_golden,
    prefixed,
)
from separata_shared.translation import from_fairseq
from torch import Tensor

FORWARD = Tolerance("forward", 1e-5)
GRADIENT = Tolerance("gradient", 5e-5)
MODEL_LOSS = Tolerance("summed loss", 1e-3)
MODEL_GRADIENT = Tolerance("model gradient", 1e-4)
BEAM_SCORE = Tolerance("beam score", 1e-4)
Arrays = dict[str, Tensor]


def test_golden_is_reproduced(golden_path: Path) -> None:
    golden = load_golden(golden_path)
    if golden.arrays:
        kind = golden.config["case"]
        assert kind in KINDS, f"{golden_path.name}: unknown kind {kind!r}"
        KINDS[kind](golden.config, golden.arrays)
    else:
        keys = set(golden.config)
        kinds = [check for known, check in JSON_KINDS.items() if keys >= set(known)]
        assert len(kinds) == 1, f"{golden_path.name}: unknown kind with keys {sorted(keys)}"
        kinds[0](golden.config)


def same_weights(actual: Tensor, expected: Tensor, name: str) -> None:
    assert_close(actual, expected, FORWARD, name)
    assert_same_support(actual, expected, name)


# fairseq fork: multi-head attention.


def fairseq_attend(config: dict[str, Any], site: str) -> Attend:
    entmax = config["entmax"]
    if entmax in ("sparsemax", 1):
        return sparsemax_attention
    if entmax in ("entmax15", 2, "entmax_bisect", 3):  # bisection solves for alpha = 1.5, too
        return entmax15_attention
    assert not entmax, f"unknown entmax {entmax!r}"
    if site not in config["use_att"]:
        return dense_attention
    return partial(official_ratio_attention, div=config["div"], lower_bound=config["lb"])


def check_mha(config: dict[str, Any], arrays: Arrays) -> None:
    attend = fairseq_attend(config, config["attention"])
    module = MultiHeadAttention(
        config["embed_dim"], config["num_heads"], attend=attend, key_width=config["kdim"]
    )
    module.load_state_dict(prefixed(arrays, "param_"))
    query = arrays["query"].transpose(0, 1).requires_grad_()
    key = arrays["key"].transpose(0, 1).requires_grad_() if "key" in arrays else None
    padded = arrays.get("key_padding_mask")
    mask = None if padded is None else ~padded[:, None, None, :]
    with record_attention(module) as recorded:
        out = module(query, key, mask=mask, causal=config["causal"])
    (weights,) = recorded.values()
    assert_close(out.transpose(0, 1), arrays["out"], FORWARD, "out")
    same_weights(weights.transpose(0, 1), arrays["weights"], "weights")
    if config["effective_k"] is not None and config["entmax"] is None:
        top_k = official_top_k(config["div"], config["lb"], config["src_len"])
        assert top_k == config["effective_k"]

    (out * arrays["grad_out"].transpose(0, 1)).sum().backward()
    gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
    gradients["query"] = query.grad.transpose(0, 1)
    if key is not None:
        gradients["key"] = key.grad.transpose(0, 1)
    for name, expected in prefixed(arrays, "grad_").items():
        if name != "out":
            assert_close(gradients[name], expected, GRADIENT, f"grad_{name}")


def check_incremental(config: dict[str, Any], arrays: Arrays) -> None:
    length = config["length"]
    rule = partial(official_top_k, config["div"], config["lb"])
    assert config["k_teacher_forced"] == rule(length)
    assert config["k_per_step"] == [rule(seen) for seen in range(1, length + 1)]
    attend = partial(official_ratio_attention, div=config["div"], lower_bound=config["lb"])
    module = MultiHeadAttention(config["embed_dim"], config["num_heads"], attend=attend)
    module.load_state_dict(prefixed(arrays, "param_"))
    x = arrays["x"].transpose(0, 1)
    cache = GrowingCache()
    with torch.no_grad(), record_attention(module) as recorded:
        out = module(x, causal=True)
        assert_close(
            out.transpose(0, 1), arrays["out_teacher_forced"], FORWARD, "out_teacher_forced"
        )
        (weights,) = recorded.values()
        same_weights(weights.transpose(0, 1), arrays["weights_teacher_forced"], "teacher forced")
        for step in range(length):
            out = module(x[:, step : step + 1], causal=True, cache=cache)
            assert_close(out[:, 0], arrays["out_incremental"][step], FORWARD, f"step {step}")
            (weights,) = recorded.values()
            weights = F.pad(weights[:, :, 0], (0, length - step - 1)).transpose(0, 1)
            same_weights(weights, arrays["weights_incremental"][step], f"weights of step {step}")


# tensor2tensor fork: attention functions.


def check_tensor2tensor(config: dict[str, Any], arrays: Arrays) -> None:
    q, k, v = (arrays[name].clone().requires_grad_() for name in "qkv")
    bias = arrays.get("bias")
    # The query is scaled already. Widening the heads with zeros to a power of four makes undoing
    # our own scaling exact.
    width = 4 ** math.ceil(math.log(q.shape[-1], 4))
    widen = (0, width - q.shape[-1])
    attend, options = tensor2tensor_attend(config, bias)
    out, weights = attend(
        F.pad(q, widen) * math.sqrt(width), F.pad(k, widen), v, return_weights=True, **options
    )
    assert_close(out, arrays["out"], FORWARD, "out")
    same_weights(weights.detach(), arrays["weights"], "weights")
    visible = arrays["logits_after_mask"] > -1e8
    scores = (q @ k.mT).detach() + (0 if bias is None else bias)
    assert_close(
        scores[visible], arrays["logits_after_mask"][visible], FORWARD, "logits_after_mask"
    )
    (out * arrays["grad_out"]).sum().backward()
    for name, tensor in {"q": q, "k": k, "v": v}.items():
        assert_close(tensor.grad, arrays[f"grad_{name}"], GRADIENT, f"grad_{name}")


def tensor2tensor_attend(
    config: dict[str, Any], bias: Tensor | None
) -> tuple[Attend, dict[str, Any]]:
    """The attention function that a config names, and how it is given the official bias."""
    additive = {"bias": bias}
    top_k = official_top_k(config["d"], config["lb"], config["src_len"])
    if config["function"] == "entmax15":
        return entmax15_attention, additive
    if config["function"] == "sparsemax":
        return sparsemax_attention, additive
    selected, site = config["selected_type"], config["attention_type"]
    excluded = site == "decoder_self_attention" if selected == "two" else selected != site
    if top_k is None or (selected != "all" and excluded):
        return dense_attention, additive
    if config["function"] == "ensemble_sparse":
        return attention_with(partial(official_joint_heads_softmax, top_k=top_k)), additive
    assert config["function"] == "sparse", f"unknown function {config['function']!r}"
    if not config["before_softmax"]:
        rule = softmax_topk_softmax if config["softmax_again"] else softmax_topk
        return attention_with(partial(rule, top_k=top_k)), additive
    if config["before_padding"]:
        rule = selection_before_masking_softmax
        mask = None if bias is None else bias > -1e8
        return attention_with(partial(rule, top_k=top_k)), {"mask": mask}
    return partial(topk_attention, top_k=top_k), additive


# adaptive-span fork.


def check_span_mask(config: dict[str, Any], arrays: Arrays) -> None:
    span = AdaptiveSpan(
        config["max_span"],
        num_heads=config["heads"],
        ramp=config["ramp"],
        top_k=partial(official_top_k, config["div"], config["lb"]),
    )
    span.load_state_dict({"share": arrays["current_val"]})
    assert span.longest() == config["current_max_span"]
    assert span.average() == config["current_avg_span"]
    assert span.trimmed() == config["trim_len"]
    assert span.cache_length() == config["cache_size"]
    heads = (config["batch"], config["heads"])
    probs = arrays["probs"].clone().requires_grad_()
    out = span(probs.unflatten(0, heads))
    same_weights(out.detach().flatten(0, 1), arrays["out"], "out")
    (out * arrays["grad_out"].unflatten(0, heads)).sum().backward()
    assert_close(probs.grad, arrays["grad_probs"], GRADIENT, "grad_probs")
    assert_close(span.share.grad, arrays["grad_current_val"], GRADIENT, "grad_current_val")
    assert_close(config["loss_coeff"] * span.loss(), arrays["span_loss"], FORWARD, "span_loss")


SPAN_NAMES = {
    "key_pe": "key_positions",
    "in_emb.": "embedding.",
    "out_emb.": "output.",
    "attn.attn.adaptive_span._mask.current_val": "attention.span.share",
    "attn.proj_query": "attention.q_proj",
    "attn.proj_key": "attention.k_proj",
    "attn.proj_val": "attention.v_proj",
    "attn.proj_out": "attention.out_proj",
    "ff.": "feed_forward.",
    "norm1": "attention_residual.norm",
    "norm2": "feed_forward_residual.norm",
}


def from_span_names(arrays: Arrays) -> Arrays:
    renamed = {}
    for name, array in arrays.items():
        for official, ours in SPAN_NAMES.items():
            name = name.replace(official, ours)
        renamed[name] = array[0] if name == "key_positions" else array
    return renamed


def check_span_language_model(config: dict[str, Any], arrays: Arrays) -> None:
    model = build_span_language_model(
        config["vocab"],
        width=config["hidden"],
        hidden_width=config["ffn"],
        num_heads=config["heads"],
        num_layers=config["layers"],
        dropout=0.0,
        span=lambda: AdaptiveSpan(
            config["max_span"],
            num_heads=config["heads"],
            ramp=config["ramp"],
            top_k=partial(official_top_k, config["div"], config.get("lb", 0)),
        ),
    )
    model.load_state_dict(from_span_names(prefixed(arrays, "param_")))
    assert [span.cache_length() for span in model.spans] == config["cache_sizes"]
    numbers = range(config["layers"])
    logits, caches = model(arrays["x"], [arrays[f"cache{n}"] for n in numbers])
    assert_close(logits.log_softmax(dim=-1), arrays["log_probs"], FORWARD, "log_probs")
    for n in numbers:
        assert_close(caches[n], arrays[f"next_cache{n}"], FORWARD, f"next_cache{n}")
    loss = F.cross_entropy(logits.flatten(0, 1), arrays["y"].flatten())
    span_loss = config["loss_coeff"] * model.span_loss()
    assert_close(loss, arrays["loss"], FORWARD, "loss")
    assert_close(span_loss, arrays["span_loss"], FORWARD, "span_loss")
    (loss + span_loss).backward()
    gradients = dict(model.named_parameters())
    for name, expected in from_span_names(prefixed(arrays, "grad_")).items():
        assert_close(gradients[name].grad, expected, GRADIENT, f"grad_{name}")


# fairseq fork: whole model.

SITES = {"encoder_self": "es", "decoder_self": "ds", "cross": "dc"}


def tiny_transformer(config: dict[str, Any], arrays: Arrays) -> ExplicitSparseTransformer:
    untied = {"decoder.embed_out", "decoder.output_projection.weight"} & set(config["params"])
    sharing = "joint" if config["share_all_embeddings"] else "separate" if untied else "target"
    state = from_fairseq(prefixed(arrays, "param_"))
    model = build_model(
        ModelConfig(
            width=config["embed_dim"],
            num_heads=config["heads"],
            hidden_width=config["ffn"],
            encoder_layers=config["layers"],
            decoder_layers=config["layers"],
            dropout=0.0,
            normalisation="pre" if config["prenorm"] else "post",
            embeddings=sharing,
            source_vocabulary_size=len(state["source.tokens.weight"]),
            target_vocabulary_size=len(state["target.tokens.weight"]),
        ),
        attend=lambda site, layer: fairseq_attend(config, SITES[site]),
    )
    model.load_state_dict(state)
    assert model.source.tokens.scale == config["embed_scale"]
    assert (config["pad"], config["bos"], config["eos"], config["unk"]) == (PAD, BOS, EOS, UNK)
    return model.eval()


def check_tiny_transformer(config: dict[str, Any], arrays: Arrays) -> None:
    model = tiny_transformer(config, arrays)
    source, target_input = arrays["src_tokens"], arrays["prev_output_tokens"]
    with record_attention(model) as recorded:
        memory, mask = model.encode(source)
        # fairseq also masks padded target tokens. Nothing but the rows of padding depends on it,
        # so our model does not spend a mask on them.
        states = model.decoder(
            model.target(target_input),
            memory,
            memory_mask=mask,
            self_mask=padding_mask(target_input, PAD),
        )
    logits = model.output(states)
    assert_close(logits, arrays["logits"], FORWARD, "logits")
    real = target_input != PAD
    unmasked = model(source, target_input)
    assert_close(
        unmasked[real], arrays["logits"][real], FORWARD, "logits of the model's own forward"
    )
    assert_close(logits.log_softmax(dim=-1), arrays["log_probs"], FORWARD, "log_probs")
    cross = recorded[f"decoder.layers.{config['layers'] - 1}.cross_attention"]
    assert_close(
        cross.mean(dim=1), arrays["cross_attn_last_layer"], FORWARD, "cross_attn_last_layer"
    )

    flat, target = logits.flatten(0, 1), arrays["target"].flatten()
    cross_entropy = partial(F.cross_entropy, flat, target, ignore_index=PAD, reduction="sum")
    loss = cross_entropy(label_smoothing=config["label_smoothing"])
    assert_close(loss, arrays["loss_sum"], MODEL_LOSS, "loss_sum")
    assert_close(cross_entropy(), arrays["nll_sum"], MODEL_LOSS, "nll_sum")
    assert target.ne(PAD).sum() == arrays["ntokens"]
    loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters(remove_duplicate=False)}
    for name, expected in from_fairseq(prefixed(arrays, "grad_")).items():
        assert_close(gradients[name], expected, MODEL_GRADIENT, f"grad_{name}")
    check_beam(config, arrays, model)


def check_beam(config: dict[str, Any], arrays: Arrays, model: ExplicitSparseTransformer) -> None:
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
        expected = arrays["beam_tokens"][sentence]
        rows = [row[row != PAD] for row in expected]
        assert hypotheses[0].tokens.tolist() == rows[0].tolist()
        scores = torch.tensor([hypothesis.score for hypothesis in hypotheses])
        assert_close(scores, arrays["beam_scores"][sentence], BEAM_SCORE, "beam_scores")
        # Hypotheses of nearly equal score may change places; each has its own token scores.
        places = {tuple(row.tolist()): place for place, row in enumerate(rows)}
        for hypothesis in hypotheses:
            place = places.get(tuple(hypothesis.tokens.tolist()))
            if place is not None:
                steps = arrays["beam_positional_scores"][sentence, place, : len(rows[place])]
                assert_close(
                    hypothesis.positional_scores, steps, BEAM_SCORE, "beam_positional_scores"
                )


# BLEU.

BLEU_KEYS = {
    "fairseq_bleu_whitespace_tokens": ("fairseq", 1.0),
    "sacrebleu_check_tokenize_none_force": ("fairseq", 1.0),
    "fairseq_bleu_first3": ("fairseq", 1.0),
    "t2t_bleu_uncased": ("tensor2tensor", 0.01),
    "sacrebleu_check_intl_uncased": ("tensor2tensor", 1.0),
    "t2t_bleu_first3_uncased": ("tensor2tensor", 0.01),
}


def check_bleu(golden: dict[str, Any]) -> None:
    tokenise = TokenizerV14International()
    if "t2t_tokens_hyp" in golden:
        for line, tokens in zip(golden["hyp"], golden["t2t_tokens_hyp"], strict=True):
            assert tokenise(line).split() == tokens
    for key, (protocol, unit) in BLEU_KEYS.items():
        if key in golden:
            end = 3 if "first3" in key else None
            score = bleu(golden["hyp"][:end], golden["ref"][:end], protocol=protocol)
            assert score.value * unit == pytest.approx(golden[key], abs=1e-6), key
    if "fairseq_result_string" in golden:
        whole = bleu(golden["hyp"], golden["ref"], protocol="fairseq")
        assert golden["fairseq_result_string"].startswith(f"BLEU4 = {whole.value:.2f},")
    if "t2t_bleu_cased" in golden:
        cased = BLEU(tokenize="intl").corpus_score(golden["hyp"], [golden["ref"]])
        assert cased.score / 100 == pytest.approx(golden["t2t_bleu_cased"], abs=1e-6)


def test_bleu_without_long_matches_is_smoothed_as_in_tensor2tensor() -> None:
    # Matches of 1 to 4 words: 3/4, 1/3, none, none. The n-th empty count c is replaced by
    # 1 / (2^n c), so the product is 3/4 * 1/3 * 1/4 * 1/4 = 2^-6. bleu.json: t2t_bleu_no_4gram.
    assert bleu(["a b x d"], ["a b c d"], protocol="tensor2tensor").value == pytest.approx(
        100 * 2**-1.5
    )


KINDS: dict[str, Callable[[dict[str, Any], Arrays], None]] = {
    "mha": check_mha,
    "incremental": check_incremental,
    "t2t": check_tensor2tensor,
    "tiny_transformer": check_tiny_transformer,
    "adaptive_span_mask": check_span_mask,
    "adaptive_span_lm": check_span_language_model,
}
JSON_KINDS: dict[tuple[str, ...], Callable[[dict[str, Any]], None]] = {
    ("hyp", "ref", "t2t_bleu_uncased", "fairseq_bleu_whitespace_tokens"): check_bleu,
}

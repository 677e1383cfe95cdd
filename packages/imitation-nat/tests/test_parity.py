"""Numbers printed by public reference code; ``--goldens DIR`` compares with other such files."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from separata_imitation_nat.build import build_learner, build_mask_predictor, build_teacher
from separata_imitation_nat.cmlm import least_likely, masked_canvas, refine
from separata_imitation_nat.codebook import EMACodebook
from separata_imitation_nat.config import ModelConfig
from separata_imitation_nat.crf import LowRankCRF
from separata_imitation_nat.decode import (
    own_scores,
    parallel_decode,
    teacher_scorer,
    teacher_scores,
)
from separata_imitation_nat.length import (
    LengthHead,
    absolute_length,
    length_difference,
    length_loss,
    length_mask,
    length_window,
)
from separata_imitation_nat.losses import BalanceRegulariser, sharpened, student_t, word_loss
from separata_imitation_nat.model import Learner, MaskPredictor
from separata_imitation_nat.source_copy import (
    INTERPOLATION_WIDTH,
    SoftCopy,
    UniformCopy,
    interpolation,
    soft_absolute,
    soft_relative,
    uniform_index,
)
from separata_shared.data.vocabulary import BOS, EOS, PAD
from separata_shared.decoding import beam_search, greedy_search, power_penalty
from separata_shared.nn import Transformer
from separata_shared.testing.parity import Tolerance, assert_close, load_golden, prefixed
from separata_shared.translation import from_fairseq
from torch import Tensor, nn
from torch.nn import functional as F

Arrays = dict[str, Tensor]
Config = dict[str, Any]

EXACT = Tolerance("exact", 0.0)
COPY = Tolerance("copy", 1e-6)
LENGTH = Tolerance("length", 1e-5)
MODEL = Tolerance("model", 2e-5)
LOSS = Tolerance("loss", 1e-5)
CRF = Tolerance("crf", 1e-4)
CLUSTER = Tolerance("clustering", 1e-6)
CODEBOOK = Tolerance("codebook", 1e-5)

SPECIAL = "bos 0 pad 1 eos 2 unk 3"
NAMES = {"decoder.embed_length.weight": "length.projection.weight"}


def test_golden(golden_path: Path) -> None:
    golden = load_golden(golden_path)
    names = golden.arrays.keys() | golden.config.keys()
    checks = [check for needed, check in KINDS if needed <= names]
    assert len(checks) == 1, f"{golden_path.name}: {len(checks)} kinds fit"
    checks[0](golden.config, golden.arrays)


def test_a_file_of_no_known_kind_fails(tmp_path: Path) -> None:
    np.savez(tmp_path / "nat_forward.npz", config_json="{}", something=np.zeros(1))
    with pytest.raises(AssertionError, match="0 kinds"):
        test_golden(tmp_path / "nat_forward.npz")


def masks(arrays: Arrays, target_size: int | None = None) -> tuple[Tensor, Tensor]:
    """Masks of source and target from their lengths, which are checked where they are stored."""
    source_size = arrays["src"].size(1) if "src" in arrays else int(arrays["src_len"].max())
    target_size = int(arrays["tgt_len"].max()) if target_size is None else target_size
    found = (
        length_mask(arrays["src_len"], source_size),
        length_mask(arrays["tgt_len"], target_size),
    )
    for name, mask in zip(("src_mask", "tgt_mask"), found, strict=True):
        assert name not in arrays or torch.equal(arrays[name], mask)
    return found


# Copies of the source.


def check_uniform_copy(config: Config, arrays: Arrays) -> None:
    source, target = masks(arrays, arrays["index"].size(1))
    assert config["rounding"] == "half to even"
    real = target & (arrays["tgt_len"] > 1)[:, None]  # the reference divides by zero at T = 1
    index = uniform_index(source, target)
    assert_close(index[real], arrays["index_masked"][real], EXACT, "index_masked")
    copied = UniformCopy()(arrays["src"], source, target)
    assert_close(copied[real], arrays["copied"][real], EXACT, "copied")


def check_interpolation(config: Config, arrays: Arrays) -> None:
    weights = arrays["interpolate_weights"]
    source = length_mask(arrays["src_len"], weights.size(2))
    target = length_mask(arrays["tgt_len"], weights.size(1))
    formula = re.match(r"softmax_i\(-\(i - j\*S/T\)\^2 / ([\d.]+)\)", config["kernel"])
    assert formula is not None
    width = float(formula[1])
    assert width == INTERPOLATION_WIDTH
    found = interpolation(source, target, torch.tensor(width))
    assert_close(found[target], weights[target], COPY, "interpolate_weights")
    real = target & (arrays["tgt_len"] > 1)[:, None]
    index = uniform_index(source, target)
    assert_close(index[real], arrays["copy_index"][real], EXACT, "copy_index")


def check_soft_copy(config: Config, arrays: Arrays) -> None:
    source, target = masks(arrays, arrays["copied"].size(1))
    if "tau" in config:
        kind, scale = soft_absolute, config["tau"]
    else:
        kind, scale = soft_relative, config["temp"]
    if "weights" in arrays:
        weights = kind(source, target, torch.tensor(scale))
        assert_close(weights[target], arrays["weights"][target], COPY, "weights")
    copied = SoftCopy(kind, start=scale)(arrays["src"], source, target)
    assert_close(copied[target], arrays["copied"][target], COPY, "copied")


# Length.


def length_head(config: Config, weight: Tensor) -> LengthHead:
    first = absolute_length
    if config.get("pred_length_offset"):
        first = length_difference(-config.get("offset_zero", 128))
    head = LengthHead(weight.size(1), len(weight), first_length=first)
    head.projection.weight.data = weight
    return head


def framed(lengths: Tensor) -> Tensor:
    """Decoder inputs of the references: bos, masks, eos, padding."""
    tokens = masked_canvas(length_mask(lengths, int(lengths.max())))
    tokens[:, 0] = BOS
    return tokens


def check_length_head(config: Config, arrays: Arrays) -> None:
    assert config["special"] == SPECIAL
    head = length_head(config, arrays["w_length"])
    assert len(arrays["w_length"]) == config["classes"]
    real = ~arrays["src_padding_mask"]
    source_lengths = real.sum(dim=1)
    logits = head(arrays["enc_out_BSC"], real)
    assert_close(logits, arrays["logits"], LENGTH, "logits")
    assert_close(logits.log_softmax(dim=1), arrays["log_probs"], LENGTH, "log_probs")
    classes = head.classes(source_lengths, arrays["tgt_tokens"].ne(PAD).sum(dim=1))
    assert_close(classes, arrays["length_target_class"], EXACT, "length_target_class")
    least = config["min_len"]
    predicted = head.lengths(logits.argmax(dim=1), source_lengths).clamp(min=least)
    assert_close(predicted, arrays["predicted_length"], EXACT, "predicted_length")
    assert_close(framed(predicted), arrays["init_tokens"], EXACT, "init_tokens")
    beams = {name: tokens for name, tokens in arrays.items() if name.startswith("length_beam")}
    assert beams
    for name, tokens in beams.items():
        size = int(name.removeprefix("length_beam").removesuffix("_tokens"))
        lengths = length_window(predicted, size, least=least).flatten()
        assert_close(framed(lengths), tokens, EXACT, name)


# Models.


def model_config(config: Config, weights: Arrays, side: str) -> ModelConfig:
    """Sizes and wiring as the weights show them; what the configuration says must agree."""
    vocabulary, width = weights["encoder.embed_tokens.weight"].shape
    hidden = len(weights["encoder.layers.0.fc1.weight"])
    depths = {
        side: len({name.split(".")[2] for name in weights if name.startswith(f"{side}.layers.")})
        for side in ("encoder", "decoder")
    }
    positions = weights.get(f"{side}.embed_positions.weight")
    is_pre = f"{side}.layer_norm.weight" in weights
    stored = {
        "d_model": width,
        "ffn": hidden,
        "vocab": vocabulary,
        "layers": depths["encoder"],
        "embed_scale": "sqrt(d_model)",
        "layer_norm_eps": 1e-5,
        f"{side}_normalize_before": is_pre,
        f"{side}_learned_pos": positions is not None,
    }
    for name, value in stored.items():
        assert config.get(name, value) == value, name
    return ModelConfig(
        width=width,
        num_heads=config.get("heads", 4),
        hidden_width=hidden,
        encoder_layers=depths["encoder"],
        decoder_layers=depths["decoder"],
        dropout=0.0,
        activation=config.get("activation_fn", "relu"),
        normalisation="pre" if is_pre else "post",
        positions="sinusoidal" if positions is None else "learned",
        max_length=256 if positions is None else len(positions) - PAD - 1,
        source_vocabulary_size=vocabulary,
        target_vocabulary_size=vocabulary,
        num_actions=0,
        copy="uniform",
        copy_from="embeddings",
    )


ModelT = TypeVar("ModelT", Transformer, Learner, MaskPredictor)


def load(build: Callable[[ModelConfig], ModelT], config: Config, weights: Arrays) -> ModelT:
    """A model with the weights of a reference; the sides may be wired in different ways."""
    model = build(model_config(config, weights, "decoder"))
    other = build(model_config(config, weights, "encoder"))
    model.encoder, model.source.positions = other.encoder, other.source.positions
    state = {NAMES.get(name, name): array for name, array in from_fairseq(weights).items()}
    model.load_state_dict(state)
    if not isinstance(model, Transformer):
        weight = model.length.projection.weight.detach()
        model.length.first_length = length_head(config, weight).first_length
    return model.eval()


class Placeholders(nn.Module):
    """What a reference without ``src_embedding_copy`` reads: embedded bos, masks and eos."""

    def __init__(self, tokens: nn.Module) -> None:
        super().__init__()
        self.tokens = tokens

    def forward(self, states: Tensor, source_mask: Tensor, target_mask: Tensor) -> Tensor:
        embedded: Tensor = self.tokens(framed(target_mask.sum(dim=1)))
        return F.pad(embedded, (0, 0, 0, target_mask.size(1) - embedded.size(1)))


def nat(config: Config, arrays: Arrays) -> Learner:
    model = load(build_learner, config, prefixed(arrays, "w."))
    if not config.get("src_embedding_copy"):
        model.copy = Placeholders(model.target.tokens)
    return model


def check_nat_forward(config: Config, arrays: Arrays) -> None:
    model = nat(config, arrays)
    source, target = arrays["src_tokens"], arrays["tgt_tokens"]
    encoding = model.encode(source)
    real, words = source.ne(PAD), arrays["word_mask"]
    assert_close(encoding.mask, real, EXACT, "source mask")
    assert_close(real.sum(dim=1), arrays["src_len"], EXACT, "src_len")
    memory, embedded = arrays["encoder_out_BSC"], arrays["encoder_embedding"]
    assert_close(encoding.memory[real], memory[real], MODEL, "encoder_out_BSC")
    assert_close(model.source.tokens(source)[real], embedded[real], MODEL, "encoder_embedding")
    length_logits = model.predict_length(encoding)
    assert_close(length_logits, arrays["length_logits"], MODEL, "length_logits")
    place = target.ne(PAD)
    assert_close(framed(place.sum(dim=1)), arrays["decoder_input_tokens"], EXACT, "decoder input")
    logits = model.decode(encoding, place)
    assert_close(logits[place], arrays["word_logits"][place], MODEL, "word_logits")

    assert_close(words & place, words, EXACT, "word_mask")
    classes = model.length.classes(arrays["src_len"], place.sum(dim=1))
    assert_close(classes, arrays["length_target"], EXACT, "length_target")
    loss, nll = word_loss(logits, target.masked_fill(~words, PAD), config["label_smoothing"])
    length_nll = length_loss(length_logits, classes)
    assert_close(nll, arrays["word_nll"], LOSS, "word_nll")
    assert_close(loss, arrays["word_loss"], LOSS, "word_loss")
    assert_close(length_nll, arrays["length_nll"], LOSS, "length_nll")
    total = loss + config["length_loss_factor"] * length_nll
    assert_close(total, arrays["total_loss"], LOSS, "total_loss")


def check_teacher(config: Config, arrays: Arrays) -> None:
    model = load(build_teacher, config, prefixed(arrays, "w."))
    source, target = arrays["src_tokens"], arrays["target_tokens"]
    assert config["start_token"] == f"eos({EOS})"
    real = target.ne(PAD)
    with torch.no_grad():
        logits = model(source, arrays["prev_tokens"])
        averages = teacher_scores(model, source, target)
    assert_close(logits[real], arrays["logits"][real], MODEL, "logits")
    log_probs = logits.log_softmax(dim=-1).gather(-1, target[..., None]).squeeze(-1)
    assert_close(log_probs[real], arrays["target_log_prob"][real], MODEL, "target_log_prob")
    assert_close(averages, arrays["target_avg_log_prob"], MODEL, "target_avg_log_prob")

    first = source.new_full((len(source),), EOS)
    limits = {
        "max_lengths": [config["max_len"]] * len(source),
        "eos_index": EOS,
        "padding_index": PAD,
    }
    results = beam_search(
        model.step,
        model.start(source),
        first,
        beam_size=config["beam"],
        length_penalty=power_penalty(config["lenpen"]),
        **limits,
    )
    for sentence, hypotheses in enumerate(results):
        rows = [row[row != PAD] for row in arrays["beam_tokens"][sentence]]
        assert [h.tokens.tolist() for h in hypotheses] == [row.tolist() for row in rows]
        for place, hypothesis in enumerate(hypotheses):
            score = torch.tensor(hypothesis.score)
            assert_close(score, arrays["beam_scores"][sentence, place], MODEL, "beam_scores")
            steps = arrays["beam_token_log_prob"][sentence, place, : len(rows[place])]
            assert_close(hypothesis.positional_scores, steps, MODEL, "beam_token_log_prob")
    with torch.no_grad():
        greedy = greedy_search(model.step, model.start(source), first, **limits)
    padded = torch.nn.utils.rnn.pad_sequence(greedy, batch_first=True, padding_value=PAD)
    width = arrays["greedy_tokens"].size(1) - padded.size(1)
    assert_close(F.pad(padded, (0, width), value=PAD), arrays["greedy_tokens"], EXACT, "greedy")
    scores = teacher_scores(model, source, padded)
    assert_close(scores, arrays["greedy_mean_log_prob"], MODEL, "greedy_mean_log_prob")


def any_token(logits: Tensor, last: Tensor) -> Tensor:
    """The references take the arg-max over all tokens, special ones too."""
    return logits.argmax(dim=-1)


def beam_lengths(size: int, logits: Tensor, head: LengthHead, *lengths: Tensor) -> Tensor:
    predicted = head.lengths(logits.argmax(dim=1), lengths[0]).clamp(min=2)
    return length_window(predicted, size, least=2)


def without_start(scorer: Any, candidates: Any) -> Tensor:
    """The references score what comes after the first token, which eos replaces."""
    return scorer(candidates._replace(tokens=candidates.tokens[:, 1:]))


def check_nat_decode(config: Config, arrays: Arrays) -> None:
    model = nat(config, arrays)
    heads = {"heads": config["heads"]} if "heads" in config else {}
    rescorer = load(build_teacher, heads, prefixed(arrays, "teacher.w."))
    source = arrays["src_tokens"]
    for size in config["beams"]:
        translate = partial(
            parallel_decode,
            model,
            source,
            lengths=partial(beam_lengths, size),
            words=any_token,
        )
        found = translate(scorer=own_scores)
        assert_close(
            found.candidate_lengths[:, size // 2],
            arrays["predicted_length"],
            EXACT,
            "predicted_length",
        )
        same_tokens(found.tokens, arrays[f"beam{size}_tokens"], f"beam{size}_tokens")
        assert found.scores is not None
        assert_close(found.scores, arrays[f"beam{size}_score"], MODEL, f"beam{size}_score")
        name = f"beam{size}_rerank"
        if f"{name}_tokens" not in arrays:
            continue
        found = translate(scorer=partial(without_start, teacher_scorer(rescorer)))
        same_tokens(found.tokens, arrays[f"{name}_tokens"], f"{name}_tokens")
        assert found.scores is not None
        assert found.candidate_scores is not None
        assert_close(found.scores, arrays[f"{name}_score"], MODEL, f"{name}_score")
        every = arrays[f"{name}_all_scores"]
        once = found.candidate_scores > -torch.inf  # equal lengths are scored once here
        assert_close(found.candidate_scores[once], every[once], MODEL, f"{name}_all_scores")
        candidates = found.candidates.flatten(0, 1).clone()
        candidates[:, 0] = EOS
        same_tokens(candidates, arrays[f"beam{size}_candidates_eos_first"], "candidates_eos_first")


def same_tokens(found: Tensor, expected: Tensor, name: str) -> None:
    """Equal tokens, whatever the padding on the right."""
    size = max(found.size(1), expected.size(1))
    rows = [F.pad(rows, (0, size - rows.size(1)), value=PAD) for rows in (found, expected)]
    assert_close(*rows, EXACT, name)


# Mask-predict.


def check_skeptical(config: Config, arrays: Arrays) -> None:
    mask = arrays["mask"]
    shares = {name: array for name, array in arrays.items() if name.startswith("remask_p")}
    assert shares
    for name, expected in shares.items():
        digits = name.removeprefix("remask_p")
        share = float(f"{digits[0]}.{digits[1:] or '0'}")
        found = least_likely(arrays["scores"], mask.sum(dim=1) - 2, share)
        assert_close(found, expected, EXACT, name)


def check_mask_predict(config: Config, arrays: Arrays) -> None:
    assert config["adaptive"] is False  # sentences that stop early are another algorithm
    model = load(build_mask_predictor, config, prefixed(arrays, "w."))
    with torch.no_grad():
        encoding = model.encode(arrays["src_tokens"])
        lengths = beam_lengths(
            1, model.predict_length(encoding), model.length, arrays["src_len"]
        ).flatten()
        found = refine(
            partial(model.decode, encoding),
            framed(lengths),
            iterations=config["iterations"],
            words=lambda logits: logits.log_softmax(dim=-1).max(dim=-1),
        )
    same_tokens(found.tokens, arrays["tokens"], "tokens")
    assert_close(found.history, arrays["history"], EXACT, "history")
    assert_close(found.log_probs.sum(dim=1) / lengths, arrays["score"], MODEL, "score")


# CRF, clustering, codebook.


def check_crf(config: Config, arrays: Arrays) -> None:
    crf = LowRankCRF(config["vocab"], rank=config["low_rank"], beam=config["beam"])
    crf.load_state_dict({name: arrays[name] for name in ("E1", "E2")})
    emissions, mask = arrays["emissions"], arrays["mask"]
    likelihood = crf(emissions, arrays["targets"], mask)
    assert_close(likelihood, arrays["log_likelihood"], CRF, "log_likelihood")
    path = crf.viterbi(emissions, mask)
    assert_close(path.tokens[mask], arrays["viterbi_tokens"][mask], EXACT, "viterbi_tokens")
    # The reference looks up the score of the prefix up to t at the place that the word at t + 1
    # has among the kept ones. Only the sum over the sentence is that of the path.
    next_places = torch.cat((path.places[:, 1:], path.places[:, -1:]), dim=1)
    reached = path.prefixes.gather(2, next_places[:, :, None]).squeeze(2)
    scores = torch.cat((reached[:, :1], reached.diff(dim=1)), dim=1)
    assert_close(scores[mask], arrays["viterbi_scores"][mask], CRF, "viterbi_scores")
    total = (arrays["viterbi_scores"] * mask).sum(dim=1)
    assert_close(path.scores.sum(dim=1), total, CRF, "score of the path")


def check_clustering(config: Config, arrays: Arrays) -> None:
    q = arrays["q"]
    assert_close(arrays["logits"].softmax(dim=-1), q, CLUSTER, "q")
    p = sharpened(q.log(), q.sum(dim=0)).exp()
    assert_close(p, arrays["p_batch_frequency"], CLUSTER, "p_batch_frequency")
    divergence = F.kl_div(q.log(), p, reduction="batchmean")
    assert_close(divergence, arrays["kl_batch_mean"], CLUSTER, "kl_batch_mean")

    assert config["c0"] == "1/K"
    balance = BalanceRegulariser(1, q.size(1), decay=config["alpha"])
    chunks = q.chunk(config["steps"])
    targets = arrays["ema_p"].chunk(config["steps"])
    for step, (chunk, target) in enumerate(zip(chunks, targets, strict=True)):
        log_pi = chunk.log()[None, None]  # one layer, one sentence
        loss = balance(log_pi, torch.ones(1, len(chunk), dtype=torch.bool))
        assert_close(balance.c[0], arrays["ema_c"][step], CLUSTER, "ema_c")
        assert_close(sharpened(chunk.log(), balance.c[0]).exp(), target, CLUSTER, "ema_p")
        assert_close(loss, arrays["ema_kl"][step], CLUSTER, "ema_kl")
    assigned = student_t(arrays["student_t_z"], arrays["student_t_centers"]).exp()
    assert_close(assigned, arrays["student_t_q"], CLUSTER, "student_t_q")


def check_codebook(config: Config, arrays: Arrays) -> None:
    assert config["dead_code_threshold"] == 0  # no entry is ever replaced
    codebook = EMACodebook(
        config["codebook_size"],
        config["dim"],
        decay=config["decay"],
        commitment=config["commitment_weight"],
        eps=config["eps"],
    )
    start, counts = arrays["codebook_init"], arrays["cluster_size_init"]
    codebook.load_state_dict({"A": start, "count": counts, "total": start})
    for step, x in enumerate(arrays["x"]):
        z = x.clone().requires_grad_()
        quantized, indices, commitment = codebook(z)
        (0.5 * quantized.sum() + commitment.mean()).backward()
        assert z.grad is not None
        found = {
            "quantized": quantized,
            "commit_loss": commitment.mean(),
            "codebook_after": codebook.A,
            "cluster_size_after": codebook.count,
            "embed_avg_after": codebook.total,
            "grad_x": z.grad,
        }
        assert_close(indices, arrays["indices"][step], EXACT, "indices")
        for name, array in found.items():
            assert_close(array, arrays[name][step], CODEBOOK, f"{name} of step {step}")
    quantized, indices, _ = codebook.eval()(arrays["eval_x"])
    assert_close(quantized, arrays["eval_quantized"], CODEBOOK, "eval_quantized")
    assert_close(indices, arrays["eval_indices"], EXACT, "eval_indices")


KINDS: list[tuple[set[str], Callable[[Config, Arrays], None]]] = [
    ({"src", "copied", "rounding", "index_masked"}, check_uniform_copy),
    ({"copy_index", "interpolate_weights"}, check_interpolation),
    ({"src", "copied", "temp"}, check_soft_copy),
    ({"src", "copied", "tau"}, check_soft_copy),
    ({"w_length", "init_tokens"}, check_length_head),
    ({"word_logits", "encoder_out_BSC"}, check_nat_forward),
    ({"prev_tokens", "beam_scores"}, check_teacher),
    ({"predicted_length", "beam1_tokens"}, check_nat_decode),
    ({"scores", "mask"}, check_skeptical),
    ({"history", "score"}, check_mask_predict),
    ({"emissions", "E1", "E2"}, check_crf),
    ({"q", "ema_c", "student_t_q"}, check_clustering),
    ({"x", "codebook_init"}, check_codebook),
]

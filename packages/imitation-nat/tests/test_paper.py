"""Numbers of the paper and of the work it follows, each with its mark.

C: confirmed by the abstract, a later paper's table or public code. U: remembered of the body, not
checked against a copy. I: inferred here, where the paper is silent.
"""

import torch
from separata_imitation_nat.build import build_demonstrator, build_learner, build_teacher
from separata_imitation_nat.config import ModelConfig, ParallelDecodeConfig
from separata_imitation_nat.losses import BalanceRegulariser
from separata_imitation_nat.source_copy import SoftCopy
from torch import nn


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


SMALL = ModelConfig(  # IWSLT16 En-De; C: settings of the followed work, U: for this paper
    width=278,
    hidden_width=507,
    encoder_layers=5,
    decoder_layers=5,
    num_heads=2,
    embeddings="joint",
    source_vocabulary_size=100,
    target_vocabulary_size=100,
)
BASE = ModelConfig(  # WMT14; C
    width=512,
    hidden_width=512,
    encoder_layers=6,
    decoder_layers=6,
    num_heads=8,
    source_vocabulary_size=100,
    target_vocabulary_size=100,
)


def attention(d: int) -> int:
    return 4 * (d * d + d)


def feed_forward(d: int, hidden: int) -> int:
    return 2 * d * hidden + hidden + d


def norm(d: int) -> int:
    return 2 * d


def transformer(config: ModelConfig) -> int:
    """Parameters by the Transformer's definition, with one table of words."""
    d, hidden = config.width, config.hidden_width
    encoder = attention(d) + feed_forward(d, hidden) + 2 * norm(d)
    decoder = 2 * attention(d) + feed_forward(d, hidden) + 3 * norm(d)
    table = config.source_vocabulary_size * d
    return config.encoder_layers * encoder + config.decoder_layers * decoder + table


def test_the_small_setting_has_two_heads_of_139_and_the_transformers_size() -> None:
    # Specification, section 2: widths 278 / 507, two heads of 139.
    teacher = build_teacher(SMALL)
    head = teacher.encoder.layers[0].self_attention.head_width
    assert head == 139
    assert parameters(teacher) == transformer(SMALL)


def test_the_action_modules_of_a_layer_are_ffn_codebook_and_norm() -> None:
    # I: FFN_a is d -> d -> K, U: one codebook of K vectors per layer, K = 512.
    for config in (SMALL, BASE):
        d, num_actions = config.width, config.num_actions
        assert num_actions == 512  # U: best of a sweep 32 ... 1024
        action = (d * d + d) + (d * num_actions + num_actions) + num_actions * d + norm(d)
        demonstrator = build_demonstrator(config)
        assert parameters(demonstrator) - transformer(config) == config.decoder_layers * action


def test_the_learner_adds_one_tau_and_the_length_classes() -> None:
    # U: tau is one scalar, I: it starts at 1; I: 256 classes from -128 to 127.
    learner = build_learner(BASE)
    assert isinstance(learner.copy, SoftCopy)
    assert learner.copy.log_scale.exp().item() == 1.0
    added = parameters(learner) - parameters(build_demonstrator(BASE))
    assert added == 1 + 256 * BASE.width


def test_the_balance_starts_even_and_keeps_nine_tenths() -> None:
    # U: alpha = 0.9.
    assert ModelConfig().balance_decay == 0.9
    balance = BalanceRegulariser(1, 4)
    log_pi = torch.tensor([0.7, 0.1, 0.1, 0.1]).log()[None, None, None]
    balance(log_pi, torch.ones(1, 1, dtype=bool))
    # 0.9 * 0.25 + 0.1 * 0.7 = 0.295 and 0.9 * 0.25 + 0.1 * 0.1 = 0.235.
    torch.testing.assert_close(balance.c[0], torch.tensor([0.295, 0.235, 0.235, 0.235]))


def test_seven_lengths_are_decoded() -> None:
    # U: dT = 3; C: lengths are decoded in parallel and rescored.
    assert ParallelDecodeConfig().candidates == 7
    assert ParallelDecodeConfig().scorer == "teacher"


def test_the_wmt_setting_has_the_transformers_size() -> None:
    # C: 512 / 512, 6 layers, 8 heads. 6 (1,577,984 + 2,629,632) weights of layers, by hand, and
    # 100 words of 512.
    assert parameters(build_teacher(BASE)) == transformer(BASE) == 25_245_696 + 51_200

"""The Transformer of the paper's translation experiments: any norm in every place of one.

A pre-norm encoder-decoder of 6+6 layers has 32 norms: two in each encoder layer, three in each
decoder layer, one after each stack. One function makes them all (``scope = all``), as in the paper.
In the authors' code the option reaches only the last norm of each stack, so that 30 of 32 stay
LayerNorm; ``scope = final_only`` repeats that.
"""

import math

from separata_shared.nn import MultiHeadAttention, Transformer
from separata_shared.translation import build_transformer
from torch import nn

from .build import norm_factory
from .config import ModelConfig


def build_model(config: ModelConfig) -> Transformer:
    """Compose the model that ``config`` describes, with fresh parameters.

    Args:
        config: Sizes, wiring and norms; the vocabulary sizes must be set.

    Returns:
        The model, in training mode.

    Raises:
        ValueError: A vocabulary size is missing, or tables of different sizes shall be shared.
    """
    norm = norm_factory(config.norm, C=config.C)
    inner = {"all": norm, "final_only": nn.LayerNorm}[config.scope]
    model = build_transformer(config, Transformer, norm=inner, final_norm=norm)
    if config.initialisation == "km":
        draw_kaiming_attention(model)
    return model


def draw_kaiming_attention(model: nn.Module) -> None:
    """Draw the weights of all attentions anew, uniform within 1 / sqrt(M).

    The authors' initialisation ``km``. Feed-forward layers stay as they are: in the authors' code
    the option does not reach them either.
    """
    for module in model.modules():
        if isinstance(module, MultiHeadAttention):
            for projection in (module.q_proj, module.k_proj, module.v_proj, module.out_proj):
                nn.init.kaiming_uniform_(projection.weight, a=math.sqrt(5))

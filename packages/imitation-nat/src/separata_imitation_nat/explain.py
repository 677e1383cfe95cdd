"""What the actions mean: the verb ``explain``.

The demonstrator reads a reference and shows, at every position of every layer, the distribution of
its actions; the learner, given the length of the reference, shows its own. Both are compared where
they predict the same word.

Shapes: ``L`` layers with actions, ``N`` positions, ``K`` actions, ``M`` width, ``V`` vocabulary.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from separata_shared.data.vocabulary import PAD, UNK, Vocabulary
from separata_shared.files import write_json
from separata_shared.nn import TokenEmbedding
from separata_shared.translation import Split, TrainedModel
from separata_shared.translation.data import Sequences
from torch import Tensor, nn
from torch.nn import functional as F

from .actions import ActionTrace
from .config import ModelConfig
from .data import load
from .generate import check_actions, check_vocabularies, load_demonstrator, load_learner
from .model import Demonstrator, Learner
from .plot import draw_actions
from .quality import ActionUse

BATCH_TOKENS = 2000


class Actions(NamedTuple):
    """Distributions and words of both models at all target positions of some sentences."""

    demonstrator: Tensor
    """``(L, N, K)``."""
    learner: Tensor
    """``(L, N, K)``."""
    target: Tensor
    """The reference ``(N,)``, which the demonstrator has read up to there."""
    predicted: Tensor
    """Words of the learner ``(N,)``."""
    sentence: Tensor
    """Which sentence a position is of ``(N,)``."""


def explain(
    *,
    run: Path = Path("runs/tiny/learner"),
    demonstrator: Path = Path("runs/tiny/demonstrator"),
    split: Literal["valid", "test"] = "valid",
    sentence: int = 1,
    limit: int = 1000,
    nearest: int = 5,
    output: Path | None = None,
) -> dict[str, Any]:
    """Show which actions positions take, how far the two models agree, and what actions stand for.

    Prints a table of one sentence with the most likely action of every layer in the demonstrator
    and in the learner; writes it, the agreement and use of the actions over the split, and the
    nearest tokens of each layer's most used actions.

    Args:
        run: Run directory of a learner.
        demonstrator: Run directory of the demonstrator that it imitates.
        split: Part of the corpus.
        sentence: Which sentence to show, from 1.
        limit: Sentences of the split that agreement and use are taken over.
        nearest: Tokens shown for an action, and actions shown of a layer.
        output: JSON file; default: ``actions.json`` in the run directory. The picture stands
            beside it as PNG.

    Returns:
        What was written to the file.

    Raises:
        ValueError: A run cannot be read, has no actions, or the two do not fit; or there is no such
            sentence.
    """
    for name, value in (("sentence", sentence), ("limit", limit), ("nearest", nearest)):
        if value < 1:
            raise ValueError(f"{name}: must be at least 1, got {value}")
    if output is not None and output.suffix == ".png":
        raise ValueError(f"output: {output} is where the picture goes; give the JSON file's name")
    own, expert = load_learner(run), load_demonstrator(demonstrator)
    if not own.model.layers_with_actions:
        raise ValueError(f"{run}: this learner has no actions (model.num_actions is 0)")
    check_vocabularies(expert, own)
    check_actions(expert, own.model)
    corpus = load(own.data)
    check_vocabularies(own, corpus)
    part: Split = getattr(corpus, split)
    count = min(limit, len(part))
    if sentence > count:
        raise ValueError(f"sentence: {sentence} asked for, {split} and limit leave {count}")
    actions = collect(own.network, expert.network, part, count)
    vocabulary = own.target_vocabulary
    report = {
        "split": split,
        "sentences": count,
        "layers": [
            {"layer": number, **found}
            for number, found in zip(own.model.layers_with_actions, layers(actions), strict=True)
        ],
        "nearest": meanings(own, actions.learner, nearest),
        "sentence": positions(actions, sentence - 1, vocabulary),
    }
    path = output or run / "actions.json"
    write_json(path, report)
    draw_actions(report, path.with_suffix(".png"))
    print("\n".join(as_text(report)))
    print(path)
    return report


@torch.inference_mode()
def collect(learner: nn.Module, demonstrator: nn.Module, part: Split, count: int) -> Actions:
    """Run both models over the first ``count`` sentences of a split."""
    assert isinstance(learner, Learner)
    assert isinstance(demonstrator, Demonstrator)
    device = next(learner.parameters()).device
    first = Split(
        Sequences.of(part.source[number] for number in range(count)),
        Sequences.of(part.target[number] for number in range(count)),
    )
    found = []
    for batch in first.in_order(max(BATCH_TOKENS, int(first.lengths.max()))):
        here = batch.to(device)
        real = here.target.ne(PAD)
        expert = demonstrator.actions(here.source, here.decoder_input)
        trace = ActionTrace()
        logits = learner.decode(learner.encode(here.source), real, trace)
        numbers = here.indices[:, None].expand_as(real)
        words = logits.argmax(dim=-1)
        chosen = (x[:, real].exp().float().cpu() for x in (expert, trace.log_pi))
        found.append(Actions(*chosen, *(x[real].cpu() for x in (here.target, words, numbers))))
    experts, learners, *rest = zip(*found, strict=True)
    return Actions(torch.cat(experts, dim=1), torch.cat(learners, dim=1), *map(torch.cat, rest))


def layers(actions: Actions) -> list[dict[str, Any]]:
    """Agreement of the two models and use of the actions, for each layer.

    ``same_action`` is the share of positions with the same most likely action, ``overlap`` the mean
    of ``sum_k min(pi_AT,k, pi_NAT,k)``, which is 1 for equal distributions.
    """
    same = actions.demonstrator.argmax(dim=-1) == actions.learner.argmax(dim=-1)
    overlap = torch.minimum(actions.demonstrator, actions.learner).sum(dim=-1)
    everywhere = torch.ones(1, actions.target.numel(), dtype=torch.bool)
    uses = []
    for pi in (actions.demonstrator, actions.learner):
        use = ActionUse()
        use.add(pi.unsqueeze(1), everywhere)
        uses.append(use.result())
    return [
        {
            "same_action": same[number].float().mean().item(),
            "overlap": overlap[number].mean().item(),
            "demonstrator": uses[0][number],
            "learner": uses[1][number],
        }
        for number in range(len(same))
    ]


def positions(actions: Actions, sentence: int, vocabulary: Vocabulary) -> list[dict[str, Any]]:
    """What happens at each position of one sentence, in every layer."""
    rows = []
    for place in (actions.sentence == sentence).nonzero().flatten().tolist():
        row: dict[str, Any] = {
            "reference": vocabulary.pieces[int(actions.target[place])],
            "learner_word": vocabulary.pieces[int(actions.predicted[place])],
        }
        for name in ("demonstrator", "learner"):
            shares, best = getattr(actions, name)[:, place].max(dim=-1)
            row[name] = {"action": best.tolist(), "share": [round(x, 4) for x in shares.tolist()]}
        rows.append(row)
    return rows


def meanings(trained: TrainedModel[ModelConfig], pi: Tensor, nearest: int) -> list[dict[str, Any]]:
    """The most used actions of each layer, with the tokens whose vectors point their way most.

    An action vector is added to the decoder's states, and a state is compared with the vectors of
    the output tokens; so the tokens are those of the largest cosine with it.

    Args:
        trained: The learner.
        pi: Its distributions ``(L, N, K)``.
        nearest: Actions of a layer, and tokens of an action.
    """
    table = F.normalize(output_table(trained.network).float().cpu(), dim=-1)[UNK + 1 :]
    found = []
    for number, shares in zip(trained.model.layers_with_actions, pi.mean(dim=1), strict=True):
        vectors = codebook(trained.network, number).float().cpu()
        used = shares.topk(min(nearest, len(shares)))
        for share, action in zip(used.values.tolist(), used.indices.tolist(), strict=True):
            cosines = table @ F.normalize(vectors[action], dim=0)
            best = cosines.topk(min(nearest, len(cosines)))
            tokens = [trained.target_vocabulary.pieces[n + UNK + 1] for n in best.indices.tolist()]
            found.append(
                {
                    "layer": number,
                    "action": action,
                    "share": round(share, 6),
                    "tokens": tokens,
                    "cosines": [round(value, 4) for value in best.values.tolist()],
                }
            )
    return found


def codebook(network: Any, layer: int) -> Tensor:
    """Action vectors ``(K, M)`` of a decoder layer."""
    vectors: Tensor = network.decoder.layers[layer].action.codebook.A
    return vectors.detach()


def output_table(network: Any) -> Tensor:
    """Vectors ``(V, M)`` of the output tokens."""
    if isinstance(network.output, nn.Linear):
        return network.output.weight.detach()
    table = network.output.__self__
    assert isinstance(table, TokenEmbedding)
    return table.weight.detach()


def as_text(report: dict[str, Any]) -> list[str]:
    """The report for a reader, a line each."""
    numbers = [found["layer"] for found in report["layers"]]
    head = "".join(f"{f'layer {number}':>14}" for number in numbers)
    lines = [f"{'reference':<18}{'learner':<18}{head}   (demonstrator / learner)"]
    for row in report["sentence"]:
        pairs = zip(row["demonstrator"]["action"], row["learner"]["action"], strict=True)
        cells = "".join(f"{f'{expert} / {own}':>14}" for expert, own in pairs)
        lines.append(f"{row['reference']:<18}{row['learner_word']:<18}{cells}")
    lines.append("")
    for found in report["layers"]:
        use = found["learner"]
        lines.append(
            f"layer {found['layer']}: same action at {100 * found['same_action']:.1f} % of the "
            f"positions, overlap {found['overlap']:.3f}; the learner uses {use['used']} of "
            f"{use['actions']} actions, perplexity {use['perplexity']:.1f} (demonstrator "
            f"{found['demonstrator']['used']}, {found['demonstrator']['perplexity']:.1f})"
        )
    return [*lines, "", *map(_meaning, report["nearest"])]


def _meaning(found: dict[str, Any]) -> str:
    tokens: Sequence[str] = found["tokens"]
    return (
        f"layer {found['layer']}, action {found['action']} ({100 * found['share']:.1f} %): "
        f"near {' '.join(tokens)}"
    )

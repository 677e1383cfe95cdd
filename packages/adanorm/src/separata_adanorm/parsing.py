"""Training, scoring and use of the parser: ``train-parser``, ``evaluate-parser``, ``parse``.

The weights with the highest unlabelled attachment score on the validation part are the ones that
are scored and used.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from separata_shared.files import read_text, write_json, write_text
from separata_shared.metrics import Score
from separata_shared.training import Run, TrainConfig, TrainResult, fit
from separata_shared.translation.search import standard_input
from torch import nn

from . import treebank
from .build import NormKind, check_norm, norm_factory
from .classify import accuracy, batches_in_order, classification_step, shuffled_batches
from .parser import (
    TransitionClassifier,
    attachment,
    derive,
    parse_encoded,
    parse_sentences,
)
from .runs import load_best, run_config, write_scores
from .transitions import Ints, num_transitions
from .treebank import Lexicon, Sentence, Treebank

_PARTS = (("train",), ("dev", "valid"), ("test",))
_LEXICON = "lexicon.json"


@dataclass(frozen=True, kw_only=True)
class ParserConfig:
    """Which treebank, and the classifier of transitions."""

    dataset: Literal["tiny", "conllu", "ptb_sample"] = "tiny"
    """``tiny`` is made; ``conllu`` is a directory with one file for each part, such as a treebank
    of Universal Dependencies; ``ptb_sample`` is NLTK's sample of the Penn Treebank in one file."""

    raw: str = "data/treebank"
    """Directory of the files, or the file of ``ptb_sample``; compressed or not."""

    tags: Literal["upos", "xpos"] = "upos"
    """Column of the part-of-speech tags in CoNLL-U."""

    unscored_tags: list[str] = field(default_factory=list)
    """Tags of words that evaluation leaves out, punctuation for example."""

    min_count: int = 2
    """Words that training has less often are unknown ones."""

    tiny_sentences: int = 600
    """Training sentences of the data set tiny."""

    batch_size: int = 1024
    """Transitions of a batch."""

    embedding_width: int = 50
    """Width of the embeddings of words, tags and labels."""

    hidden_width: int = 512
    """Hidden units."""

    dropout: float = 0.2
    """Dropout on the hidden units."""

    norm: NormKind = "ada_norm"
    """The norm before the activation."""

    C: float = 1.0
    """Factor C of AdaNorm."""

    def __post_init__(self) -> None:
        """Check what the types cannot say."""
        names = ("min_count", "tiny_sentences", "batch_size", "embedding_width", "hidden_width")
        for name in names:
            if getattr(self, name) < 1:
                raise ValueError(f"parser.{name}: must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"parser.dropout: must be in [0, 1), got {self.dropout}")
        check_norm("parser", C=self.C, name="hidden_width", width=self.hidden_width)


def load_treebank(config: ParserConfig) -> Treebank:
    """Read or make the treebank of a configuration.

    Raises:
        ValueError: A file is missing or damaged; the message names it.
    """
    raw = Path(config.raw)
    match config.dataset:
        case "tiny":
            return treebank.tiny(config.tiny_sentences)
        case "ptb_sample":
            sentences = treebank.read_dp(raw)
            if len(sentences) < 3:
                raise ValueError(f"{raw}: three parts need 3 sentences, not {len(sentences)}")
            return treebank.split_in_order(sentences)
        case "conllu":
            paths = [_part_file(raw, names) for names in _PARTS]
            texts = [(read_text(path), path) for path in paths]
            return Treebank(
                *(
                    tuple(treebank.read_conllu(text, tags=config.tags, source=path))
                    for text, path in texts
                )
            )


def _part_file(directory: Path, names: Sequence[str]) -> Path:
    """The only file whose name ends in a part's name, such as ``en_ewt-ud-dev.conllu.xz``."""
    found = [path for name in names for path in sorted(directory.glob(f"*{name}.conll*"))]
    if len(found) != 1:
        raise ValueError(f"{directory}: needs one file *{names[0]}.conllu, has {len(found)}")
    return found[0]


def train_parser(
    *, parser: ParserConfig, train: TrainConfig, run: Path = Path("runs/tiny-parser")
) -> TrainResult:
    """Train the dependency parser; a run directory that exists is continued.

    Sentences whose tree no sequence of transitions reaches (arcs cross, or several words are
    children of the root) are left out of training and counted in ``training.json``. They stay in
    the other parts.

    Args:
        parser: Which treebank, and the classifier.
        train: Optimizer, length of training, evaluations.
        run: Run directory to write.

    Returns:
        Steps done and the last numbers.

    Raises:
        ValueError: The treebank is missing or damaged, the directory holds a run of another, or the
            loss is not finite.
    """
    trees = load_treebank(parser)
    lexicon = Lexicon.of(trees.train, min_count=parser.min_count)
    derivations = derive(lexicon.encode(trees.train), lexicon)
    if not derivations.sentences:
        raise ValueError(
            f"{parser.raw}: no sentence of the training part has a projective tree with one root"
        )
    counts = {
        "sentences": derivations.sentences,
        "left out": derivations.left_out,
        "transitions": len(derivations.transitions),
    }
    print("training part: " + ", ".join(f"{value:,} {name}" for name, value in counts.items()))
    evaluate = validation(parser, lexicon, trees.valid)
    directory = Run(run, {"parser": parser, "train": train})
    directory.begin(write=False)  # a run of other settings stays as it is
    keep_lexicon(lexicon, run)
    write_json(run / "training.json", counts)
    torch.manual_seed(train.seed)
    return fit(
        build_parser(parser, lexicon),
        shuffled_batches(
            (derivations.features, derivations.transitions), parser.batch_size, seed=train.seed
        ),
        classification_step,
        config=train,
        run=directory,
        evaluate=evaluate,
    )


def keep_lexicon(lexicon: Lexicon, run: Path) -> None:
    """Store the lexicon with its run, or check that it is the one of the run.

    Raises:
        ValueError: The run has another one.
    """
    path = run / _LEXICON
    if not path.exists():
        lexicon.save(path)
    elif vars(Lexicon.load(path)) != vars(lexicon):
        raise ValueError(
            f"{path}: is of another treebank or parser.min_count; choose another run directory or "
            "delete this one"
        )


def build_parser(config: ParserConfig, lexicon: Lexicon) -> TransitionClassifier:
    """Compose the classifier that ``config`` describes, with fresh parameters."""
    return TransitionClassifier(
        lexicon.size,
        num_transitions(len(lexicon.labels)),
        embedding_width=config.embedding_width,
        hidden_width=config.hidden_width,
        norm=norm_factory(config.norm, C=config.C),
        dropout=config.dropout,
    )


def validation(
    config: ParserConfig, lexicon: Lexicon, sentences: Sequence[Sentence]
) -> Callable[[nn.Module], dict[str, float]]:
    """What judges a parser: attachment scores of parsing, and the loss along true derivations.

    Without a sentence that has a derivation there is no loss.
    """
    encoded = lexicon.encode(sentences)
    known = derive(encoded, lexicon)
    batches = batches_in_order((known.features, known.transitions), 4096)
    scored = scored_tags(config, lexicon)

    def evaluate(model: nn.Module) -> dict[str, float]:
        found = attachment(parse_encoded(model, encoded, lexicon), encoded, scored)
        judged = accuracy(model, batches) if known.sentences else {}
        return {**judged, "uas": found.uas, "las": found.las}

    return evaluate


def scored_tags(config: ParserConfig, lexicon: Lexicon) -> Ints:
    """Numbers of the tags whose words are scored.

    Raises:
        ValueError: A tag that shall be left out does not exist, or none would be left.
    """
    for tag in config.unscored_tags:
        if tag not in lexicon.tags:
            raise ValueError(f"parser.unscored_tags: {tag!r} is no tag of the training part")
    if set(lexicon.tags) == {*treebank.SPECIALS, *config.unscored_tags}:
        raise ValueError("parser.unscored_tags: holds every tag, so no word would be scored")
    kept = [place for place, tag in enumerate(lexicon.tags) if tag not in config.unscored_tags]
    return np.array(kept, dtype=np.int32) + lexicon.first_tag


def evaluate_parser(
    *,
    run: Path = Path("runs/tiny-parser"),
    split: Literal["valid", "test"] = "test",
    weights: Path | None = None,
) -> dict[str, Any]:
    """Score a trained parser: unlabelled and labelled attachment.

    Args:
        run: Run directory of ``train-parser``.
        split: Part of the treebank.
        weights: Weights file; default: the best of the run.

    Returns:
        What was written: ``scores.json`` in the run directory for the test part,
        ``scores.valid.json`` for the other.

    Raises:
        ValueError: The run or its treebank cannot be read.
    """
    trained = load_parser(run, weights=weights)
    encoded = trained.lexicon.encode(getattr(load_treebank(trained.config), split))
    trees = parse_encoded(trained.network, encoded, trained.lexicon)
    found = attachment(trees, encoded, scored_tags(trained.config, trained.lexicon))
    without = " ".join(trained.config.unscored_tags) or "nothing"
    scores = {"uas": Score(found.uas, "percent", f"heads right, left out: {without}", found.words)}
    if len(trained.lexicon.labels) > 1:
        words = f"heads and labels right, left out: {without}"
        scores["las"] = Score(found.las, "percent", words, found.words)
    return write_scores(run, split, trained.weights, scores)


@dataclass(frozen=True)
class TrainedParser:
    """A parser read from a run directory."""

    config: ParserConfig
    lexicon: Lexicon
    network: TransitionClassifier
    weights: Path


def load_parser(run: Path, *, weights: Path | None = None) -> TrainedParser:
    """Read a trained parser.

    Args:
        run: Run directory of ``train-parser``.
        weights: Weights file; default: the best of the run.

    Raises:
        ValueError: The run cannot be read.
    """
    config: ParserConfig = run_config(run, "parser", ParserConfig)
    lexicon = Lexicon.load(run / _LEXICON)
    network = build_parser(config, lexicon)
    return TrainedParser(config, lexicon, network, load_best(network, run, weights))


def parse(
    *,
    run: Path = Path("runs/tiny-parser"),
    input: Path | None = None,
    output: Path | None = None,
    weights: Path | None = None,
) -> None:
    """Parse sentences and write them as CoNLL-U.

    Lines with tabs are CoNLL-U, whose heads and labels are replaced; blocks without a word are left
    out. Otherwise each line is a sentence of words separated by spaces. A word without a tag gets
    the one it has most often.

    Args:
        run: Run directory of ``train-parser``.
        input: File to read; default: standard input.
        output: File to write; default: standard output.
        weights: Weights file; default: the best of the run.

    Raises:
        ValueError: The run or the text cannot be read.
    """
    trained = load_parser(run, weights=weights)
    source = "standard input" if input is None else input
    text = "\n".join([*standard_input(), ""]) if input is None else read_text(input)
    parsed = parse_text(trained, text, source=source)
    if output is None:
        sys.stdout.write(parsed)
    else:
        write_text(output, parsed)


def parse_text(trained: TrainedParser, text: str, *, source: object) -> str:
    """The CoNLL-U of a text, which is CoNLL-U itself or holds a sentence of words on each line.

    Args:
        trained: The parser.
        text: The text.
        source: What error messages call the text.

    Raises:
        ValueError: The text has tabs and is not CoNLL-U.
    """
    column, lexicon = trained.config.tags, trained.lexicon
    if "\t" not in text:
        lines = [words for line in text.splitlines() if (words := tuple(line.split()))]
        sentences = [Sentence(words, tuple(map(lexicon.usual_tag, words))) for words in lines]
        found = parse_sentences(trained.network, sentences, lexicon)
        return "".join(to_conllu(sentence, tags=column) for sentence in found)
    blocks = treebank.parse_conllu(text, source=source)
    trees = [tree for tree in blocks if treebank.words_of(tree)]
    nodes = [treebank.words_of(tree) for tree in trees]
    for token in (token for tokens in nodes for token in tokens):
        if token[column] in (None, "_"):
            token[column] = lexicon.usual_tag(token["form"])
    sentences = [
        Sentence(tuple(t["form"] for t in tokens), tuple(t[column] for t in tokens))
        for tokens in nodes
    ]
    found = parse_sentences(trained.network, sentences, lexicon)
    for tokens, sentence in zip(nodes, found, strict=True):
        for token, head, label in zip(tokens, sentence.heads, sentence.labels, strict=True):
            token.update(head=head, deprel=label, deps=None)
    return "".join(tree.serialize() for tree in trees)


def to_conllu(sentence: Sentence, *, tags: Literal["upos", "xpos"]) -> str:
    """A parsed sentence in CoNLL-U, its tags in the column ``tags``."""
    columns = zip(sentence.words, sentence.tags, sentence.heads, sentence.labels, strict=True)
    rows = []
    for number, (word, tag, head, label) in enumerate(columns, start=1):
        upos, xpos = (tag, "_") if tags == "upos" else ("_", tag)
        rows.append(f"{number}\t{word}\t_\t{upos}\t{xpos}\t_\t{head}\t{label}\t_\t_\n")
    return "".join(rows) + "\n"

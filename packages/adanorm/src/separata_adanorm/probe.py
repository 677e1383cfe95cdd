"""A model with a loss on one batch, for tools that look inside: from a run, or from a function."""

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from separata_shared.cli import from_yaml
from separata_shared.data import to_device
from separata_shared.files import read_text
from separata_shared.language_model import Memory, next_symbol_loss, training_blocks
from separata_shared.training import Loss, Run
from separata_shared.translation import load_characters, load_for, translation_step
from torch import Tensor, nn

from . import classify, images, parser, parsing, sentences
from .config import DataConfig, ModelConfig
from .generate import load_run
from .language_model import LanguageModelConfig, build_language_model
from .model import build_model
from .runs import load_best, run_config


class Probe(NamedTuple):
    """What ``gradient_statistics`` takes."""

    model: nn.Module
    loss: Callable[[], Tensor]
    """Runs the model on a batch and gives the mean loss of its items."""


def probe_run(run: Path, *, weights: Path | None = None) -> Probe:
    """The model of a run, in evaluation mode, on a training batch of its data.

    Args:
        run: Run directory of any training verb of this package.
        weights: Weights file; default: the best of the run.

    Raises:
        ValueError: The run or its data cannot be read.
    """
    path = Run(run).config
    if not path.exists():
        raise ValueError(f"{run}: not a run directory; train one first")
    groups = {line.partition(":")[0] for line in read_text(path).splitlines()}
    for group, read in _READERS.items():
        if group in groups:
            return read(run, weights)
    raise ValueError(f"{path}: has none of the groups {', '.join(_READERS)}")


def probe_new(model: ModelConfig, data: DataConfig, *, seed: int = 1) -> Probe:
    """A translation model with fresh parameters on a training batch.

    Args:
        model: Sizes, wiring and norms.
        data: Corpus.
        seed: Of the parameters.

    Raises:
        ValueError: The data is missing or does not fit.
    """
    corpus, model = load_for(model, data)
    torch.manual_seed(seed)
    batch = corpus.train.batches(data.max_tokens, seed=1)(0)[0]
    return _probe(build_model(model).eval(), translation_step(0.0), batch)


def probe_function(name: str) -> Probe:
    """What a function of the user gives.

    Args:
        name: ``module:function`` or ``file.py:function``. The function takes nothing and gives a
            model and a function of nothing that gives a loss.

    Raises:
        ValueError: There is no such function, or it gives something else.
    """
    place, colon, function = name.rpartition(":")
    if not colon:
        raise ValueError(f"function: {name!r} must be module:function or file.py:function")
    made = getattr(_module(place), function, None)
    if not callable(made):
        raise ValueError(f"function: {place} has no function {function!r}")
    try:
        inspect.signature(made).bind()
    except TypeError as error:
        raise ValueError(f"function: {name} must take no arguments ({error})") from None
    match made():
        case (nn.Module() as model, loss) if callable(loss):
            return Probe(model, loss)
    raise ValueError(f"function: {name} must give a model and a function that gives a loss")


def _module(place: str) -> Any:
    try:
        return _file(place) if place.endswith(".py") else importlib.import_module(place)
    except (ImportError, SyntaxError) as error:
        raise ValueError(f"function: {place} cannot be imported ({error})") from None


def _file(place: str) -> Any:
    if not Path(place).is_file():
        raise ValueError(f"function: {place}: no such file")
    spec = importlib.util.spec_from_file_location(Path(place).stem, place)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its dataclasses look for their types
    spec.loader.exec_module(module)
    return module


def _probe(model: nn.Module, step: Callable[[nn.Module, Any], Loss], batch: Any) -> Probe:
    batch = to_device(batch, next(model.parameters()).device)

    def loss() -> Tensor:
        found = step(model, batch)
        return found.total / found.count

    return Probe(model, loss)


def _translation(run: Path, weights: Path | None) -> Probe:
    trained = load_run(run, weights=weights)
    smoothing = from_yaml(Run(run).config, {"label_smoothing": float})["label_smoothing"]
    corpus, _ = load_for(trained.model, trained.data)
    batch = corpus.train.batches(trained.data.max_tokens, seed=1)(0)[0]
    return _probe(trained.network, translation_step(smoothing), batch)


def _language_model(run: Path, weights: Path | None) -> Probe:
    config = run_config(run, "language_model", LanguageModelConfig)
    text = load_characters(run_config(run, "data", DataConfig))
    model = build_language_model(config)
    load_best(model, run, weights)
    memory = Memory((config.num_layers, config.streams, config.memory, config.width))
    first = training_blocks(text.train, streams=config.streams, block=config.block, seed=1)(0)[0]
    return _probe(model, lambda _, block: next_symbol_loss(model, model, memory, block), first)


def _images(run: Path, weights: Path | None) -> Probe:
    config = run_config(run, "images", images.ImageConfig)
    model = images.build_image_classifier(config)
    load_best(model, run, weights)
    part = images.load_images(config).train
    batch = classify.shuffled_batches(part, config.batch_size, seed=1)(0)[0]
    return _probe(model, classify.classification_step, batch)


def _sentences(run: Path, weights: Path | None) -> Probe:
    config = run_config(run, "sentences", sentences.SentenceConfig)
    labelled = sentences.load_sentences(config).train
    vocabulary = classify.run_vocabulary(run, config, labelled)
    model = sentences.build_sentence_classifier(config, len(vocabulary))
    load_best(model, run, weights)
    part = sentences.SentencePart(labelled, vocabulary)
    batch = part.batches(config.max_tokens, seed=1)(0)[0]
    return _probe(model, classify.classification_step, batch)


def _parser(run: Path, weights: Path | None) -> Probe:
    trained = parsing.load_parser(run, weights=weights)
    encoded = trained.lexicon.encode(parsing.load_treebank(trained.config).train)
    found = parser.derive(encoded, trained.lexicon)
    items = found.features, found.transitions
    batch = classify.shuffled_batches(items, trained.config.batch_size, seed=1)(0)[0]
    return _probe(trained.network, classify.classification_step, batch)


_READERS: dict[str, Callable[[Path, Path | None], Probe]] = {
    "images": _images,
    "sentences": _sentences,
    "parser": _parser,
    "language_model": _language_model,
    "model": _translation,
}

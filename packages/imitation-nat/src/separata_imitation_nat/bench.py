"""How fast the learner is, against baselines that are strong: the verb ``bench``.

The autoregressive models keep keys and values, run greedy and beam search, with many decoder layers
and with one; each also runs in CTranslate2 with the same weights. Competitors take turns in one
process; ``separata_shared.testing.timing`` explains the clocks. Nothing is timed before greedy
search in float32 has found the tokens that CTranslate2 finds, and no ratio is printed without every
baseline.
"""

import csv
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from separata_shared.data.vocabulary import EOS, UNK
from separata_shared.files import atomic_write, write_json
from separata_shared.testing import timing
from torch import Tensor

from . import outside
from .build import build_learner, build_teacher
from .competitors import (
    OURS,
    OUTSIDE,
    Competitor,
    Models,
    Tokens,
    Work,
    competitors,
    greedy,
    rescoring,
)
from .config import ModelConfig
from .fast import PRECISIONS, Precision
from .generate import check_vocabularies, load_learner, load_teacher

Row = dict[str, Any]
Measure = Callable[[Work, Sequence[Competitor]], list[Row]]


def bench(
    *,
    model: ModelConfig,
    vocabulary: int = 32000,
    teacher: Path | None = None,
    shallow: Path | None = None,
    learner: Path | None = None,
    source_length: int = 32,
    target_length: int = 32,
    beam: int = 4,
    candidates: int = 7,
    precisions: list[Precision] | None = None,
    large_batch_gib: float = 2.0,
    rescoring_lengths: list[int] | None = None,
    threads: int = 1,
    rounds: int = 9,
    seconds: float = 90.0,
    seed: int = 1,
    output: Path = Path("runs/tiny/bench.csv"),
) -> list[Row]:
    """Time the learner against autoregressive models, ours and CTranslate2's.

    The weights are random, or those of three runs; speed hardly depends on them, because every
    system writes the same number of tokens. A time is that of a whole batch, encoder and all, on a
    CPU. Batches are of one sentence, and the largest whose candidates' logits fit.

    Args:
        model: Sizes for random weights.
        vocabulary: Types of both sides, where ``model`` gives none.
        teacher: Run directory of the teacher, to time its weights; then the other two as well.
        shallow: Run directory of an autoregressive model with one decoder layer.
        learner: Run directory of the learner.
        source_length: Tokens of a source sentence.
        target_length: Tokens of a translation.
        beam: Beam size.
        candidates: Lengths of the learner among which the teacher chooses.
        precisions: Of our models; default: float32, bfloat16 and int8.
        large_batch_gib: GiB for the logits of all candidates of the large batch.
        rescoring_lengths: Lengths at which rescoring is also compared with beam search, one
            sentence at a time, without bfloat16; default: none.
        threads: Threads; with one, times are process CPU time, with more wall time.
        rounds: Timings of each competitor, at least three.
        seconds: Time of a table after which no further round begins; there are five at least
            (``rounds``, if that is less).
        seed: Of weights and sources.
        output: CSV file; a JSON file with rows, ratios and environment stands beside it.

    Returns:
        One row for each competitor and batch.

    Raises:
        ValueError: A baseline is missing or finds other tokens, so there is nothing to compare
            with; or an option does not fit.
    """
    check(locals())
    versions = {name: metadata.version(name) for name in ("separata-imitation-nat", "numpy")}
    versions["ctranslate2"] = outside.version()
    environment = timing.environment("cpu", threads) | versions
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    models = load_models(model, vocabulary, threads, teacher, shallow, learner)
    check_positions(models, source_length, target_length, rescoring_lengths or [], candidates)
    measure = partial(
        measured, models, clock=timing.make_clock("cpu", threads), rounds=rounds, seconds=seconds
    )
    chosen = list(precisions or PRECISIONS)
    rows: list[Row] = []

    def table(found: list[Row]) -> None:
        show(found)
        rows.extend(found)
        write(output, rows, environment, ratios(models, rows))  # each time, since it takes long

    def work(batch: int, source: int, target: int) -> Work:
        return Work(
            source=random_sources(models, batch, source),
            target_length=target,
            beam=beam,
            candidates=candidates,
        )

    small = work(1, source_length, target_length)
    table(measure(small, list(competitors(models, small, chosen))))
    batch = largest_batch(models, small, large_batch_gib)
    if batch > 1:
        large = work(batch, source_length, target_length)
        slow = slow_precisions(rows)
        useful = [name for name in chosen if name not in slow]
        table(measure(large, list(competitors(models, large, useful))))
    for length in rescoring_lengths or []:
        single = work(1, length, length)
        narrow = [name for name in chosen if name != "bfloat16"]
        table(measure(single, list(rescoring(models, single, narrow))))
    for line in ratios(models, rows):
        case = f"{line['batch']} x {line['target_length']}"
        print(f"{case:>8}  {line['of']:<46} to {line['to']:<40}{line['ratio']:>7.3f}")
    print(f"written to {output} and {output.with_suffix('.json')}")
    return rows


def check(options: Mapping[str, Any]) -> None:
    """Raise a ``ValueError`` that names an option which does not fit."""
    least = {"vocabulary": UNK + 2, "source_length": 2, "target_length": 2, "beam": 1}
    least |= {"candidates": 1, "threads": 1, "rounds": 3}
    for name, value in least.items():
        if options[name] < value:
            raise ValueError(f"{name}: must be at least {value}, got {options[name]}")
    if any(length < 2 for length in options["rescoring_lengths"] or []):
        raise ValueError("rescoring_lengths: must be at least 2")
    gib, output = options["large_batch_gib"], options["output"]
    if not (math.isfinite(gib) and gib > 0):
        raise ValueError(f"large_batch_gib: must be a positive number, got {gib}")
    if output.suffix == ".json":
        raise ValueError(f"output: {output} is where the JSON file goes; give the CSV file's name")
    if output.is_dir():
        raise ValueError(f"output: {output} is a directory")
    if "float32" not in (options["precisions"] or PRECISIONS):
        raise ValueError("precisions: float32 is a baseline and cannot be left out")
    runs = {name: options[name] for name in ("teacher", "shallow", "learner")}
    missing = [name for name, run in runs.items() if run is None]
    if missing and len(missing) < len(runs):
        raise ValueError(
            f"{missing[0]}: missing; without every baseline there is no speed-up to print, so give "
            "all of teacher, shallow and learner, or none for random weights"
        )


def check_positions(
    models: Models, source: int, target: int, rescoring: Sequence[int], candidates: int
) -> None:
    """Raise a ``ValueError`` that names a length for which a model has no positions."""
    most = min(config.max_length for config in models.configs.values())
    wide = candidates // 2
    lengths = {"source_length": source, "target_length": target + wide}
    lengths |= {"rescoring_lengths": max(rescoring) + wide} if rescoring else {}
    for name, length in lengths.items():
        if length > most:
            raise ValueError(
                f"{name}: up to {length} tokens with {candidates} candidates, but the models have "
                f"positions for {most} (model.max_length)"
            )


def load_models(
    model: ModelConfig,
    vocabulary: int,
    threads: int,
    teacher: Path | None,
    shallow: Path | None,
    learner: Path | None,
) -> Models:
    """The models of three runs, or random ones of the sizes of ``model``.

    The random shallow model has twice the encoder layers, and one decoder layer.

    Raises:
        ValueError: A run cannot be read, or the vocabularies differ.
    """
    if teacher is not None and shallow is not None and learner is not None:
        deep, thin, own = load_teacher(teacher), load_teacher(shallow), load_learner(learner)
        check_vocabularies(thin, deep)
        check_vocabularies(own, deep)
        networks = (deep.network.cpu(), thin.network.cpu(), own.network.cpu())
        return Models(*networks, configs=(deep.model, thin.model), threads=threads)
    whole = replace(
        model,
        source_vocabulary_size=model.source_vocabulary_size or vocabulary,
        target_vocabulary_size=model.target_vocabulary_size or vocabulary,
    )
    one_layer = replace(
        whole, encoder_layers=2 * whole.encoder_layers, decoder_layers=1, action_layers="all"
    )
    return Models(
        build_teacher(whole).eval(),
        build_teacher(one_layer).eval(),
        build_learner(whole).eval(),
        configs=(whole, one_layer),
        threads=threads,
    )


def random_sources(models: Models, batch: int, length: int) -> Tensor:
    """Words drawn evenly, then EOS: ``(batch, length)``."""
    size = models.configs[models.deep].source_vocabulary_size
    source = torch.randint(UNK + 1, size, (batch, length))
    source[:, -1] = EOS
    return source


def largest_batch(models: Models, work: Work, gib: float) -> int:
    """The largest power of two of sentences whose candidates' logits fit; at least 1."""
    longest = work.target_length + work.candidates // 2
    vocabulary = models.configs[models.deep].target_vocabulary_size
    # Rescoring holds the teacher's logits and their log-probabilities; the learner's have gone.
    sentence = 2 * 4 * work.candidates * longest * vocabulary
    fitting = int(gib * 2**30) // sentence
    return 1 << max(fitting.bit_length() - 1, 0)


def measured(
    models: Models,
    work: Work,
    entrants: Sequence[Competitor],
    *,
    clock: timing.Clock,
    rounds: int,
    seconds: float,
) -> list[Row]:
    """Check the baselines, time everything, and make the rows of a table.

    Raises:
        ValueError: Greedy search in float32 does not find what CTranslate2 finds.
    """
    expected = agreed(models, work)
    found: dict[str, Tokens] = {}

    def remembering(entrant: Competitor) -> timing.Call:
        def call() -> None:
            found[entrant.name] = entrant.translate()

        return call

    with timing.kept_memory():
        times = timing.interleave(
            {entrant.name: remembering(entrant) for entrant in entrants},
            clock,
            rounds=rounds,
            seconds=seconds,
        )
    exact = next((e for e in entrants if (e.system, e.search) == ("NAT", "one pass")), None)
    rows = []
    for entrant in entrants:
        wanted = expected.get(entrant.system) if entrant.search == "greedy" else None
        if exact is not None and (entrant.system, entrant.search) == ("NAT", "one pass"):
            wanted = found[exact.name]
        values = times[entrant.name]
        rows.append(
            {
                "batch": len(work.source),
                "source_length": work.source.size(1),
                "target_length": work.target_length,
                "system": entrant.system,
                "search": entrant.search,
                "engine": entrant.engine,
                "precision": entrant.precision,
                "median_ms": round(1e3 * statistics.median(values), 2),
                "p90_ms": round(1e3 * _p90(values), 2),
                "rounds": len(values),
                "same_tokens": None if wanted is None else _same(found[entrant.name], wanted),
                "seconds": values,
            }
        )
    for row in rows:
        row |= compared(models, row, rows)
    return rows


def agreed(models: Models, work: Work) -> dict[str, Tokens]:
    """What greedy search finds, by system, in our engine and in CTranslate2 alike.

    Raises:
        ValueError: They differ.
    """
    results = {}
    for system in models.configs:
        theirs = models.outside(system, "float32").translate(
            work.source.tolist(),
            beam=1,
            shortest=work.target_length,
            longest=work.target_length,
        )
        results[system] = [row[: work.target_length - 1] for row in theirs]
        ours = greedy(models.fast(system, "float32"), work)
        if ours != results[system]:
            raise ValueError(
                f"{system}: CTranslate2 finds other words with the same weights "
                f"({_same(ours, results[system]):.1%} are equal), so it is no baseline"
            )
    return results


def compared(models: Models, row: Row, rows: Sequence[Row]) -> Row:
    """How often the time of our cached greedy search, and of the best autoregressive system.

    The best one is the fastest with greedy search, in the row's precision, of any engine and depth.
    """
    base = _find(rows, models.deep, "greedy", OURS, "float32")
    rivals = [
        other["seconds"]
        for other in rows
        if other["search"] == "greedy" and other["precision"] == row["precision"]
    ]
    best = min(rivals, key=statistics.median, default=None)
    return {
        "to_cached_greedy": base and round(timing.ratio(row["seconds"], base["seconds"]), 3),
        "to_best_same_precision": best and round(timing.ratio(row["seconds"], best), 3),
    }


def ratios(models: Models, rows: Sequence[Row]) -> list[Row]:
    """The ratios that matter, for each batch of the main tables and each rescoring length."""
    deep, thin = models.deep, models.shallow
    pairs = [
        ((deep, "greedy", OURS, "float32"), (deep, "greedy", OUTSIDE, "float32")),
        (("NAT", "one pass", OURS, "float32"), (deep, "greedy", OURS, "float32")),
        (("NAT", "one pass", OURS, "float32"), (deep, "greedy", OUTSIDE, "float32")),
        (("NAT", "one pass", OURS, "bfloat16"), (deep, "greedy", OURS, "float32")),
        (("NAT", "one pass", OURS, "int8"), (deep, "greedy", OUTSIDE, "int8")),
        (("NAT", "one pass", OURS, "int8"), (thin, "greedy", OUTSIDE, "int8")),
    ]
    searches = {row["search"] for row in rows if row["system"] == "NAT"} - {"one pass"}
    beams = {row["search"] for row in rows if row["search"].startswith("beam")}
    for precision in PRECISIONS:
        pairs += [
            (("NAT", search, OURS, precision), (deep, beam, OURS, precision))
            for search in searches
            for beam in beams
        ]
    lines = []
    tables = dict.fromkeys((row["batch"], row["target_length"]) for row in rows)
    for batch, length in tables:
        here = [r for r in rows if (r["batch"], r["target_length"]) == (batch, length)]
        for of, to in pairs:
            one, other = _find(here, *of), _find(here, *to)
            if one is not None and other is not None:
                value = round(timing.ratio(one["seconds"], other["seconds"]), 3)
                names = {"of": ", ".join(of), "to": ", ".join(to)}
                lines.append({"batch": batch, "target_length": length, **names, "ratio": value})
    return lines


def slow_precisions(rows: Sequence[Row]) -> set[str]:
    """Precisions in which one pass over one sentence takes longer than in float32.

    The CPU has no instructions for them, and a large batch would take minutes.
    """
    passes = {
        row["precision"]: row["median_ms"]
        for row in rows
        if (row["system"], row["search"], row["engine"]) == ("NAT", "one pass", OURS)
    }
    slow = {name for name, time in passes.items() if time > passes["float32"]}
    for name in sorted(slow):
        print(f"{name}: slower than float32 on this CPU, so the large batch does without it")
    return slow


def show(rows: Sequence[Row]) -> None:
    """Print a table."""
    first = rows[0]
    print(
        f"\n{first['batch']} sentences of {first['source_length']} tokens, translations of "
        f"{first['target_length']}; milliseconds"
    )
    for row in rows:
        cells = [row[name] for name in ("to_cached_greedy", "to_best_same_precision")]
        notes = ["" if value is None else f"{value:.3f}" for value in cells]
        print(
            f"  {row['system']:<9}{row['search']:<20}{row['engine']:<19}{row['precision']:<10}"
            f"{row['median_ms']:>10.1f}{row['p90_ms']:>10.1f}{notes[0]:>9}{notes[1]:>9}",
            flush=True,
        )


def write(path: Path, rows: Sequence[Row], environment: Row, lines: Sequence[Row]) -> None:
    """Write the rows as CSV, and with ratios and environment as JSON."""
    plain = [{name: row[name] for name in row if name != "seconds"} for row in rows]
    with atomic_write(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=[*plain[0], *environment], lineterminator="\n")
        writer.writeheader()
        writer.writerows({**row, **environment} for row in plain)
    write_json(
        path.with_suffix(".json"),
        {"environment": environment, "ratios": list(lines), "rows": plain},
    )


def _find(rows: Sequence[Row], system: str, search: str, engine: str, precision: str) -> Row | None:
    wanted = {"system": system, "search": search, "engine": engine, "precision": precision}
    return next((row for row in rows if wanted.items() <= row.items()), None)


def _p90(values: Sequence[float]) -> float:
    return statistics.quantiles(values, n=10, method="inclusive")[-1]


def _same(found: Tokens, wanted: Tokens) -> float:
    """Share of places at which two sets of translations agree."""
    pairs = [
        a == b
        for own, other in zip(found, wanted, strict=True)
        for a, b in zip(own, other, strict=False)
    ]
    return round(sum(pairs) / max(len(pairs), 1), 4)

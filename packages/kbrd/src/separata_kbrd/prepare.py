"""The command ``prepare``: from raw files to the directory that ``data.load`` reads."""

from collections.abc import Callable
from pathlib import Path

from separata_shared.data.prepared import new_directory, seal
from separata_shared.files import need_file, sha256

from .config import DataConfig
from .corpus import Source, counts_of, make_corpus, save_corpus
from .data import settings
from .dbpedia import FACTS, has_dumps, read_dumps
from .entities import name_linker, nodes_of, read_link_table, spotlight_linker, table_linker
from .graph import Catalogue, Triples, build_graph
from .graph_files import Graph, has_npz, has_tsv, read_npz, read_tsv
from .pickles import has_pickles, read_link_pickle, read_pickles
from .redial import Dialog, Link, read_dialogs, split_dialogs, unknown_mentions
from .sample import sample


def prepare(*, data: DataConfig) -> None:
    """Turn dialogs and a graph into numbers on disk, and print checksums and counts.

    The directory ``data.prepared`` is written whole or not at all; prepared data that stood there
    is replaced. Raw files are only read.

    Args:
        data: Which dialogs and graph, where their files are and where the result goes.

    Raises:
        ValueError: A file is missing, damaged or does not fit the others; the message names it.
    """
    if data.dataset == "tiny":
        print("tiny: made when it is loaded, nothing to prepare")
        return
    directory = Path(data.prepared)
    source = read_source(data)
    corpus = make_corpus(source, data)
    with new_directory(directory) as fresh:
        save_corpus(corpus, fresh)
        dictionary = [Path(data.dictionary)] if data.dictionary is not None else []
        files = dict.fromkeys([*source.files, *dictionary])
        raw = {path.name: sha256(path) for path in files}
        counts = counts_of(corpus)
        manifest = seal(fresh, settings(data), {"counts": counts, "raw": raw})
    for name, checksum in raw.items():
        print(f"{checksum}  {name}  (read)")
    for name, entry in manifest["files"].items():
        print(f"{entry['sha256']}  {directory / name}")
    for name, numbers in counts.items():
        print(f"{name}: " + ", ".join(f"{value:,} {key}" for key, value in numbers.items()))
    dialogs = (*source.train, *source.valid, *source.test)
    unknown = unknown_mentions(dialogs, frozenset(source.catalogue.ids))
    if unknown:
        ((item, _),) = unknown.most_common(1)
        print(
            f"left out: {unknown.total():,} mentions of items that are not in the catalogue "
            f"({len(unknown):,} identifiers, most often @{item[:20]})"
        )


def read_source(data: DataConfig) -> Source:
    """Graph and dialogs of a data set that is not made.

    Raises:
        ValueError: A file is missing, damaged or does not fit the others; the message names it.
    """
    if data.dataset == "sample":
        return sample(dialogs=data.sample_dialogs, seed=data.split_seed)
    raw = Path(data.raw)
    if not raw.is_dir():
        raise ValueError(f"{raw}: no such directory; put the raw files there (data.raw)")
    triples, catalogue, files = read_graph(data, raw)
    train, train_paths = _read_all(raw, data.train_files)
    test, test_paths = _read_all(raw, data.test_files)
    if data.valid_files:
        valid, valid_paths = _read_all(raw, data.valid_files)
    else:
        train, valid = split_dialogs(train, train_share=data.train_share, seed=data.split_seed)
        valid_paths = []
    link, link_files = _linker(data, raw, triples, catalogue)
    return Source(
        triples=triples,
        catalogue=catalogue,
        train=train,
        valid=valid,
        test=test,
        link=link,
        files=(*files, *train_paths, *valid_paths, *test_paths, *link_files),
    )


def read_graph(data: DataConfig, raw: Path) -> Graph:
    """The graph of a directory in the form that the configuration names or the first there.

    Raises:
        ValueError: There is none, or it cannot be read; the message names the file.
    """
    forms: dict[str, tuple[Callable[[Path], bool], Callable[[Path], Graph]]] = {
        "npz": (has_npz, lambda folder: read_npz(folder, data.self_loop)),
        "pickles": (has_pickles, lambda folder: read_pickles(folder, data.self_loop)),
        "tsv": (has_tsv, read_tsv),
        "dbpedia": (has_dumps, read_dumps),
    }
    if data.graph != "auto":
        return forms[data.graph][1](raw)
    for is_there, read in forms.values():
        if is_there(raw):
            return read(raw)
    raise ValueError(
        f"{raw}: holds no graph: triples.npz, subkg.pkl, graph.tsv or {FACTS} is needed"
    )


def _read_all(raw: Path, names: list[str]) -> tuple[list[Dialog], list[Path]]:
    parts = [read_dialogs(raw, name) for name in names]
    return [dialog for dialogs, _ in parts for dialog in dialogs], [path for _, path in parts]


def _linker(
    data: DataConfig, raw: Path, triples: Triples, catalogue: Catalogue
) -> tuple[Link, tuple[Path, ...]]:
    number = {key: node for node, key in enumerate(triples.nodes)}
    match data.links:
        case "none":
            return lambda text: (), ()
        case "names":
            graph = build_graph(triples, catalogue, threshold=data.threshold)
            return name_linker(graph), ()
        case "spotlight":
            return nodes_of(spotlight_linker(data.spotlight_url), number), ()
        case "table":
            path = need_file(raw, data.link_table)
            read = read_link_pickle if ".pkl" in path.suffixes else read_link_table
            return nodes_of(table_linker(read(path)), number), (path,)

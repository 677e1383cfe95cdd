"""Numbers printed by the authors' code; ``--goldens DIR`` compares with other such files."""

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from separata_kbrd.config import DialogConfig
from separata_kbrd.convert_dialog import dialog_names
from separata_kbrd.dialog import DialogModel
from separata_kbrd.diversity import distinct_per_response
from separata_kbrd.edges import NORMALISERS, EdgeIndex
from separata_kbrd.entities import nodes_of, table_linker
from separata_kbrd.graph import edge_list
from separata_kbrd.model import (
    AutoRec,
    FrozenRecommender,
    Recommender,
    RelationalGraphLayer,
    initialise_uniform,
    recommendation_loss,
)
from separata_kbrd.pairs import Part, pad_nodes
from separata_kbrd.recommendation import recalls
from separata_kbrd.redial import parse_dialog, turn_pairs
from separata_kbrd.replies import reply_loss
from separata_kbrd.search import official_beam, official_greedy
from separata_kbrd.words import END, NULL, SPECIALS, START, UNK
from separata_shared.metrics import distinct_n, ranks
from separata_shared.testing.parity import prefixed
from torch import Tensor

Arrays = dict[str, Tensor]
EXACT = 1e-9  # relative, outputs and gradients in float64
ROUNDED = 2e-6  # relative, gradients stored in float32


@pytest.fixture
def data(golden_path: Path) -> Any:
    """A golden file: the arrays of an .npz, or the value of a .json."""
    if golden_path.suffix == ".json":
        return json.loads(golden_path.read_text(encoding="utf-8"))
    with np.load(golden_path, allow_pickle=False) as stored:
        return {name: torch.from_numpy(stored[name]) for name in stored.files}


def test_golden(golden_path: Path, data: Any, real_graph: Path | None) -> None:
    kinds = [kind for kind in KINDS if kind <= data.keys()]
    assert kinds, f"{golden_path.name}: no test knows this kind of file"
    KINDS[kinds[0]](golden_path, data, real_graph)


def close(actual: Tensor, expected: Tensor, share: float, name: str) -> None:
    """Compare with a deviation relative to the largest entry."""
    assert actual.shape == expected.shape, name
    deviation = (actual.detach().double() - expected.double()).abs().max()
    assert deviation <= share * max(expected.abs().max().item(), 1e-300), f"{name}: {deviation}"


def graph_layer(path: Path, arrays: Arrays) -> RelationalGraphLayer:
    """The layer of a file in float64; its normaliser is part of the kind of file."""
    R, B = arrays["att"].shape
    _, N, d = arrays["basis"].shape
    assert int(arrays["num_relations"]) == R
    (aggregate,) = [name for name in NORMALISERS if f"_{name}_" in path.name]
    edges = torch.cat([arrays["edge_index"], arrays["edge_type"][None]]).T
    index = EdgeIndex(edges, num_nodes=N, num_relations=R, normaliser=NORMALISERS[aggregate])
    layer = RelationalGraphLayer(index, width=d, num_bases=B, initialise=initialise_uniform)
    weights = {name: arrays[name] for name in ("att", "root", "bias")}
    layer.load_state_dict({**weights, "basis": arrays["basis"].transpose(0, 1)})
    return layer.double()


def check_gradients(found: dict[str, Tensor], arrays: Arrays, share: float) -> None:
    for name, gradient in found.items():
        expected = arrays[f"g_{name}"]
        close(gradient, expected.transpose(0, 1) if name == "basis" else expected, share, name)


def layer_gradients(layer: RelationalGraphLayer) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in layer.named_parameters()}


def check_graph_layer(path: Path, arrays: Arrays, _: Path | None) -> None:
    for impl in ("reference", "portable"):
        layer = graph_layer(path, arrays)
        layer.impl = impl
        H = layer()
        close(H, arrays["nodes"], EXACT, "nodes")
        (H * arrays["upstream"]).sum().backward()
        check_gradients(layer_gradients(layer), arrays, EXACT)
    layer = graph_layer(path, arrays).float()  # with the kernel, where there is a compiler
    H = layer()
    close(H, arrays["nodes"], 1e-5, "nodes in float32")
    (H * arrays["upstream"].float()).sum().backward()
    check_gradients(layer_gradients(layer), arrays, 1e-5)


def check_recommender(path: Path, arrays: Arrays, _: Path | None) -> None:
    layer = graph_layer(path, arrays)
    model = Recommender(layer).double()
    own = {"user.a": arrays["a"], "user.b": arrays["b"], "output_bias": arrays["out_bias"]}
    model.load_state_dict(own, strict=False)
    seeds = arrays["seed_flat"].split(arrays["seed_len"].tolist())
    mask = torch.arange(max(map(len, seeds))) < arrays["seed_len"][:, None]
    nodes = torch.zeros(mask.shape, dtype=torch.int64).masked_scatter(mask, arrays["seed_flat"])

    user, _weights = model.user(layer()[nodes], mask)
    close(user, arrays["user"], EXACT, "user")
    assert not user[arrays["seed_len"] == 0].any()
    scores = model(nodes, mask)
    close(scores, arrays["scores"], EXACT, "scores")
    close(model.frozen()(nodes, mask), arrays["scores"], EXACT, "scores of cached vectors")
    loss = recommendation_loss(scores, torch.arange(len(seeds)), arrays["labels"]) / len(seeds)
    close(loss, arrays["loss"], EXACT, "loss")
    loss.backward()
    gradients = {"a": model.user.a.grad, "b": model.user.b.grad}
    gradients |= {"out_bias": model.output_bias.grad, **layer_gradients(layer)}
    check_gradients(gradients, arrays, EXACT)


def check_autorec(path: Path, arrays: Arrays, _: Path | None) -> None:
    width, N = arrays["w:encoder.layers.0.weight"].shape
    model = AutoRec(N, width=width).double()
    names = {n: f"{n.replace('encoder', 'encoder.layers.0')}" for n in model.state_dict()}
    model.load_state_dict({name: arrays[f"w:{theirs}"] for name, theirs in names.items()})
    scores = model(arrays["x"])
    close(scores.log_softmax(dim=-1), arrays["log_probs"], EXACT, "log_probs")
    count = len(arrays["y"])
    loss = recommendation_loss(scores, torch.arange(count), arrays["y"]) / count
    close(loss, arrays["loss"], EXACT, "loss")
    loss.backward()
    for name, parameter in model.named_parameters():
        close(parameter.grad, arrays[f"g:{names[name]}"], EXACT, name)


def check_recall(path: Path, data: dict[str, Any], _: Path | None) -> None:
    items, labels = torch.tensor(data["movie_ids"]), torch.tensor(data["labels"])
    scores = torch.tensor(data["scores"], dtype=torch.float64)
    turn = torch.tensor(data["turn_of_row"])[torch.tensor(data["row_of_instance"])]
    place = (items == labels[:, None]).int().argmax(dim=1)
    found = recalls(ranks(scores[:, items], place), {"turn": turn})
    for name, expected in data["expected"].items():
        metric, _, group = name.partition("@turn")
        part = found["by_turn"][group] if group else found["all"]
        assert part[metric]["value"] == pytest.approx(100 * expected, rel=1e-12), name
        assert part[metric]["n"] == data["counts"][name], name
    best = items[scores[:, items].argmax(dim=1)]
    assert best.tolist() != scores.argmax(dim=1).tolist()  # a node that is no film scores highest


def check_real_graph(path: Path, data: dict[str, Any], folder: Path | None) -> None:
    counts = data["edges_per_relation"]
    assert (sum(counts), len(counts)) == (data["n_edges"], data["n_relations"])
    assert all(count > 1000 for count in counts)  # the filter, here without repeated edges
    if folder is None:
        pytest.skip("hash and layer need --real-graph DIR with subkg_triples.npz")
    with np.load(folder / "subkg_triples.npz", allow_pickle=False) as stored:
        triples = stored["triples"]
    N, R = data["n_entity"], data["n_relations"]
    edges, kept = edge_list(triples, num_nodes=N, self_loop=86, threshold=1000)
    assert len(kept) == R
    assert np.bincount(edges[:, 2]).tolist() == counts
    rows = np.ascontiguousarray(edges, dtype=np.int32)
    assert hashlib.sha256(rows.tobytes()).hexdigest() == data["edges_sha256_int32_rows_sorted"]

    j, k, r, b = (torch.arange(size, dtype=torch.float64) for size in (N, 8, R, 2))
    basis = 0.37 * (b + 1)[:, None] * (j % 101 + 1)[:, None, None] + 0.61 * (k + 1)
    weights = {
        "basis": basis.sin(),  # (N, B, d)
        "att": (0.53 * (r + 1)[:, None] * (b + 1)).cos(),
        "root": (0.29 * (j % 53 + 1)[:, None] + 0.7 * k).cos(),
        "bias": 0.1 * k,
    }
    for aggregate, normaliser in NORMALISERS.items():
        index = EdgeIndex(
            torch.from_numpy(edges), num_nodes=N, num_relations=R, normaliser=normaliser
        )
        layer = RelationalGraphLayer(index, width=8, num_bases=2, initialise=initialise_uniform)
        layer.double().load_state_dict(weights)
        with torch.no_grad():
            H = layer()
        expected = data[aggregate]
        probes = torch.tensor(expected["probe_values"], dtype=torch.float64)
        close(H[data["probe_nodes"]], probes, EXACT, f"{aggregate} probes")
        for name, total in (("sum", H.sum()), ("sum_sq", H.square().sum())):
            assert total.item() == pytest.approx(expected[name], rel=EXACT), (aggregate, name)


def dialog_model(path: Path, arrays: Arrays) -> tuple[DialogModel, dict[str, Any]]:
    """The model of a file in float64, and the settings that stand beside it."""
    settings = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    opt, marks = settings["opt"], settings["specials"]
    assert [marks[name] for name in SPECIALS] == [NULL, START, END, UNK]
    config = DialogConfig(
        width=opt["embedding_size"],
        num_heads=opt["n_heads"],
        hidden_width=opt["ffn_size"],
        encoder_layers=opt["n_layers"],
        decoder_layers=opt["n_layers"],
        bias_width=len(arrays["w:user_representation_to_bias_1.weight"]),
        dropout=opt["dropout"],
        max_length=opt["truncate"],
        max_reply=settings["greedy_maxlen"],
    )
    model = DialogModel(config, num_tokens=settings["vocab"], user_width=opt["dim"])
    own = {n: w for n, w in prefixed(arrays, "w:").items() if not n.startswith("kbrd.")}
    names = dialog_names(opt["n_layers"], opt["n_layers"])
    assert own.keys() == names.keys()
    state = {names[name]: weight for name, weight in own.items()}
    tied = {"transformer.target.tokens.weight": state["transformer.source.tokens.weight"]}
    model.load_state_dict({**state, **tied})
    return model.double().eval(), settings


def frozen_recommender(arrays: Arrays) -> FrozenRecommender:
    own = {n: w.double() for n, w in prefixed(arrays, "w:kbrd.").items()}
    B, N, d = own["rgcn.basis"].shape
    R = len(own["rgcn.att"])
    edges = torch.cat([arrays["edge_index"], arrays["edge_type"][None]]).T
    index = EdgeIndex(edges, num_nodes=N, num_relations=R, normaliser=NORMALISERS["sum"])
    layer = RelationalGraphLayer(index, width=d, num_bases=B, initialise=initialise_uniform)
    model = Recommender(layer).double()
    graph = {f"graph.{name}": own[f"rgcn.{name}"] for name in ("att", "root", "bias")}
    graph["graph.basis"] = own["rgcn.basis"].transpose(0, 1)
    user = {f"user.{name}": own[f"self_attn.{name}"] for name in ("a", "b")}
    model.load_state_dict({**graph, **user, "output_bias": own["output.bias"]})
    return model.frozen()


def check_dialog(path: Path, arrays: Arrays, _: Path | None) -> None:
    model, settings = dialog_model(path, arrays)
    for side in ("source", "target"):
        table = getattr(model.transformer, side).positions.table
        name = f"const:{'encoder' if side == 'source' else 'decoder'}.position_embeddings.weight"
        close(table, arrays[name], EXACT, name)
    seeds = arrays["seed_flat"].split(arrays["seed_len"].tolist())
    nodes, mask = pad_nodes([seed.tolist() for seed in seeds])
    user, _weights = frozen_recommender(arrays).users(nodes, mask)
    close(user, arrays["user"], EXACT, "user")

    xs, ys = arrays["xs"], arrays["ys"]
    states, _mask = model.transformer.encode(xs)
    close(states, arrays["enc"], EXACT, "enc")
    assert torch.equal(xs != NULL, arrays["enc_mask"])
    written = torch.cat((torch.full((len(ys), 1), START), ys[:, :-1]), dim=1)
    logits = model(xs, written, user)
    close(logits, arrays["logits"], EXACT, "logits")
    close(model.bias(user), arrays["vocab_bias"], EXACT, "vocab_bias")
    assert torch.equal(model.bias(user).topk(10).indices, arrays["bias_top10"])

    losses = reply_loss(logits, ys, slot=UNK)
    close(losses.total, arrays["loss_sum"], EXACT, "loss_sum")
    assert losses.count == arrays["n_tokens"]
    real = ys != NULL
    assert (logits.argmax(dim=-1) == ys)[real].sum() == arrays["n_correct"]
    loss = losses.total / losses.count
    close(loss, arrays["loss"], EXACT, "loss")
    close(loss.exp(), arrays["ppl"], EXACT, "ppl")
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    layers = settings["opt"]["n_layers"]
    names = dialog_names(layers, layers)
    expected = {names[n]: g for n, g in prefixed(arrays, "g:").items()}
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        if name.endswith("k_proj.bias"):  # shifts all scores of a row alike: no gradient at all
            assert max(gradients[name].abs().max(), gradient.abs().max()) < 1e-15
        else:
            close(gradients[name], gradient, ROUNDED, f"g:{name}")
    check_searches(model, arrays, user.detach(), settings)


BEAM = re.compile(r"beam(\d+)_size(\d+)_min(\d+)_nbest(\d+)_block(\d+):tokens")


@torch.no_grad()
def check_searches(
    model: DialogModel, arrays: Arrays, user: Tensor, settings: dict[str, Any]
) -> None:
    def until_end(tokens: list[int]) -> list[int]:
        return tokens[: tokens.index(END) + 1] if END in tokens else tokens

    xs, greedy = arrays["xs"], arrays["greedy_tokens"]
    close(model(xs, greedy[:, :-1], user), arrays["greedy_logits"], EXACT, "greedy_logits")
    found = official_greedy(model, xs, user, limit=settings["greedy_maxlen"])
    assert found == [until_end(row) for row in greedy[:, 1:].tolist()]
    beams = {name: tuple(map(int, m.groups())) for name in arrays if (m := BEAM.fullmatch(name))}
    assert len(beams) == sum(name.startswith("beam") for name in arrays) / 2
    for name, (dialog, beam_size, min_length, min_n_best, block_ngram) in beams.items():
        options = {"beam_size": beam_size, "min_length": min_length, "min_n_best": min_n_best}
        found = official_beam(
            model, xs, user, limit=settings["max_ts"], block_ngram=block_ngram, **options
        )
        assert [START, *found[dialog].tokens.tolist()] == arrays[name].tolist(), name
        score = arrays[name.replace(":tokens", ":score")].item()
        assert found[dialog].score == pytest.approx(score, rel=EXACT), name


def check_dialog_settings(path: Path, data: dict[str, Any], _: Path | None) -> None:
    # The settings of the arrays beside it, whose test reads them.
    assert path.with_suffix(".npz").is_file()
    assert data["opt"]["n_entity"] > 0


def check_distinct(path: Path, data: dict[str, Any], _: Path | None) -> None:
    responses = [line.split() for line in data["lines"]]
    for n, expected in data["expected_official"].items():
        score = distinct_per_response(responses, int(n))
        assert score.value == pytest.approx(expected["per_response"], rel=1e-15)
        assert score.value * score.n == pytest.approx(expected["count"], rel=1e-15)
        ratio = distinct_n(responses, int(n))
        assert ratio.value == pytest.approx(data["also"][n]["ratio_over_ngrams"], rel=1e-15)
        assert ratio.n == data["also"][n]["total_ngrams"]


def check_edges(path: Path, data: dict[str, Any], _: Path | None) -> None:
    triples = [(int(head), r, tail) for head, known in data["kg"].items() for r, tail in known]
    edges, kept = edge_list(
        triples,
        num_nodes=data["n_entity"],
        self_loop=data["self_loop_relation"],
        threshold=data["threshold"],
    )
    assert edges.tolist() == data["expected_edges"]
    assert len(edges) == data["expected_n_edges"]
    assert len(kept) == data["expected_n_relation"]


def check_instances(path: Path, data: dict[str, Any], _: Path | None) -> None:
    nodes = data["uri_to_id"]
    node_of_item = {item: nodes[uri] for item, uri in data["movie_to_uri"].items() if uri in nodes}
    node_of_item |= data["unlinked_movie_to_id"]
    link = nodes_of(table_linker(data["text_entities"]), nodes)
    pairs = [
        pair
        for dialog in map(parse_dialog, data["dialogs"])
        for pair in turn_pairs(dialog, node_of_item, link, slot="__unk__")
    ]
    # As they are, and as the flat arrays of a part give them back.
    for found in (pairs, Part.of(pairs, lambda text: [])):
        records = [
            {
                "new_episode": pair.opens,
                "text": pair.text,
                "label": pair.label,
                "turn": pair.turn,
                "context_movies": list(pair.context_items),
                "target_movies": list(pair.targets),
                "context_entities": list(pair.context_entities),
            }
            for pair in found
        ]
        assert records == data["expected"]


Check = Callable[[Path, Any, Path | None], None]
# Names that a file of a kind has.
KINDS: dict[frozenset[str], Check] = {
    frozenset({"nodes", "upstream", "edge_type"}): check_graph_layer,
    frozenset({"seed_flat", "scores", "edge_type"}): check_recommender,
    frozenset({"log_probs", "x", "y"}): check_autorec,
    frozenset({"movie_ids", "scores", "labels"}): check_recall,
    frozenset({"kg", "expected_edges"}): check_edges,
    frozenset({"dialogs", "text_entities", "expected"}): check_instances,
    frozenset({"edges_sha256_int32_rows_sorted"}): check_real_graph,
    frozenset({"xs", "ys", "greedy_tokens", "vocab_bias"}): check_dialog,
    frozenset({"opt", "specials", "vocab"}): check_dialog_settings,
    frozenset({"lines", "expected_official"}): check_distinct,
}

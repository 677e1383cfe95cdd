"""The recommender of KBRD (Chen et al. 2019, arXiv:1908.05391, section 3), in the paper's order.

Shapes: N nodes of the knowledge graph, R relations, B bases of their weights, d numbers in the
vector of a node (the paper's embedding size), U users or turns, n mentioned nodes of a turn.
The dialog model of section 3.3 is in ``dialog.py``.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .edges import EdgeIndex
from .relational import Impl, relational_sum

GAIN = 1.414  # authors' code, of Xavier's initialisation in the self-attention


class RelationalGraphLayer(nn.Module):
    """One relational graph convolution of one-hot inputs: section 3.2, "knowledge graph".

    H[i] = sum_{(j, i, r)} c_{i,r} W_r[j] + root[i] + bias,  W_r[j] = sum_b att[r, b] basis[j, b].
    No input features and no activation, as in the authors' code; W_r is never written out.

    Args:
        edges: The graph, with the normaliser c.
        width: d.
        num_bases: B.
        initialise: Fills the four parameters.
        impl: What computes the sum; see ``relational_sum``.
    """

    def __init__(
        self,
        edges: EdgeIndex,
        *,
        width: int,
        num_bases: int,
        initialise: "Callable[[RelationalGraphLayer], None]",
        impl: Impl = "auto",
    ) -> None:
        super().__init__()
        self.edges = edges
        self.impl: Impl = impl
        self.basis = nn.Parameter(torch.empty(edges.num_nodes, num_bases, width))
        self.att = nn.Parameter(torch.empty(edges.num_relations, num_bases))
        self.root = nn.Parameter(torch.empty(edges.num_nodes, width))
        self.bias = nn.Parameter(torch.empty(width))
        initialise(self)

    def forward(self) -> Tensor:
        """Vectors of all nodes, (N, d)."""
        return relational_sum(
            self.basis, self.att, self.root, self.bias, self.edges, impl=self.impl
        )


def initialise_uniform(layer: RelationalGraphLayer) -> None:
    """Everything from U(-s, s), s = 1 / sqrt(B N): the library of 2019, behind the paper."""
    N, B, _ = layer.basis.shape
    bound = 1 / math.sqrt(B * N)
    for parameter in (layer.basis, layer.att, layer.root, layer.bias):
        nn.init.uniform_(parameter, -bound, bound)


def initialise_glorot(layer: RelationalGraphLayer) -> None:
    """Glorot's uniform over the last two dimensions of (B, N, d), (R, B) and (N, d), bias 0.

    What the same code gets from the library of today.
    """
    N, B, d = layer.basis.shape
    sizes = ((layer.basis, N + d), (layer.att, len(layer.att) + B), (layer.root, N + d))
    for parameter, fans in sizes:
        bound = math.sqrt(6 / fans)
        nn.init.uniform_(parameter, -bound, bound)
    nn.init.zeros_(layer.bias)


class UserVector(nn.Module):
    """Self-attentive pooling of the mentioned nodes: section 3.2.

    Args:
        width: d.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.empty(width, width))
        self.b = nn.Parameter(torch.empty(width, 1))
        for parameter in (self.a, self.b):
            nn.init.xavier_uniform_(parameter, gain=GAIN)

    def forward(self, h: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Pool the vectors of the mentioned nodes.

        Args:
            h: Vectors of the mentioned nodes, (U, n, d).
            mask: True where there is one, (U, n).

        Returns:
            Users (U, d) and attention weights (U, n). Where nothing is mentioned both are exactly
            zero; elsewhere the weights sum to one.
        """
        e = (torch.tanh(h @ self.a) @ self.b).squeeze(-1)  # (U, n)
        # A finite number, so that the gradient of a user without mentions is zero and not NaN.
        e = e.masked_fill(~mask, torch.finfo(e.dtype).min)
        w = e.softmax(dim=-1) * mask
        u = (w[:, None] @ h).squeeze(1)  # (U, d)
        return u, w


class Recommender(nn.Module):
    """Scores of all nodes for a user: section 3.2, "recommendation".

    Args:
        graph: Gives the vectors of all nodes.
    """

    def __init__(self, graph: RelationalGraphLayer) -> None:
        super().__init__()
        N, d = graph.root.shape
        self.graph = graph
        self.user = UserVector(d)
        # As the authors' output layer, of which only the bias is used.
        self.output_bias = nn.Parameter(torch.empty(N).uniform_(-(d**-0.5), d**-0.5))

    def forward(self, nodes: Tensor, mask: Tensor) -> Tensor:
        """Scores before the softmax over all nodes.

        Args:
            nodes: Mentioned nodes, (U, n); any node where ``mask`` is False.
            mask: True where a node is mentioned, (U, n).

        Returns:
            s = u H^T + o, (U, N).
        """
        H = self.graph()
        u, _ = self.user(H[nodes], mask)
        return torch.addmm(self.output_bias, u, H.T)

    @torch.no_grad()
    def frozen(self) -> "FrozenRecommender":
        """This recommender as it is now, with the vectors of all nodes computed once."""
        return FrozenRecommender(
            self.graph(), self.user.a.detach(), self.user.b.detach(), self.output_bias.detach()
        )


class FrozenRecommender(nn.Module):
    """A trained recommender without its graph: for evaluation, for serving, for the dialog model.

    Its tensors are buffers, so nothing trains them.

    Args:
        H: Vectors of all nodes, (N, d).
        a: Of the self-attention, (d, d).
        b: Of the self-attention, (d, 1).
        output_bias: o, (N).
    """

    H: Tensor
    output_bias: Tensor

    def __init__(self, H: Tensor, a: Tensor, b: Tensor, output_bias: Tensor) -> None:
        super().__init__()
        self.register_buffer("H", H)
        self.register_buffer("output_bias", output_bias)
        self.user = UserVector(H.shape[1])
        self.user.load_state_dict({"a": a, "b": b})
        self.user.to(H.dtype).requires_grad_(False)

    def users(self, nodes: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """User vectors (U, d) and weights of the mentioned nodes (U, n); see ``UserVector``."""
        found: tuple[Tensor, Tensor] = self.user(self.H[nodes], mask)
        return found

    def scores(self, u: Tensor, items: Tensor | None = None) -> Tensor:
        """Scores of these nodes for each user, (U, M); of all nodes without ``items`` (M)."""
        H = self.H if items is None else self.H[items]
        o = self.output_bias if items is None else self.output_bias[items]
        return torch.addmm(o, u, H.T)

    def forward(self, nodes: Tensor, mask: Tensor) -> Tensor:
        """Scores of all nodes, as those of ``Recommender``."""
        return self.scores(self.users(nodes, mask)[0])


def recommendation_loss(scores: Tensor, row: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of the instances, summed: a softmax over all nodes, films or not.

    Args:
        scores: (U, N).
        row: User of each instance, (I).
        target: Node that was recommended, (I).
    """
    # Several instances share the scores of a turn, so the rows are not copied for each.
    return (scores.logsumexp(dim=1)[row] - scores[row, target]).sum()


class AutoRec(nn.Module):
    """The recommender of ReDial (Li et al. 2018) in the authors' baseline: an autoencoder.

    Args:
        num_nodes: N.
        width: Hidden units.
    """

    def __init__(self, num_nodes: int, *, width: int) -> None:
        super().__init__()
        self.encoder = nn.Linear(num_nodes, width)
        self.decoder = nn.Linear(width, num_nodes)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of all nodes (U, N) from the mentioned films as ones in x (U, N)."""
        scores: Tensor = self.decoder(torch.sigmoid(self.encoder(x)))
        return scores

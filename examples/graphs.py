"""Batches that rows cannot cut: graphs of different sizes, shared out over towers by a ``scatter`` of one's own.

    python examples/graphs.py

A batch is a list of graphs. `GraphTowers` gives each tower some of them, joined into one graph; everything else is
`TowerParallel`'s: replicas in parallel, one fused reduction, one optimizer step. Programs that subclass nn.DataParallel
for such data keep their ``scatter`` as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchtower import TowerParallel


class Graph(NamedTuple):
    """One graph, or several joined; ``graph_of`` tells each node's."""

    nodes: Tensor  # [num_nodes, width]
    edges: Tensor  # [2, num_edges], from and to
    graph_of: Tensor  # [num_nodes]
    labels: Tensor  # [num_graphs]


def join(graphs: Sequence[Graph]) -> Graph:
    """Several graphs as one, with no edges between them."""
    sizes = torch.tensor([len(graph.nodes) for graph in graphs])
    starts = (sizes.cumsum(0) - sizes).tolist()
    return Graph(
        torch.cat([graph.nodes for graph in graphs]),
        torch.cat([graph.edges + start for graph, start in zip(graphs, starts, strict=True)], dim=1),
        torch.repeat_interleave(torch.arange(len(graphs)), sizes),
        torch.cat([graph.labels for graph in graphs]),
    )


class GraphTowers(TowerParallel):
    """Splits a list of graphs as evenly as nodes allow."""

    def scatter(self, inputs: Any, kwargs: Any, device_ids: Any) -> Any:
        """Each tower's inputs and keyword inputs, as ``nn.DataParallel.scatter`` returns them."""
        (graphs,) = inputs
        shares: list[list[Graph]] = [[] for _ in device_ids[: len(graphs)]]
        for graph in sorted(graphs, key=lambda graph: -len(graph.nodes)):
            min(shares, key=lambda share: sum(len(other.nodes) for other in share)).append(graph)
        return [(join(share),) for share in shares], [kwargs] * len(shares)


class GraphNet(nn.Module):
    """Two rounds of messages along the edges, then one score pair a graph."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.rounds = nn.ModuleList([nn.Linear(2 * width, width) for _ in range(2)])
        self.head = nn.Linear(width, 2)

    def forward(self, graph: Graph) -> Tensor:
        """Scores, ``[num_graphs, 2]``."""
        source, target = graph.edges
        state = graph.nodes
        for layer in self.rounds:
            messages = torch.zeros_like(state).index_add(0, target, state[source])
            state = torch.relu(layer(torch.cat([state, messages], dim=1)))
        pooled = state.new_zeros(len(graph.labels), state.shape[1]).index_add(0, graph.graph_of, state)
        scores: Tensor = self.head(pooled)
        return scores


def random_graph(width: int) -> Graph:
    """Of 4 to 20 nodes, labelled by whether the first features of the nodes that its edges come from add up above 0."""
    num_nodes = int(torch.randint(4, 21, ()))
    nodes, edges = torch.randn(num_nodes, width), torch.randint(num_nodes, (2, 3 * num_nodes))
    label = nodes[edges[0], 0].sum() > 0
    return Graph(nodes, edges, torch.zeros(num_nodes, dtype=torch.long), label.long()[None])


def loss_fn(replica: nn.Module, graph: Graph) -> tuple[Tensor, int]:
    """The mean over this tower's graphs, and their number: rows here are nodes, the wrong weight."""
    return F.cross_entropy(replica(graph), graph.labels), len(graph.labels)


def main() -> None:
    """Train on 400 graphs and print the accuracy on others."""
    torch.manual_seed(0)
    model = GraphTowers(GraphNet(8), device_ids=["cpu", "cpu"])
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    graphs, others = ([random_graph(8) for _ in range(400)] for _ in range(2))
    for epoch in range(20):
        for begin in range(0, len(graphs), 40):
            optimizer.zero_grad()
            loss = model.tower_loss(loss_fn, graphs[begin : begin + 40])
            loss.backward()
            optimizer.step()
        if epoch % 5 == 0:
            print(f"epoch {epoch:2}  loss {loss:.3f}")
    whole = join(others)
    accuracy = (model.module(whole).argmax(dim=1) == whole.labels).float().mean()
    print(f"accuracy on other graphs: {accuracy:.1%}")


if __name__ == "__main__":
    main()

"""The examples run as they stand and do what they say."""

import re
import runpy
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def test_the_example_of_the_tower_dimension_rejects_the_broken_tower(capsys):
    runpy.run_path(str(EXAMPLES / "average_gradients.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert re.findall(r"agree: (\[.*\])", printed) == ["[0, 1, 2]"] * 3
    assert float(re.search(r"labels: ([\d.]+)%", printed)[1]) > 95


def test_the_example_of_graphs_learns_and_gives_every_tower_a_fair_share(capsys):
    example = runpy.run_path(str(EXAMPLES / "graphs.py"), run_name="__main__")
    assert float(re.search(r"graphs: ([\d.]+)%", capsys.readouterr().out)[1]) > 80
    model = example["GraphTowers"](example["GraphNet"](8).double(), device_ids=["cpu"] * 3)
    graphs = [graph._replace(nodes=graph.nodes.double()) for graph in (example["random_graph"](8) for _ in range(9))]
    model.tower_loss(example["loss_fn"], graphs).backward()
    grads = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    loss, _ = example["loss_fn"](model.module, example["join"](graphs))
    loss.backward()
    for ours, parameter in zip(grads, model.parameters(), strict=True):
        torch.testing.assert_close(ours, parameter.grad, rtol=1e-10, atol=1e-12)
    (shares, _) = model.scatter((graphs,), {}, model.device_ids)
    nodes = [len(graph.nodes) for (graph,) in shares]
    assert sum(nodes) == sum(len(graph.nodes) for graph in graphs) and max(nodes) - min(nodes) <= 20


def test_no_example_is_left_untested():
    assert [path.name for path in sorted(EXAMPLES.glob("*.py"))] == ["average_gradients.py", "graphs.py"]


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_an_example_opens_with_the_command_that_runs_it(path):
    assert f"python examples/{path.name}" in path.read_text().split('"""')[1]

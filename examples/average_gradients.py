"""The tower dimension in hand: look at every tower's gradients, reject one, average the others.

    python examples/average_gradients.py

Four towers share a batch; one of them has broken labels. Each takes the gradients of its own loss, in parallel, and
leaves them with its number of rows. The broken tower's disagree with the others', which `stack_gradients` lets one see,
and a weight of 0 keeps them out of the mean, in which the others count by their rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from torchtower import TowerParallel, average_gradients, current_tower, stack_gradients

NUM_TOWERS = 4
TowerGrads = list[list[tuple[torch.Tensor, nn.Parameter]]]


def agreement(tower_grads: TowerGrads) -> torch.Tensor:
    """Each tower's cosine to the median of all towers. Shape: ``[num_towers]``."""
    stacked = [grad.flatten(1) for grad, _ in stack_gradients(tower_grads)]  # each [num_towers, numel]
    whole = torch.cat(stacked, dim=1)
    return F.cosine_similarity(whole, whole.median(dim=0).values, dim=1)


def main() -> None:
    """Train for 30 steps and print what was seen."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 2))
    model = TowerParallel(net, device_ids=["cpu"] * NUM_TOWERS)
    params = list(net.parameters())
    optimizer = torch.optim.SGD(params, lr=0.5)
    inputs = torch.randn(256, 10)
    labels = (inputs.sum(dim=1) > 0).long()
    noisy = labels.clone()
    noisy[192:] = 1 - noisy[192:]  # the last tower's rows are labelled wrongly
    taken: dict[int, tuple[list[tuple[torch.Tensor, nn.Parameter]], int]] = {}

    def loss_fn(replica: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        loss = F.cross_entropy(replica(x), y)
        grads = torch.autograd.grad(loss, list(replica.parameters()))  # in the order of net's parameters
        taken[current_tower() or 0] = list(zip(grads, params, strict=True)), len(x)
        return loss.detach()  # its gradients have been taken

    for step in range(30):
        taken.clear()  # a batch of fewer rows than towers leaves the last ones idle: none may keep its last gradients
        model.tower_loss(loss_fn, inputs, noisy)
        in_order = [taken[tower] for tower in sorted(taken)]
        tower_grads = [grads for grads, _ in in_order]
        rows = torch.tensor([num_rows for _, num_rows in in_order])
        agrees = agreement(tower_grads) > 0
        for mean, param in average_gradients(tower_grads, weights=(rows * agrees).tolist()):
            param.grad = mean
        optimizer.step()
        if step % 10 == 0:
            print(f"step {step:2}  towers that agree: {agrees.nonzero().flatten().tolist()}")
    accuracy = (net(inputs).argmax(dim=1) == labels).float().mean()
    print(f"accuracy on the true labels: {accuracy:.1%}")


if __name__ == "__main__":
    main()

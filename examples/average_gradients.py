"""The tower dimension by hand: look at every tower's gradients, reject one, average the others.

    python examples/average_gradients.py

Four towers share a batch; one of them has broken labels. Its gradients disagree with the others', which
`stack_gradients` lets one see, and a weight of 0 keeps them out of the mean.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from torchtower import average_gradients, stack_gradients

NUM_TOWERS = 4


def disagreement(tower_grads: list[list[tuple[torch.Tensor, nn.Parameter]]]) -> torch.Tensor:
    """Each tower's cosine to the median of all towers. Shape: ``[num_towers]``."""
    stacked = [grad.flatten(1) for grad, _ in stack_gradients(tower_grads)]  # each [num_towers, numel]
    whole = torch.cat(stacked, dim=1)
    return F.cosine_similarity(whole, whole.median(dim=0).values, dim=1)


def main() -> None:
    """Train for 30 steps and print what was seen."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 2))
    params = list(net.parameters())
    optimizer = torch.optim.SGD(params, lr=0.5)
    inputs = torch.randn(256, 10)
    labels = (inputs.sum(dim=1) > 0).long()
    noisy = labels.clone()
    noisy[192:] = 1 - noisy[192:]  # the last tower's rows are labelled wrongly
    for step in range(30):
        tower_grads = []
        for x, y in zip(inputs.chunk(NUM_TOWERS), noisy.chunk(NUM_TOWERS), strict=True):
            loss = F.cross_entropy(net(x), y)
            tower_grads.append(list(zip(torch.autograd.grad(loss, params), params, strict=True)))
        agrees = disagreement(tower_grads) > 0
        for mean, param in average_gradients(tower_grads, weights=agrees.float().tolist()):
            param.grad = mean
        optimizer.step()
        if step % 10 == 0:
            print(f"step {step:2}  towers that agree: {agrees.nonzero().flatten().tolist()}")
    accuracy = (net(inputs).argmax(dim=1) == labels).float().mean()
    print(f"accuracy on the true labels: {accuracy:.1%}")


if __name__ == "__main__":
    main()

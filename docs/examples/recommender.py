# SPDX-License-Identifier: Apache-2.0
"""A recommender whose layers the compiler backend fuses: the model is plain torch. Some seconds on a CPU."""

import torch
from torch import Tensor, nn

from perceptriton.mlp.backend import explain


class Recommender(nn.Module):
    """Two embeddings, a gate, a tower: the layers stand in a forward of their own, not in an nn.Sequential."""

    def __init__(self, users: int, items: int, width: int = 16) -> None:
        super().__init__()
        self.user, self.item = nn.Embedding(users, width), nn.Embedding(items, width)
        self.gate = nn.Linear(2 * width, 2 * width)
        self.first, self.second, self.score = nn.Linear(2 * width, 64), nn.Linear(64, 32), nn.Linear(32, 1)

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        x = torch.cat([self.user(user), self.item(item)], 1)
        x = x * torch.sigmoid(self.gate(x))
        return self.score(torch.relu(self.second(torch.relu(self.first(x))))).squeeze(1)


def main(steps: int = 300, inner: str = "inductor") -> tuple[float, float]:
    """Trains on made-up clicks; returns the losses at the start and at the end."""
    torch.manual_seed(0)
    taste, kind = torch.randn(200, 4), torch.randn(300, 4)  # who likes what
    user, item = torch.randint(200, (8192,)), torch.randint(300, (8192,))
    click = ((taste[user] * kind[item]).sum(1) > 0).float()

    model = Recommender(200, 300)
    print(*explain(model, user[:512], item[:512]), sep="\n")  # what becomes of each Linear, and why
    compiled = torch.compile(model, backend="perceptriton", options={"backend": inner})
    adam = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = []
    for step in range(steps):
        batch = torch.arange(512) + 512 * (step % 16)
        loss = nn.functional.binary_cross_entropy_with_logits(compiled(user[batch], item[batch]), click[batch])
        adam.zero_grad()
        loss.backward()
        adam.step()
        losses.append(loss.item())
    print(f"loss: {losses[0]:.3f} at the start, {losses[-1]:.3f} at the end")
    return losses[0], losses[-1]


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""Models as people write them, fused in the middle of their training: nobody can tell."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from perceptriton.mlp import fuse_, unfuse_

pytestmark = pytest.mark.usefixtures("one_thread")


class VggHead(nn.Module):
    """The classifier of torchvision's VGG, which drops half of the units while it trains."""

    def __init__(self):
        super().__init__()
        self.classifier = nn.Sequential(
            nn.Linear(512, 256),
            nn.ReLU(True),
            nn.Dropout(),
            nn.Linear(256, 256),
            nn.ReLU(True),
            nn.Dropout(),
            nn.Linear(256, 10),
        )

    def forward(self, x):
        return self.classifier(torch.flatten(x, 1))

    def loss(self, x):
        return F.cross_entropy(self(x), x.flatten(1).argmax(1) % 10)


class ActorCritic(nn.Module):
    """A policy and its critic on a shared body, as PPO and A2C have them: two results."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh())
        self.actor, self.critic = nn.Linear(64, 2), nn.Linear(64, 1)

    def forward(self, x):
        h = self.body(x)
        return self.actor(h), self.critic(h).squeeze(-1)

    def act(self, x):
        """(log-probability of the action drawn, its reward, value, entropy): right is 1 where the first input is > 0"""
        logits, value = self(x)
        policy = torch.distributions.Categorical(logits=logits)
        action = policy.sample()
        return policy.log_prob(action), (action == (x[:, 0] > 0)).float(), value, policy.entropy()

    def loss(self, x):
        # REINFORCE with a baseline
        log_p, reward, value, entropy = self.act(x)
        advantage = (reward - value).detach()
        return -(log_p * advantage).mean() + F.mse_loss(value, reward) - 0.01 * entropy.mean()


class Gates(nn.Module):
    """Experts, each behind a sigmoid gate of its own, and a sigmoid head per task."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(8, 16) for _ in range(3)])
        self.gates = nn.ModuleList([nn.Linear(8, 16) for _ in range(3)])
        self.opened = nn.ModuleList([nn.Sigmoid() for _ in range(3)])
        self.heads = nn.ModuleDict(
            {task: nn.Sequential(nn.Linear(16, 1), nn.Sigmoid()) for task in ("click", "buy", "stay")}
        )

    def forward(self, x):
        mixed = sum(
            act(gate(x)) * expert(x) for act, gate, expert in zip(self.opened, self.gates, self.experts, strict=True)
        )
        return torch.cat([head(mixed) for head in self.heads.values()], 1)

    def loss(self, x):
        return F.binary_cross_entropy(self(x), (x[:, :3] > 0).float())


MODELS = {
    "vgg-head": (VggHead, (64, 8, 8, 8), ["classifier.0", "classifier.3"]),
    "actor-critic": (ActorCritic, (64, 4), ["body.0", "body.2"]),
    "gates": (Gates, (64, 8), [f"heads.{task}.0" for task in ("click", "buy", "stay")]),
}


def step(model, optimizer, x, seed):
    """The loss and the gradient of each parameter, before the optimizer's step. seed: of what the model draws."""
    torch.manual_seed(seed)
    optimizer.zero_grad()
    loss = model.loss(x)
    loss.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    optimizer.step()
    return [loss.detach(), *gradients]


def train(model, x, steps):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return [step(model, optimizer, x, seed) for seed in range(steps)]


@pytest.mark.parametrize(("make", "shape", "names"), MODELS.values(), ids=MODELS)
def test_training_does_not_notice(make, shape, names):
    model, x = make(), torch.randn(shape)
    twin = copy.deepcopy(model)
    expected = train(twin, x, 6)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for seed, results in enumerate(expected):
        if seed == 2:
            assert sorted(fuse_(model)) == sorted(names)
        if seed == 4:
            assert sorted(unfuse_(model)) == sorted(names)
        torch.testing.assert_close(step(model, optimizer, x, seed), results)
        assert all(gradient.norm() > 0 for gradient in results[1:])
    assert expected[-1][0] < expected[0][0]
    torch.testing.assert_close(list(model.parameters()), list(twin.parameters()))


@pytest.mark.parametrize("direction", ["into-fused", "out-of-fused"])
@pytest.mark.parametrize(("make", "shape", "names"), MODELS.values(), ids=MODELS)
def test_a_checkpoint_resumes_on_the_other_side(make, shape, names, direction):
    first, second, x = make(), make(), torch.randn(shape)
    fuse_(first if direction == "out-of-fused" else second)
    train(first, x, 2)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True), strict=True)
    torch.testing.assert_close(second.eval()(x), first.eval()(x))
    torch.testing.assert_close(train(second.train(), x, 2), train(first.train(), x, 2))


def test_dropout_draws_the_same_units():
    model, x = VggHead(), torch.randn(64, 512)
    torch.manual_seed(3)
    before = model(x)
    fuse_(model)
    torch.manual_seed(3)
    torch.testing.assert_close(model(x), before)
    torch.manual_seed(4)
    assert (model(x) - before).norm() > 0.1 * before.norm()
    assert (model.eval()(x) - before).norm() > 0.1 * before.norm()


def test_a_fused_policy_learns():
    model = ActorCritic()
    fuse_(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    reward = [model.act(torch.randn(1000, 4))[1].mean().item()]
    for seed in range(100):
        step(model, optimizer, torch.randn(64, 4), seed)
    reward.append(model.act(torch.randn(1000, 4))[1].mean().item())
    assert reward[0] < 0.7
    assert reward[1] > 0.9

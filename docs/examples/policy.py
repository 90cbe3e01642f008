# SPDX-License-Identifier: Apache-2.0
"""A policy that learns to balance a pole, with environment and policy gradient written out. A few seconds on a CPU."""

import torch
from torch import Tensor

from perceptriton.mlp import MLP

GRAVITY, POLE, MASS, CART, FORCE, TICK = 9.8, 0.5, 0.1, 1.0, 10.0, 0.02


class Carts:
    """Many carts with a pole on each, as gymnasium's CartPole-v1 has one: `reset` and `step`, in tensors."""

    def __init__(self, number: int, generator: torch.Generator) -> None:
        self.number, self.generator = number, generator

    def reset(self) -> Tensor:
        self.state = torch.rand(self.number, 4, generator=self.generator) * 0.1 - 0.05
        self.upright = torch.ones(self.number, dtype=torch.bool)
        return self.state

    def step(self, action: Tensor) -> tuple[Tensor, Tensor, bool]:
        """action (number,) of 0 and 1 -> (what is seen, the reward of each cart, whether all poles have fallen)"""
        x, speed, angle, turn = self.state.unbind(1)
        force, total = FORCE * (2 * action - 1), MASS + CART
        push = (force + MASS * POLE * turn**2 * angle.sin()) / total
        angular = GRAVITY * angle.sin() - angle.cos() * push
        angular = angular / (POLE * (4 / 3 - MASS * angle.cos() ** 2 / total))
        forward = push - MASS * POLE * angular * angle.cos() / total
        self.state = torch.stack(
            [x + TICK * speed, speed + TICK * forward, angle + TICK * turn, turn + TICK * angular], 1
        )
        reward = self.upright.float()  # one for each tick until the pole falls
        self.upright = self.upright & (self.state[:, 0].abs() < 2.4) & (self.state[:, 2].abs() < 0.2095)
        return self.state, reward, not self.upright.any()


def episode(policy: MLP, carts: Carts, ticks: int) -> tuple[Tensor, Tensor]:
    """The log-probability of each action taken, and the reward that followed: (ticks, carts) each."""
    seen, logs, rewards = carts.reset(), [], []
    for _ in range(ticks):
        odds = policy(seen).log_softmax(1)  # one fused call for all carts
        action = torch.multinomial(odds.detach().exp(), 1, generator=carts.generator)
        seen, reward, over = carts.step(action.squeeze(1))
        logs.append(odds.gather(1, action).squeeze(1))
        rewards.append(reward)
        if over:
            break
    return torch.stack(logs), torch.stack(rewards)


def main(rounds: int = 40, carts: int = 64, ticks: int = 200) -> list[float]:
    """Trains a policy; returns how many ticks the poles stayed up, on average, in each round."""
    torch.manual_seed(0)
    policy = MLP([4, 32, 32, 2], activation="tanh", output_activation="identity")
    adam = torch.optim.Adam(policy.parameters(), lr=0.02)
    world = Carts(carts, torch.Generator().manual_seed(1))
    lengths = []
    for number in range(rounds):
        logs, rewards = episode(policy, world, ticks)
        to_come = rewards.flip(0).cumsum(0).flip(0)
        alive = rewards > 0
        gain = torch.where(alive, to_come - to_come[alive].mean(), 0) / to_come[alive].std()
        loss = -(logs * gain).sum() / alive.sum()
        adam.zero_grad()
        loss.backward()
        adam.step()
        lengths.append(rewards.sum(0).mean().item())
        if number % 10 == 9:
            print(f"round {number + 1:3}: the poles stay up for {lengths[-1]:5.1f} of {ticks} ticks")
    return lengths


if __name__ == "__main__":
    main()

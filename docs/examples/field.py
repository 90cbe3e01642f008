# SPDX-License-Identifier: Apache-2.0
"""A neural field: a small network becomes an image, given as brightness at places. A few seconds on a CPU."""

import math

import torch
from torch import Tensor

from perceptriton.mlp import MLP, fit


def picture(size: int) -> tuple[Tensor, Tensor]:
    """Places (size * size, 2) in [-1, 1], and the brightness of a made-up image there, (size * size, 1)."""
    axis = torch.linspace(-1, 1, size)
    places = torch.cartesian_prod(axis, axis)
    radius = places.norm(dim=1)
    brightness = 0.5 + 0.4 * torch.sin(9 * radius) * torch.cos(4 * torch.atan2(places[:, 1], places[:, 0]))
    return places, brightness.unsqueeze(1)


def features(places: Tensor, octaves: int = 4) -> Tensor:
    """Sines and cosines of rising frequency: without them a small network blurs what is fine."""
    angles = torch.cat([math.pi * 2**octave * places for octave in range(octaves)], 1)
    return torch.cat([places, angles.sin(), angles.cos()], 1)


def main(size: int = 64, steps: int = 1000) -> float:
    """Trains the field on a random half of the places; returns the signal-to-noise ratio at the others, in dB."""
    torch.manual_seed(0)
    places, brightness = picture(size)
    x = features(places)
    field = MLP([x.shape[1], 64, 64, 1], activation="tanh", output_activation="sigmoid")
    adam = torch.optim.Adam(field.parameters(), lr=0.003)
    known = torch.rand(len(x)) < 0.5
    history = fit(
        field, x[known], brightness[known], criterion=torch.nn.MSELoss(), optimizer=adam, steps=steps, batch_size=256
    )
    with torch.no_grad():
        error = (field(x[~known]) - brightness[~known]).square().mean().item()
    ratio = -10 * math.log10(error)
    print(f"{ratio:.1f} dB at places that it has not seen; {history.seconds:.1f} s, path {history.path}")
    return ratio


if __name__ == "__main__":
    main()

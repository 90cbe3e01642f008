# SPDX-License-Identifier: Apache-2.0
"""What a lesson is to the command line."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .pictures import Figure
from .text import View, training_report
from .values import Result


@dataclass(frozen=True)
class Count:
    """An argument of a lesson that is a whole number from 1 on."""

    name: str
    default: int
    summary: str = "training steps"
    choices: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Lesson:
    """A lesson's function, its words and its picture."""

    name: str
    summary: str
    run: Callable[..., Result]  # takes a device, the counts and, if there are any, whether to show its progress
    intro: Callable[..., str]  # takes the counts and says what the lesson teaches
    report: Callable[[Any, View], str] = training_report  # takes the result and what the reader wants to see of it
    counts: tuple[Count, ...] = ()
    plot: Callable[[Any], tuple[Figure, Any]] | None = None  # takes the result; returns the figure and the data in it
    picture: str = "the loss and the decision surface"

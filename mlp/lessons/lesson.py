"""What a lesson is to the command line."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .pictures import Figure
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
    intro: Callable[..., str]  # of the counts: what the lesson teaches
    report: Callable[[Any], str]  # of the result
    counts: tuple[Count, ...] = ()
    plot: Callable[[Any], tuple[Figure, Any]] | None = None  # of the result: the figure, and the data in it
    picture: str = ""  # what the figure shows

"""Whoever is thrown out of a world keeps nothing of it, so that its sockets close."""

from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

from elastic.training.ports import Broken, World

S = TypeVar("S")
P = ParamSpec("P")
R = TypeVar("R")


def lets_go(work: Callable[Concatenate[S, World, P], R]) -> Callable[Concatenate[S, World, P], R]:
    """Make a method that works in a world raise Broken anew: its traceback holds neither the world nor the
    frames in which it broke.
    """

    @wraps(work)
    def bare(self: S, world: World, /, *arguments: P.args, **options: P.kwargs) -> R:
        try:
            return work(self, world, *arguments, **options)
        except Broken as broken:
            generation, why = broken.generation, broken.why
        del world, arguments, options
        raise Broken(generation, why)

    return bare

"""Where something lies in a nested state, so that it can be put there again.

A spot has a step for each container, from the outermost to the innermost: a text is the key of a dict, a
number the place in a list, and a list of one number a dict's key that is a number. It is plain data.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

from checkpoint.errors import Unsupported

Step = str | int | list[int]
Spot = Sequence[Step]

_MAX_PLACE = 1 << 20


def step_of(key: Any) -> Step:
    """Return the step that the key of a dict is."""
    return [key] if type(key) is int else str(key)


def steps_into(node: Any) -> Iterator[tuple[Step, Any]]:
    """Yield what a container holds, with the step that leads there; nothing for what is no container."""
    if isinstance(node, dict):
        for key, item in node.items():
            yield step_of(key), item
    elif isinstance(node, list | tuple):
        yield from enumerate(node)


def spelled(spot: Spot) -> str:
    """Return a spot as a name, its steps joined by dots."""
    return ".".join(str(step[0] if isinstance(step, list) else step) for step in spot)


def is_told_by_name(spot: Spot) -> bool:
    """Whether the name alone tells the spot: all steps are texts without dots."""
    return all(isinstance(step, str) and "." not in step for step in spot)


def is_spot(told: Any) -> bool:
    """Whether plain data are a spot."""
    return isinstance(told, list) and all(
        isinstance(step, str)
        or type(step) is int
        or (isinstance(step, list) and len(step) == 1 and type(step[0]) is int)
        for step in told
    )


def put(root: dict[Any, Any], spot: Spot, item: Any) -> None:
    """Put something into its spot, in containers that are made as needed.

    What a dict holds goes beside what is there. In a list None is a place that is free. Raises Unsupported.
    """
    if isinstance(item, dict):
        node = _container(root, [*spot, ""])
        entries = [([key] if type(key) is int else key, value) for key, value in item.items()]
    else:
        node = _container(root, spot)
        entries = [(spot[-1], item)]
    for step, value in entries:
        key = _key(node, step)
        if node[key] is not None if isinstance(node, list) else key in node:
            raise Unsupported(f"there are two things at {spelled([*spot[: len(spot) - 1], step])}")
        node[key] = value


def _container(root: dict[Any, Any], spot: Spot) -> Any:
    """Return the container that the last step of a spot leads into."""
    node: Any = root
    for step, inner in pairwise(spot):
        key = _key(node, step)
        if isinstance(node, list):
            node[key] = _made_for(inner) if node[key] is None else node[key]
        else:
            node.setdefault(key, _made_for(inner))
        node = node[key]
        if not isinstance(node, dict | list):
            raise Unsupported(f"nothing can be put into {spelled([step])!r}: it is no container")
    return node


def _made_for(step: Step) -> Any:
    return [] if isinstance(step, int) else {}


def _key(node: Any, step: Step) -> Any:
    """Return the key that a step means; a list is made long enough."""
    if isinstance(node, list):
        if not isinstance(step, int) or not 0 <= step < _MAX_PLACE:
            raise Unsupported(f"a list has no place {spelled([step])!r}")
        node.extend([None] * (step + 1 - len(node)))
    return step[0] if isinstance(step, list) else step

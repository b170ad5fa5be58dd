"""Training states as torch programs nest them: which leaves are weights, which an optimizer's, which neither.

The same for files of torch.save and for torch's distributed checkpoints, once their keys are a tree again.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from checkpoint.errors import Corrupt, Unsupported
from checkpoint.interop.formats.containers import CONTAINERS, RESERVED, Containers
from checkpoint.interop.formats.contract import weight_name
from checkpoint.interop.formats.inert import plain
from checkpoint.interop.formats.numbered import Untold, listed, names_of_numbered
from checkpoint.interop.formats.optimizer_dicts import (
    Keys,
    is_optimizer,
    keys_of,
    numbered,
    optimizers_of,
    optimizers_within,
    params_of,
    unflattened,
)
from checkpoint.interop.formats.spots import Spot, Step, is_told_by_name, spelled, step_of, steps_into

MODELS = (
    *("model", "state_dict", "model_state_dict", "model_state", "module", "net", "network", "weights"),
    "params",
)
_STEPS = ("step", "global_step", "iteration", "num_steps", "train_step", "global_steps")
_MAX_DEPTH = 60
_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
_DISTRIBUTED = "module."
_MAX_SETS = 3


@dataclass(slots=True)
class States:
    """A state by the names of the contract: tensors, and everything else as plain data.

    `extra["containers"]` says where the model, the optimizer and other things were, so that they can be put
    there again (`nesting.nest`); `extra["optimizer"]` has the parameter groups, by the names of parameters.
    `keys` is what the optimizer calls them, if there is one; `untold` why it cannot be told whose its states
    are, which are kept as they are then.
    """

    tensors: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    doubts: list[tuple[str, ...]] = field(default_factory=list)
    keys: Keys | None = None
    untold: str = ""

    @property
    def step(self) -> int | None:
        """The step that it says it is of, if it does."""
        found = [self.extra[name] for name in _STEPS if type(self.extra.get(name)) is int]
        return found[0] if found and found[0] >= 0 else None


def name_states(tree: Any, leaf: type, where: str) -> States:
    """Give the leaves of a nested state their names; `leaf` is the class of its tensors.

    Raises Corrupt for two tensors of one name, Unsupported if it cannot be told whose an optimizer's states
    are.
    """
    if isinstance(tree, leaf):
        tree = {"tensor": tree}
    if not isinstance(tree, dict):
        raise Unsupported(f"{where} holds a {type(tree).__name__}, not a state by name: save a state_dict")
    return _Naming(leaf, where).name(numbered(tree))


class _Naming:
    def __init__(self, leaf: type, where: str) -> None:
        self._leaf, self._where = leaf, where
        self._states = States()
        self._told = Containers()

    def name(self, tree: dict[Any, Any]) -> States:
        if is_optimizer(tree):
            self._states.notes.append("it is an optimizer's state alone, which is kept as it is")
            self._rest(tree, set(), [])
            self._told.model = []
            self._states.extra[CONTAINERS] = self._told.told()
            return self._states
        root, place = self._root(tree)
        found = optimizers_of(root)
        optimizers = {spelled(spot[:1]): node for spot, node in found}
        model_key = self._model_key(root, optimizers)
        model = root[model_key] if model_key is not None else self._loose(root, optimizers)
        self._told.model = [*place, step_of(model_key)] if model_key is not None else [*place]
        names = self._put_model(model, self._told.model)
        taken = {str(model_key)} if model_key is not None else {str(key) for key in model}
        if len(found) == 1 and self._has_told_optimizer(found[0][1], names):
            self._told.optimizer = [*place, *found[0][0]]
            taken |= optimizers.keys()
        elif found:
            taken |= self._keep_apart(found, place)
        self._rest(root, taken, place)
        for key, node in model.items() if model_key is None else [(model_key, model)]:
            beside = self._without_leaves(node)
            if isinstance(beside, dict) and beside:
                self._keep(beside, [*place, step_of(key)])
        self._states.extra[CONTAINERS] = self._told.told()
        return self._states

    def _root(self, tree: dict[Any, Any]) -> tuple[dict[Any, Any], list[Step]]:
        """Return the level at which model and optimizer lie beside each other, and where it is."""
        node, place = tree, list[Step]()
        above: list[tuple[dict[Any, Any], list[Step]]] = []
        while not any(is_optimizer(item) or key in MODELS for key, item in node.items()):
            below = [key for key, item in node.items() if isinstance(item, dict) and _has_container(item)]
            if len(below) != 1 or len(place) >= _MAX_DEPTH:
                return tree, []
            above.append(({key: item for key, item in node.items() if key != below[0]}, [*place]))
            place.append(step_of(below[0]))
            node = node[below[0]]
        for rest, outer in above:
            self._rest(rest, set(), outer)
        return node, place

    def _has_told_optimizer(self, node: dict[Any, Any], names: Mapping[str, str]) -> bool:
        """Take in the optimizer, if it can be told whose its states are."""
        try:
            self._put_optimizer(node, names)
        except Untold as reason:
            self._states.untold = str(reason)
        return not self._states.untold

    def _keep_apart(self, found: Sequence[tuple[list[Step], Any]], place: list[Step]) -> set[str]:
        """Take in several optimizers as they are. Returns the keys of those that are no list's."""
        self._note_apart([spot for spot, _ in found])
        apart = set()
        for spot, node in found:
            if len(spot) == 1:
                key = spelled(spot)
                for below, leaf in self._leaves(node, [*place, *spot]):
                    name = f"other.{spelled(below[len(place) :])}"
                    self._put(name, leaf)
                    self._told.spots[name] = below
                data = self._without_leaves(node)
                self._told.kept[key] = {} if data is _NOTHING else self._plain(data)
                self._told.placed[key] = [*place, *spot]
                apart.add(key)
        return apart

    def _note_apart(self, spots: Sequence[Spot]) -> None:
        names = listed([*map(spelled, spots)])
        self._states.notes.append(
            self._states.untold
            or f"there are several optimizers, {names}: they are kept as they are, and written to torch and "
            "dcp as they were; rules, layouts and other formats know none of them"
        )

    def _model_key(self, root: dict[Any, Any], optimizers: Mapping[str, Any]) -> Any:
        """Return under which key the model lies; None if its tensors lie at the root."""
        holding = [
            key
            for key, node in root.items()
            if str(key) not in optimizers and isinstance(node, dict) and any(self._leaves(node))
        ]
        known = [key for key in MODELS if key in holding]
        if known:
            return known[0]
        has_loose = any(isinstance(node, self._leaf) for node in root.values())
        return holding[0] if optimizers and not has_loose and len(holding) == 1 else None

    def _loose(self, root: dict[Any, Any], optimizers: Mapping[str, Any]) -> dict[Any, Any]:
        """Return the model of a state whose root it is; beside an optimizer, only tensors at the root."""
        return {
            key: node
            for key, node in root.items()
            if isinstance(node, self._leaf)
            or (not optimizers and isinstance(node, dict) and any(self._leaves(node)))
        }

    def _put_model(self, model: Any, container: Sequence[Step]) -> dict[str, str]:
        """Take in the model's tensors. Returns what each is called, by what the file calls it."""
        found: dict[str, Any] = {}
        paths: dict[str, list[Step]] = {}
        apart = optimizers_within(model)
        if apart:
            self._note_apart(apart)
        for path, item in self._leaves(model):
            if any(path[: len(spot)] == spot for spot in apart):
                self._put_other(f"other.{spelled(path)}", [*container, *path], item)
                continue
            if (name := spelled(path)) in found:
                raise self._doubled(name)
            found[name], paths[name] = item, path
        names = _unwrapped(found)
        if any(name != given for given, name in names.items()):
            self._states.notes.append(
                "prefixes of wrappers (DDP, FSDP, torch.compile) were left out of names"
            )
        for given, item in found.items():
            self._put(weight_name(names[given], self._where), item)
            if names[given] == given and paths[given] != [given]:
                self._told.spots[given] = [*container, *paths[given]]
        return names

    def _put_optimizer(self, node: dict[Any, Any], names: Mapping[str, str]) -> None:
        self._states.keys = keys_of(node)
        if self._states.keys is Keys.FLAT:
            node = unflattened(node)
        state, groups = node.get("state", {}), node.get("param_groups", [])
        if not isinstance(state, dict) or not isinstance(groups, list):
            raise Corrupt(
                f"the optimizer of {self._where} is none: its state is no dict, or its groups no list"
            )
        called: dict[Any, str] = dict(names)
        if self._states.keys is Keys.NUMBERS:
            called |= self._named(state, groups, names)
        for key, entries in state.items():
            owner = called.get(key, str(key))
            for kind, item in entries.items() if isinstance(entries, dict) else [("state", entries)]:
                self._put_state(str(kind), owner, item)
        said = self._states.extra.setdefault("optimizer", {"param_groups": []})
        for key, item in node.items():
            if key not in ("state", "param_groups"):
                self._put_beside(said, str(key), item)
        kept = said["param_groups"]
        for group in groups:
            named = [called.get(each, each) for each in params_of(group)]
            rest = {key: item for key, item in group.items() if key not in ("params", "param_names")}
            kept.append({**self._plain(rest), "params": named})

    def _put_beside(self, said: dict[str, Any], key: str, item: Any) -> None:
        """Take in what an optimizer says beside its states and groups, such as a scaler."""
        for spot, each in self._leaves(item, [key]):
            self._put_inside(spot, each)
        data = self._without_leaves(item)
        if data is not _NOTHING:
            said[key] = self._plain(data)

    def _put_inside(self, spot: list[Step], item: Any) -> None:
        name = f"other.optimizer.{spelled(spot)}"
        self._put(name, item)
        self._told.inside[name] = spot

    def _put_other(self, name: str, spot: list[Step], item: Any) -> None:
        self._put(name, item)
        if spelled(spot) != name.removeprefix("other.") or not is_told_by_name(spot):
            self._told.spots[name] = spot

    def _named(
        self, state: Mapping[Any, Any], groups: list[Any], names: Mapping[str, str]
    ) -> Mapping[int, str]:
        """Return the names of numbered parameters, and note what was concluded."""
        model = {name: self._states.tensors[name] for name in names.values()}
        found = names_of_numbered(state, groups, model, self._leaf, self._where)
        self._states.doubts += found.doubts
        if found.unnumbered:
            self._states.notes.append(
                "taken for buffers, or weights that are not trained, as the optimizer has no place for them: "
                + listed(found.unnumbered)
            )
        if found.doubts:
            self._states.notes.append(
                "optimizer states are given to parameters in the model's order; of equal shape, and not told "
                f"apart by anything else, are {'; '.join(map(listed, found.doubts[:_MAX_SETS]))}"
            )
        return _called(found.names, names)

    def _put_state(self, kind: str, owner: str, item: Any) -> None:
        if "." in kind or "/" in kind:
            raise Unsupported(
                f"{self._where} has an optimizer state {kind!r}, whose name has a '.' or '/' in it, by which "
                "states are told from parameters: rename it there"
            )
        if isinstance(item, self._leaf | int | float) and not isinstance(item, bool):
            self._put(f"optimizer.{kind}.{owner}", item)
            return
        for spot, each in self._leaves(item, ["state", owner, kind]):
            self._put_inside(spot, each)
        data = self._without_leaves(item)
        if data is not _NOTHING:
            more = self._states.extra.setdefault("optimizer", {"param_groups": []})
            more.setdefault("state", {}).setdefault(owner, {})[kind] = self._plain(data)

    def _rest(self, node: dict[Any, Any], taken: set[str], place: list[Step]) -> None:
        """Take in what is neither model nor optimizer: tensors as others, and plain data."""
        for step, item in steps_into(node):
            if spelled([step]) in taken:
                continue
            for spot, each in self._leaves(item, [*place, step]):
                self._put_other(f"other.{spelled(spot[len(place) :])}", spot, each)
            data = self._without_leaves(item)
            if data is not _NOTHING:
                self._keep(data, [*place, step])

    def _keep(self, data: Any, spot: list[Step]) -> None:
        """Take in plain data, which are called by the last step to where they lie."""
        name = spelled(spot[-1:])
        is_own = name not in RESERVED and (name != "tied" or (bool(data) and _are_ties(data)))
        mine = self._states.extra if is_own else self._told.kept
        if name in mine:
            raise Corrupt(f"{self._where} has two things called {name!r}, one within the other's container")
        mine[name] = self._plain(data)
        if spot != [name]:
            self._told.placed[name] = spot

    def _put(self, name: str, item: Any) -> None:
        if name in self._states.tensors:
            raise self._doubled(name)
        self._states.tensors[name] = item

    def _doubled(self, name: str) -> Corrupt:
        return Corrupt(f"{self._where} has two tensors of the name {name!r}")

    def _leaves(self, node: Any, spot: Sequence[Step] = ()) -> Iterator[tuple[list[Step], Any]]:
        if len(spot) > _MAX_DEPTH:
            raise Corrupt(f"{self._where} nests its state deeper than {_MAX_DEPTH}")
        if isinstance(node, self._leaf):
            yield [*spot], node
            return
        for step, item in steps_into(node):
            yield from self._leaves(item, [*spot, step])

    def _without_leaves(self, node: Any) -> Any:
        """Return a node without its tensors, for which lists have None; what held nothing else is nothing."""
        if isinstance(node, self._leaf):
            return _NOTHING
        if not isinstance(node, dict | list | tuple) or not any(self._leaves(node)):
            return node
        if isinstance(node, dict):
            pairs = [(key, self._without_leaves(item)) for key, item in node.items()]
            return {key: item for key, item in pairs if item is not _NOTHING} or _NOTHING
        items = [self._without_leaves(item) for item in node]
        if all(item is _NOTHING for item in items):
            return _NOTHING
        return [None if item is _NOTHING else item for item in items]

    def _plain(self, value: Any) -> Any:
        return plain(value, self._where)


_NOTHING = object()


def _are_ties(data: Any) -> bool:
    """Whether plain data may be what an export of ours tells of tied weights."""
    return isinstance(data, dict) and all(isinstance(name, str) for pair in data.items() for name in pair)


def _called(told: Mapping[int, str], names: Mapping[str, str]) -> dict[int, str]:
    """Return told names as the model's are; `names` has these by what the file calls them."""
    short = _unwrapped(dict.fromkeys(told.values()))
    known = set(names.values())
    return {
        number: names.get(name, short[name] if short[name] in known else name)
        for number, name in told.items()
    }


def _has_container(node: dict[Any, Any]) -> bool:
    return any(is_optimizer(item) or (key in MODELS and isinstance(item, dict)) for key, item in node.items())


def _unwrapped(names: Mapping[str, Any]) -> dict[str, str]:
    """Return each name without the prefixes that wrappers add, if they are then still different."""
    called = {name: name for name in names}
    for wrapper in _WRAPPERS:
        called = {name: text.replace(wrapper, "") for name, text in called.items()}
    while called and all(text.startswith(_DISTRIBUTED) for text in called.values()):
        called = {name: text.removeprefix(_DISTRIBUTED) for name, text in called.items()}
    return called if len(set(called.values())) == len(called) else {name: name for name in names}

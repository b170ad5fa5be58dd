"""Training states as torch programs nest them: which leaves are weights, which an optimizer's, which neither.

The same for files of torch.save and for torch's distributed checkpoints, once their keys are a tree again.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from checkpoint.errors import Corrupt, Unsupported
from checkpoint.interop.formats.contract import weight_name
from checkpoint.interop.formats.inert import Dict, plain
from checkpoint.interop.formats.numbered import listed, names_of_numbered

Path = tuple[str, ...]

MODELS = (
    *("model", "state_dict", "model_state_dict", "model_state", "module", "net", "network", "weights"),
    "params",
)
_STEPS = ("step", "global_step", "iteration", "num_steps", "train_step")
_MAX_DEPTH = 60
_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
_DISTRIBUTED = "module."
_MAX_SETS = 3


@dataclass(slots=True)
class States:
    """A state by the names of the contract: tensors, and everything else as plain data.

    `extra["containers"]` says under which keys the model and the optimizer were, so that they can be put
    there again; `extra["optimizer"]` has the parameter groups, by the names of parameters.
    """

    tensors: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    doubts: list[tuple[str, ...]] = field(default_factory=list)

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
    return _Naming(leaf, where).name(tree)


class _Naming:
    def __init__(self, leaf: type, where: str) -> None:
        self._leaf, self._where = leaf, where
        self._states = States()
        self._is_root_model = False

    def name(self, tree: dict[Any, Any]) -> States:
        root, place = self._root(tree)
        optimizers = {str(key): node for key, node in root.items() if _is_optimizer(node)}
        model_key = self._model_key(root, optimizers)
        model = root[model_key] if model_key is not None else self._loose(root, optimizers)
        names = self._put_model(model)
        for node in optimizers.values():
            self._put_optimizer(node, names)
        taken = {*optimizers, str(model_key)}
        if model_key is None:
            taken |= {str(key) for key in model}
        self._states.extra |= self._rest(root, taken, ())
        beside = self._without_leaves(model)
        if model_key is not None and isinstance(beside, dict) and beside:
            self._states.extra[str(model_key)] = self._plain(beside)
        containers: dict[str, Any] = {"model": [*place, model_key] if model_key is not None else [*place]}
        if optimizers:
            containers["optimizer"] = [*place, next(iter(optimizers))]
        self._states.extra["containers"] = containers
        return self._states

    def _root(self, tree: dict[Any, Any]) -> tuple[dict[Any, Any], list[str]]:
        """Return the level at which model and optimizer lie beside each other, and where it is."""
        node, place = tree, list[str]()
        while not any(_is_optimizer(item) or key in MODELS for key, item in node.items()):
            below = [key for key, item in node.items() if isinstance(item, dict) and _has_container(item)]
            if len(below) != 1 or len(place) >= _MAX_DEPTH:
                return tree, []
            rest = {key: item for key, item in node.items() if key != below[0]}
            self._states.extra |= self._rest(rest, set(), tuple(place))
            place.append(str(below[0]))
            node = node[below[0]]
        return node, place

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

    def _put_model(self, model: Any) -> dict[str, str]:
        """Take in the model's tensors. Returns what each is called, by what the file calls it."""
        found: dict[str, Any] = {}
        for path, item in self._leaves(model):
            if (name := ".".join(path)) in found:
                raise self._doubled(name)
            found[name] = item
        names = _unwrapped(found)
        if any(name != given for given, name in names.items()):
            self._states.notes.append(
                "prefixes of wrappers (DDP, FSDP, torch.compile) were left out of names"
            )
        for given, item in found.items():
            self._put(weight_name(names[given], self._where), item)
        return names

    def _put_optimizer(self, node: dict[Any, Any], names: Mapping[str, str]) -> None:
        if not node.keys() >= {"state", "param_groups"}:
            node = _unflattened(node)
        state, groups = node.get("state", {}), node.get("param_groups", [])
        if not isinstance(state, dict) or not isinstance(groups, list):
            raise Corrupt(
                f"the optimizer of {self._where} is none: its state is no dict, or its groups no list"
            )
        called: dict[Any, str] = dict(names)
        if any(type(each) is int for group in groups for each in _params(group)):
            state = {int(key) if str(key).isdecimal() else key: entries for key, entries in state.items()}
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
            named = [called.get(each, each) for each in _params(group)]
            rest = {key: item for key, item in group.items() if key not in ("params", "param_names")}
            kept.append({**self._plain(rest), "params": named})

    def _put_beside(self, said: dict[str, Any], key: str, item: Any) -> None:
        """Take in what an optimizer says beside its states and groups, such as a scaler."""
        for path, each in self._leaves(item, ("optimizer", key)):
            self._put("other." + ".".join(path), each)
        data = self._without_leaves(item)
        if data is not _NOTHING:
            said[key] = self._plain(data)

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
        return found.names

    def _put_state(self, kind: str, owner: str, item: Any) -> None:
        if isinstance(item, self._leaf | int | float) and not isinstance(item, bool):
            self._put(f"optimizer.{kind}.{owner}", item)
        elif any(self._leaves(item)):
            for path, each in self._leaves(item):
                self._put(".".join(("other.optimizer", kind, owner, *path)), each)
        else:
            more = self._states.extra.setdefault("optimizer", {"param_groups": []})
            more.setdefault("state", {}).setdefault(owner, {})[kind] = self._plain(item)

    def _rest(self, node: dict[Any, Any], taken: set[str], path: Path) -> dict[str, Any]:
        """Take in what is neither model nor optimizer: tensors as others, and plain data."""
        rest = {}
        for key, item in node.items():
            if str(key) not in taken:
                for below, each in self._leaves(item, (*path, str(key))):
                    self._put("other." + ".".join(below), each)
                data = self._without_leaves(item)
                if not isinstance(item, self._leaf) and data is not _NOTHING:
                    rest[str(key)] = self._plain(data)
        return rest

    def _put(self, name: str, item: Any) -> None:
        if name in self._states.tensors:
            raise self._doubled(name)
        self._states.tensors[name] = item

    def _doubled(self, name: str) -> Corrupt:
        return Corrupt(f"{self._where} has two tensors of the name {name!r}")

    def _leaves(self, node: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
        if len(path) > _MAX_DEPTH:
            raise Corrupt(f"{self._where} nests its state deeper than {_MAX_DEPTH}")
        if isinstance(node, self._leaf):
            yield path, node
        elif isinstance(node, dict):
            for key, item in node.items():
                yield from self._leaves(item, (*path, str(key)))
        elif isinstance(node, list | tuple):
            for number, item in enumerate(node):
                yield from self._leaves(item, (*path, str(number)))

    def _without_leaves(self, node: Any) -> Any:
        """Return a node without its tensors; what held nothing else is nothing."""
        if isinstance(node, self._leaf):
            return _NOTHING
        if not isinstance(node, dict | list | tuple) or not any(self._leaves(node)):
            return node
        if isinstance(node, dict):
            pairs = [(key, self._without_leaves(item)) for key, item in node.items()]
            return {key: item for key, item in pairs if item is not _NOTHING} or _NOTHING
        items = [item for each in node if (item := self._without_leaves(each)) is not _NOTHING]
        return items or _NOTHING

    def _plain(self, value: Any) -> Any:
        return plain(value, self._where)


_NOTHING = object()


def _params(group: Any) -> list[Any]:
    found = group.get("params", []) if isinstance(group, dict) else []
    return found if isinstance(found, list) else []


def _is_optimizer(node: Any) -> bool:
    """Tell whether this is what an optimizer's state_dict is, nested or with dotted keys."""
    if not isinstance(node, dict) or not node:
        return False
    if node.keys() >= {"state", "param_groups"}:
        return True
    return all(isinstance(key, str) and key.startswith(("state.", "param_groups.")) for key in node)


def _has_container(node: dict[Any, Any]) -> bool:
    return any(
        _is_optimizer(item) or (key in MODELS and isinstance(item, dict)) for key, item in node.items()
    )


def _unflattened(node: dict[str, Any]) -> dict[str, Any]:
    """Nest an optimizer's state whose keys are "state.PARAM.STATE" and "param_groups.PARAM.OPTION"."""
    state: dict[str, dict[str, Any]] = {}
    options: dict[str, dict[str, Any]] = {}
    for key, item in node.items():
        kind, _, rest = key.partition(".")
        owner, _, name = rest.rpartition(".")
        (state if kind == "state" else options).setdefault(owner, Dict())[name] = item
    groups: list[dict[str, Any]] = []
    for owner, chosen in options.items():
        same = next((group for group in groups if {**group, "params": 0} == {**chosen, "params": 0}), None)
        if same is None:
            same = {**chosen, "params": []}
            groups.append(same)
        same["params"].append(owner)
    return {"state": state, "param_groups": groups}


def _unwrapped(names: Mapping[str, Any]) -> dict[str, str]:
    """Return each name without the prefixes that wrappers add, if they are then still different."""
    called = {name: name for name in names}
    for wrapper in _WRAPPERS:
        called = {name: text.replace(wrapper, "") for name, text in called.items()}
    while called and all(text.startswith(_DISTRIBUTED) for text in called.values()):
        called = {name: text.removeprefix(_DISTRIBUTED) for name, text in called.items()}
    return called if len(set(called.values())) == len(called) else {name: name for name in names}

"""A model under torch's FSDP2 (`fully_shard`), whose collectives are a world's: order-fixed, free to break.

torch keeps each parameter as rows (a DTensor), gathers those of one unit (a layer) at a time for forward and
backward, and frees them again. It gets a mesh without process groups: what it gathers goes over `Wires`, and
its reduce-scatters only hand each unit's gradients to whoever adds them up.

Parameters whose rows are no whole vectors (biases, norms) stay whole on every rank: a CPU kernel rounds a
vector's elements and a remainder's differently, so that a cut elsewhere would change bits of the update. So
do those that lie otherwise than row by row (channels_last), which torch does not cut.
"""

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore, _register_process_group
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import GroupName
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.utils._pytree import tree_map_only

from elastic.control.resharding import Cut
from elastic.errors import JobRejected
from elastic.training.carrying import has_extra
from elastic.training.strides import laid_beside

VECTOR = 32
"""Elements: the longest step of a CPU kernel's vector loop (two AVX-512 registers of float32)."""

WHOLE = -1
"""The number of the unit of the parameters that are whole on every rank."""

_LISTS = (nn.ModuleList, nn.ModuleDict)
_CONTAINERS = (*_LISTS, nn.Sequential)


@dataclass(frozen=True, slots=True)
class Wires:
    """What torch's collectives become, of a unit's number and a tensor: `gather` fills in the other shards'
    equal parts, `collect` takes the gradients, one row for each shard.
    """

    gather: Callable[[int, Tensor], None]
    collect: Callable[[int, Tensor], None]


@dataclass(frozen=True, slots=True)
class Sharded:
    """A model of which only `cut` is here. `units[u]` names the trained parameters of unit u, in the order in
    which their gradients lie in a row, and `layers[u]` the unit itself; `whole` names those that are whole on
    every rank.
    """

    model: nn.Module
    cut: Cut
    mesh: DeviceMesh
    parameters: Mapping[str, nn.Parameter]
    units: Sequence[Sequence[str]]
    layers: Sequence[str]
    whole: Sequence[str]

    def spread(self, name: str, local: Tensor) -> Tensor:
        """Make a tensor that lies as a parameter does of what of it is here."""
        parameter = self.parameters[name]
        return _spread(local, self.mesh, parameter) if isinstance(parameter, DTensor) else local

    def split(self, unit: int, row: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield each trained parameter of a unit with its part of a row of gradients."""
        start = 0
        for name in self.whole if unit == WHOLE else self.units[unit]:
            shape = self.parameters[name].shape
            if unit == WHOLE:
                here, length = shape, shape.numel()
            else:
                here = torch.Size((len(self.cut.rows(shape[0])), *shape[1:]))
                length = -(-shape[0] // self.cut.shards) * shape[1:].numel()
            yield name, row[start : start + here.numel()].view(here)
            start += length


class Mould:
    """A model without its parameters' memory, from which models are made that hold some of their rows.

    `sharded` are the shapes of the parameters that have rows. `tensors` is the state; `names` gives the
    first of the names of each of its tensors.
    """

    def __init__(self, model: nn.Module) -> None:
        if any(has_extra(module) for module in model.modules()):
            raise JobRejected(
                "the model keeps extra state (get_extra_state) beside its tensors, which cannot be sharded: "
                "set training.parameter_copies = 0"
            )
        self._model = _twin(model, lambda parameter: parameter.detach().to("meta"))
        self.parameters: dict[str, nn.Parameter] = dict(self._model.named_parameters())
        self.sharded = {
            name: each.shape
            for name, each in self.parameters.items()
            if each.dim() > 1
            and each.numel()
            and each.shape[1:].numel() % VECTOR == 0
            and each.is_contiguous()
        }
        self.tensors: dict[str, Tensor] = dict(self._model.state_dict(keep_vars=True))
        first: dict[int, str] = {id(each): name for name, each in self.parameters.items()}
        self.names = {name: first.setdefault(id(each), name) for name, each in self.tensors.items()}

    def pour(self, cut: Cut, parameters: Mapping[str, Tensor], device: torch.device, wires: Wires) -> Sharded:
        """Make a model of what of each parameter is here: the rows of `cut`, or all of it.

        Raises JobRejected for a model that torch cannot shard.
        """
        model = _twin(self._model, torch.empty_like)
        whole = {each for name, each in model.named_parameters() if name not in self.sharded}
        mesh = _mesh(device.type, cut)
        parts = [*_layers(model), model]
        for part in parts:
            part.register_forward_hook(_own_memory)
            fully_shard(part, mesh=mesh, ignored_params=whole)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        if len(names) != len(self.parameters):
            raise JobRejected(
                "the model ties parameters of different layers in a way that torch cannot shard: "
                "set training.parameter_copies = 0"
            )
        units = [_trained(part, names) for part in parts]
        for number, part in enumerate(parts):
            _connect(part, number, cut, wires)
        filled = _fill(model, mesh, parameters)
        alike = [name for name, each in filled.items() if each.requires_grad and name not in self.sharded]
        paths = {module: path for path, module in model.named_modules()}
        layers = [paths[part] or "the model itself" for part in parts]
        return Sharded(model, cut, mesh, filled, units, layers, alike)


class _Communication:
    """The memory of torch's collectives."""

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Allocate anew: what is gathered is freed after use."""
        return torch.empty(*size, dtype=dtype, device=device)


class _Gathering(_Communication):
    """An all-gather in place: the input is a part of the output."""

    def __init__(self, gather: Callable[[Tensor], None]) -> None:
        self._gather = gather

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: object, async_op: object = None
    ) -> None:
        """Fill in the other shards' parts."""
        del input_tensor, group, async_op
        self._gather(output_tensor)


class _Scattering(_Communication):
    """A reduce-scatter that hands on its input; torch's own sum of it is never read."""

    def __init__(self, collect: Callable[[Tensor], None]) -> None:
        self._collect = collect

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: object, op: object, async_op: object = None
    ) -> None:
        """Hand on the gradients of all shards."""
        del group, op, async_op
        output_tensor.zero_()
        self._collect(input_tensor)


def _own_memory(_module: nn.Module, _given: object, output: Any) -> Any:
    """Let a unit return no views: torch would lose its hook on one that is changed in place afterwards."""
    return tree_map_only(Tensor, lambda each: each.clone() if each._is_view() else each, output)


def _trained(part: Any, names: Mapping[int, str]) -> list[str]:
    """Name the trained parameters of a unit, in the order in which torch lays out their gradients."""
    return [
        names[id(each.sharded_param)]
        for group in part._get_fsdp_state()._fsdp_param_groups
        for each in group.fsdp_params
        if each.sharded_param.requires_grad
    ]


def _connect(part: Any, number: int, cut: Cut, wires: Wires) -> None:
    """Let a unit communicate over wires, and sum without dividing."""

    def collect(gradients: Tensor) -> None:
        wires.collect(number, gradients.view(cut.shards, -1))

    part.set_custom_all_gather(_Gathering(partial(wires.gather, number)))
    part.set_custom_reduce_scatter(_Scattering(collect))
    if cut.shards == 1:
        part.set_all_reduce_hook(collect)  # of one shard torch scatters nothing
    part.set_gradient_divide_factor(1.0)
    part.set_force_sum_reduction_for_comms(True)
    part.set_reduce_scatter_unused_params(True, recurse=False)


def _twin(model: nn.Module, make: Callable[[nn.Parameter], Tensor]) -> nn.Module:
    """Copy a model with other parameters, tied as they are; its buffers, which nobody changes, stay."""
    memo: dict[int, Any] = {id(buffer): buffer for buffer in model.buffers()}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(make(parameter), requires_grad=parameter.requires_grad)
    return copy.deepcopy(model, memo)


def _layers(model: nn.Module) -> list[nn.Module]:
    """List the layers that are units of their own: the outermost items of lists and sequences of modules.

    A layer that occurs twice, or shares a parameter with another, stays in the unit of the whole model.
    """
    places = Counter(id(child) for module in model.modules() for child in module.children())
    owners = Counter(id(each) for module in model.modules() for each in module._parameters.values())
    found = []
    for layer in _items(model):
        inside = Counter(id(each) for module in layer.modules() for each in module._parameters.values())
        own = {id(each) for each in layer.parameters()}
        if own and places[id(layer)] == 1 and all(inside[each] == owners[each] for each in own):
            found.append(layer)
    return found


def _items(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(module, _CONTAINERS) and not isinstance(child, _LISTS):
            yield child
        else:
            yield from _items(child)


def _fill(model: nn.Module, mesh: DeviceMesh, parameters: Mapping[str, Tensor]) -> dict[str, nn.Parameter]:
    """Give a model of empty shards what it holds."""
    filled: dict[int, nn.Parameter] = {}
    for name, empty in model.named_parameters():
        here = parameters[name]
        tensor = _spread(here, mesh, empty) if isinstance(empty, DTensor) else laid_beside(empty, here)
        filled[id(empty)] = nn.Parameter(tensor, requires_grad=empty.requires_grad)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = filled[id(parameter)]
    return dict(model.named_parameters())


def _spread(local: Tensor, mesh: DeviceMesh, whole: Tensor) -> DTensor:
    return DTensor.from_local(
        local, mesh, (Shard(0),), run_check=False, shape=whole.shape, stride=whole.stride()
    )


def _mesh(device_type: str, cut: Cut) -> DeviceMesh:
    """Return a mesh of one axis without process groups: a collective that is not ours fails."""
    name, group = _group(cut)
    with suppress(RuntimeError):  # it still is: torch forgets all names when the default group is destroyed
        _register_process_group(name, group)
    return _made_mesh(device_type, cut)


@cache
def _made_mesh(device_type: str, cut: Cut) -> DeviceMesh:
    mesh = DeviceMesh(device_type, torch.arange(cut.shards), _init_backend=False, _rank=cut.index)
    mesh._dim_group_names = [_group(cut)[0]]
    return mesh


@cache  # torch keeps only a weak reference to what is registered
def _group(cut: Cut) -> tuple[GroupName, dist.ProcessGroup]:
    name = GroupName(f"holdfast shard {cut.index} of {cut.shards}")
    return name, dist.ProcessGroup(HashStore(), cut.index, cut.shards)

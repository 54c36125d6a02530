"""Find where loaded tensors go in a model before anything is read, and put new tensors in place afterwards."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from automodel_conv.destinations.devices import loadable
from automodel_conv.destinations.ties import _tied_pairs, _unequal
from automodel_conv.distributed.placements import as_distributed, is_distributed, local_of
from automodel_conv.errors import ConversionError, UnsupportedError, message
from automodel_conv.execution.buffers import dtype_of, span_bytes
from automodel_conv.execution.mapping import with_new
from automodel_conv.planning.copies import Target
from automodel_conv.planning.plan import CopyPlan
from automodel_conv.planning.regions import Region
from automodel_conv.planning.sharding import region_of


class ModuleAttribute(NamedTuple):
    """An attribute of a module that holds a parameter or a persistent buffer."""

    module: nn.Module
    leaf: str

    def get(self) -> Tensor | None:
        return self.module._parameters.get(self.leaf, self.module._buffers.get(self.leaf))

    def put(self, tensor: Tensor) -> None:
        if self.leaf in self.module._buffers:
            self.module._buffers[self.leaf] = tensor
        else:
            self.module._parameters[self.leaf] = tensor  # type: ignore[assignment]


def find_attributes(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, list[ModuleAttribute]]:
    """Per name of a model's state dict, the places that hold that very tensor; none if a hook returned a copy.

    Tensors are matched by identity: wrappers rename what ``state_dict`` gives, and shared parameters have several
    places.
    """
    holders: dict[int, list[ModuleAttribute]] = {}
    for module in model.modules():
        for leaf, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                holders.setdefault(id(tensor), []).append(ModuleAttribute(module, leaf))
    return {name: holders.get(id(tensor), []) for name, tensor in state.items() if isinstance(tensor, Tensor)}


@dataclass
class ModelTensors:
    """The tensors that a load into a model writes: the model's own, or new ones that take their place afterwards."""

    plan: CopyPlan
    buffers: dict[str, Tensor]
    places: dict[str, list[ModuleAttribute]]
    fresh: list[str]
    doubled: list[tuple[str, str]]  # a second name of a parameter that has been loaded under its first
    mapped: Mapping[str, Tensor]  # buffers that need not be filled

    @staticmethod
    def of(
        model: nn.Module,
        state: Mapping[str, Tensor],
        plan: CopyPlan,
        strict: bool,
        device_of: Callable[[str], torch.device | None],
        map_new: Callable[[CopyPlan, Mapping[str, torch.device]], Mapping[str, Tensor]],
    ) -> ModelTensors:
        """Find a home for every target before anything is read.

        Args:
            state: the model's state dict.
            device_of: of new tensors, by name; None: see ``device_for``.
            map_new: maps what it can of the new tensors, of which it is given the plan and the devices.

        Raises:
            UnsupportedError: a tensor on a device that is not loaded to, or that ``state_dict`` hands out as a copy.
            ConversionError: two parameters share memory without being one.
        """
        plan = plan.shard(regions_of(state, plan))
        model_tensors = ModelTensors(plan, {}, find_attributes(model, state), [], [], {})
        first: dict[int, str] = {}
        targets, fresh = [], []
        for target in plan.targets:
            tensor = state[target.name]
            if not model_tensors.places[target.name]:
                raise UnsupportedError(
                    message(
                        f"{target.name} is neither a parameter nor a buffer of the model",
                        found="a tensor that its state_dict() makes anew, so writing to it changes nothing",
                        do="use load_state_dict() and the model's own load_state_dict()",
                    )
                )
            if not tensor.is_meta:
                loadable(tensor.device)
            if id(tensor) in first:
                model_tensors.doubled.append((target.name, first[id(tensor)]))
                if strict:  # to be compared; otherwise the first of two wins
                    targets.append(target)
                    fresh.append(target)
                continue
            first[id(tensor)] = target.name
            targets.append(target)
            if tensor.is_meta or tensor.dtype != dtype_of(target.dtype, target.name):
                model_tensors.fresh.append(target.name)
                fresh.append(target)
            else:
                model_tensors.buffers[target.name] = local_of(tensor.detach())
        _refuse_shared_memory(model_tensors.buffers)
        model_tensors.plan = replace(plan, targets=tuple(targets))
        devices = {target.name: device_of(target.name) or device_for(state[target.name]) for target in fresh}
        model_tensors.mapped = map_new(replace(plan, targets=tuple(fresh)), devices)
        model_tensors.buffers |= with_new(fresh, model_tensors.mapped, devices)
        return model_tensors

    @property
    def extra_bytes(self) -> int:
        """Bytes of the second copies, unless mapped, of parameters that the checkpoint holds under two names."""
        doubled = {name for name, _ in self.doubled if name not in self.mapped}
        return sum(self.buffers[name].nbytes for name in doubled & self.buffers.keys())

    def unequal(self) -> set[tuple[str, str]]:
        """Names that are, or would be, one parameter, and for which this rank has loaded different values."""
        return _unequal([*self.doubled, *_tied_pairs(self.plan.tied, self.buffers)], self.buffers)

    def settle(self, unequal: Collection[tuple[str, str]]) -> None:
        """Put new tensors into the model, and tie what is one parameter.

        Args:
            unequal: what any rank has found ``unequal``.

        Raises:
            ConversionError: the checkpoint has different values for two names of one parameter.
        """
        for name, other in self.doubled:
            if (name, other) in unequal:
                raise ConversionError(
                    message(
                        f"{name} and {other} are one parameter of the model",
                        expected="equal values in the checkpoint",
                        found="different values",
                        do=[
                            "untie them in the model",
                            "remove one from the checkpoint",
                            "{strict=False} takes the first",
                        ],
                    )
                )
        fresh = set(self.fresh)
        for name in self.fresh:
            old, made = self.places[name][0].get(), self.buffers[name]
            made = as_distributed(made, old) if old is not None and is_distributed(old) else made
            _put_everywhere(self.places[name], made)
        for group in self.plan.tied:
            made = [name for name in group if name in self.buffers]
            if not fresh.intersection(made):
                continue
            shared = self.places[made[0]][0].get()
            for name in group:
                if (name, made[0]) not in unequal:
                    for place in self.places[name]:
                        place.put(shared)  # type: ignore[arg-type]


def device_for(tensor: Tensor) -> torch.device:
    """Where a tensor in place of this one goes: to its device, from the meta device to its mesh's or the CPU."""
    if not tensor.is_meta:
        return tensor.device
    kind = tensor.device_mesh.device_type if is_distributed(tensor) else "cpu"  # type: ignore[attr-defined]
    return loadable(kind)


def devices_of_new(
    targets: Iterable[Target], state: Mapping[str, Tensor], device_of: Callable[[str], torch.device | None]
) -> dict[str, torch.device]:
    """The device of each new tensor: a DTensor goes to its mesh's device, any other where ``device_of`` says."""
    devices: dict[str, torch.device] = {}
    for target in targets:
        like = state.get(target.name)
        own = device_for(like) if like is not None and is_distributed(like) else None
        devices[target.name] = own or device_of(target.name) or torch.device("cpu")
    return devices


def regions_of(state: Mapping[str, Tensor], plan: CopyPlan) -> dict[str, Region]:
    """The regions that this rank holds of the targets that are DTensors."""
    names = [target.name for target in plan.targets]
    return {name: region_of(state[name]) for name in names if name in state and is_distributed(state[name])}


def _put_everywhere(places: Iterable[ModuleAttribute], tensor: Tensor) -> None:
    """Make ``tensor`` the one parameter or buffer of all these places."""
    parameter: nn.Parameter | None = None
    for place in places:
        if place.leaf in place.module._buffers:
            place.put(tensor)
            continue
        if parameter is None:
            old = place.module._parameters[place.leaf]
            trains = tensor.is_floating_point() and (old is None or old.requires_grad)
            parameter = nn.Parameter(tensor, requires_grad=trains)
        place.put(parameter)


def _refuse_shared_memory(buffers: Mapping[str, Tensor]) -> None:
    """Two parameters of the model that overlap would be written twice, in any order."""
    spans = sorted(
        (tensor.data_ptr(), tensor.data_ptr() + span_bytes(tensor), name)
        for name, tensor in buffers.items()
        if tensor.numel() and tensor.is_contiguous()
    )
    for (_, stop, name), (start, _, other) in pairwise(spans):
        if start < stop:
            raise ConversionError(
                message(f"{name} and {other} share memory but are two parameters", do="give each storage of its own")
            )

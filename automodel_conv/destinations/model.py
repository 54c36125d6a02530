"""Find the tensors of a model that a load fills, and install new ones after the load."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from automodel_conv.destinations.devices import loadable
from automodel_conv.destinations.ties import _tied_pairs, _unequal
from automodel_conv.distributed.placements import as_distributed, is_distributed, local_of
from automodel_conv.errors import ConversionError, UnsupportedError, message
from automodel_conv.execution.buffers import dtype_of, span_bytes
from automodel_conv.execution.mapping import mapped_or_new
from automodel_conv.execution.memory import share_bytes
from automodel_conv.planning.copies import Target
from automodel_conv.planning.plan import CopyPlan
from automodel_conv.planning.regions import Region
from automodel_conv.planning.sharding import region_of


class ModuleAttribute(NamedTuple):
    """An attribute of a module that holds a parameter or a persistent buffer."""

    module: nn.Module
    leaf: str
    """Name of the attribute."""

    def get(self) -> Tensor | None:
        """Return the tensor, or None if the attribute is None."""
        return self.module._parameters.get(self.leaf, self.module._buffers.get(self.leaf))

    def set(self, tensor: Tensor) -> None:
        """Replace the tensor."""
        if self.leaf in self.module._buffers:
            self.module._buffers[self.leaf] = tensor
        else:
            self.module._parameters[self.leaf] = tensor  # type: ignore[assignment]


def find_attributes(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, list[ModuleAttribute]]:
    """Return the module attributes that hold each tensor of a state dict, by name.

    Tensors are matched by identity, because wrappers rename the keys of ``state_dict``. A shared parameter has several
    attributes. A tensor that a hook returned as a copy has none.

    Args:
        model: the model.
        state: its state dict.
    """
    holders: dict[int, list[ModuleAttribute]] = {}
    for module in model.modules():
        for leaf, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                holders.setdefault(id(tensor), []).append(ModuleAttribute(module, leaf))
    return {name: holders.get(id(tensor), []) for name, tensor in state.items() if isinstance(tensor, Tensor)}


@dataclass
class ModelTensors:
    """The tensors that a load into a model writes: the model's own, or new ones that replace them after the load."""

    plan: CopyPlan
    """Plan of this rank's regions."""
    buffers: dict[str, Tensor]
    """Tensors to fill, by target name. A DTensor's is its local tensor."""
    attributes: dict[str, list[ModuleAttribute]]
    """Attributes of the model that hold each target."""
    new: list[str]
    """Names of targets whose buffers replace the model's tensors."""
    aliases: list[tuple[str, str]]
    """``(name, first name)`` for each further name of a parameter that has several targets."""
    mapped: Mapping[str, Tensor]
    """Buffers that are mapped from files and need not be filled."""

    @staticmethod
    def prepare(
        model: nn.Module,
        state: Mapping[str, Tensor],
        plan: CopyPlan,
        strict: bool,
        device_of: Callable[[str], torch.device | None],
        map_new: Callable[[CopyPlan, Mapping[str, torch.device]], Mapping[str, Tensor]],
    ) -> ModelTensors:
        """Find or allocate the buffer of every target, before anything is read.

        Args:
            model: the model.
            state: the model's state dict.
            plan: plan of the whole model.
            strict: whether all names of a parameter are loaded and compared; otherwise only the first is loaded.
            device_of: returns the device of a new tensor, by its name; None: see ``device_for``.
            map_new: maps new tensors from files where it can, given their plan and devices.

        Raises:
            UnsupportedError: a tensor is on a device that tensors cannot be loaded to, or ``state_dict`` returns it as
                a copy.
            ConversionError: two parameters share memory without being one parameter.
        """
        plan = plan.shard(regions_of(state, plan))
        model_tensors = ModelTensors(plan, {}, find_attributes(model, state), [], [], {})
        first_names: dict[int, str] = {}
        targets, new_targets = [], []
        for target in plan.targets:
            tensor = state[target.name]
            if not model_tensors.attributes[target.name]:
                raise UnsupportedError(
                    message(
                        f"{target.name} is neither a parameter nor a buffer of the model",
                        found="a tensor that its state_dict() creates, so writing to it changes nothing",
                        do="use load_state_dict() and the model's own load_state_dict()",
                    )
                )
            if not tensor.is_meta:
                loadable(tensor.device)
            if id(tensor) in first_names:
                model_tensors.aliases.append((target.name, first_names[id(tensor)]))
                if strict:  # load it too, to compare it with the first
                    targets.append(target)
                    new_targets.append(target)
                continue
            first_names[id(tensor)] = target.name
            targets.append(target)
            if tensor.is_meta or tensor.dtype != dtype_of(target.dtype, target.name):
                model_tensors.new.append(target.name)
                new_targets.append(target)
            else:
                model_tensors.buffers[target.name] = local_of(tensor.detach())
        refuse_shared_memory(model_tensors.buffers)
        model_tensors.plan = replace(plan, targets=tuple(targets))
        devices = {target.name: device_of(target.name) or device_for(state[target.name]) for target in new_targets}
        model_tensors.mapped = map_new(replace(plan, targets=tuple(new_targets)), devices)
        model_tensors.buffers |= mapped_or_new(new_targets, model_tensors.mapped, devices)
        return model_tensors

    @property
    def extra_bytes(self) -> int:
        """Bytes of the buffers, unless mapped, that hold a further copy of a parameter with several names."""
        copies = {name for name, _ in self.aliases if name not in self.mapped}
        return sum(self.buffers[name].nbytes for name in copies & self.buffers.keys())

    def unequal(self) -> set[tuple[str, str]]:
        """Return ``(name, first name)`` for names that share a parameter but have different values on this rank."""
        return _unequal([*self.aliases, *_tied_pairs(self.plan.tied, self.buffers)], self.buffers)

    def install(self, unequal: Collection[tuple[str, str]]) -> None:
        """Put the new tensors into the model, and tie the names of one parameter.

        Args:
            unequal: the pairs that ``unequal`` returned on any rank.

        Raises:
            ConversionError: the checkpoint has different values for two names of one parameter.
        """
        for name, other in self.aliases:
            if (name, other) in unequal:
                raise ConversionError(
                    message(
                        f"{name} and {other} are one parameter of the model",
                        expected="equal values in the checkpoint",
                        found="different values",
                        do=[
                            "untie them in the model",
                            "remove one from the checkpoint",
                            "{strict=False} uses the first",
                        ],
                    )
                )
        new = set(self.new)
        for name in self.new:
            old, tensor = self.attributes[name][0].get(), self.buffers[name]
            tensor = as_distributed(tensor, old) if old is not None and is_distributed(old) else tensor
            _set_all(self.attributes[name], tensor)
        for group in self.plan.tied:
            loaded = [name for name in group if name in self.buffers]
            if not new.intersection(loaded):
                continue
            shared = self.attributes[loaded[0]][0].get()
            for name in group:
                if (name, loaded[0]) not in unequal:
                    for attribute in self.attributes[name]:
                        attribute.set(shared)  # type: ignore[arg-type]


def device_for(tensor: Tensor) -> torch.device:
    """Return the device of a tensor that replaces this one: its own; if that is meta, its mesh's or the CPU."""
    if not tensor.is_meta:
        return tensor.device
    kind = tensor.device_mesh.device_type if is_distributed(tensor) else "cpu"  # type: ignore[attr-defined]
    return loadable(kind)


def devices_of_new(
    targets: Iterable[Target], state: Mapping[str, Tensor], device_of: Callable[[str], torch.device | None]
) -> dict[str, torch.device]:
    """Return the device of each new tensor by name: its mesh's for a DTensor, else that of ``device_of`` or the CPU."""
    devices: dict[str, torch.device] = {}
    for target in targets:
        like = state.get(target.name)
        own = device_for(like) if like is not None and is_distributed(like) else None
        devices[target.name] = own or device_of(target.name) or torch.device("cpu")
    return devices


def regions_of(state: Mapping[str, Tensor], plan: CopyPlan) -> dict[str, Region]:
    """Return the region that this rank holds of each target that is a DTensor, by name."""
    names = [target.name for target in plan.targets]
    return {name: region_of(state[name]) for name in names if name in state and is_distributed(state[name])}


def _set_all(attributes: Iterable[ModuleAttribute], tensor: Tensor) -> None:
    """Set all attributes to one buffer or parameter."""
    parameter: nn.Parameter | None = None
    for attribute in attributes:
        if attribute.leaf in attribute.module._buffers:
            attribute.set(tensor)
            continue
        if parameter is None:
            old = attribute.module._parameters[attribute.leaf]
            requires_grad = tensor.is_floating_point() and (old is None or old.requires_grad)
            parameter = nn.Parameter(tensor, requires_grad=requires_grad)
        attribute.set(parameter)


def refuse_shared_memory(buffers: Mapping[str, Tensor]) -> None:
    """Raise ConversionError if two parameters overlap in memory: both would be written, in no fixed order."""
    spans = sorted(
        (tensor.data_ptr(), tensor.data_ptr() + span_bytes(tensor), name)
        for name, tensor in buffers.items()
        if tensor.numel()
    )
    open_spans: list[tuple[int, str]] = []  # those that extend beyond the start of the next one
    for start, stop, name in spans:
        open_spans = [span for span in open_spans if span[0] > start]
        for _, other in open_spans:
            if share_bytes(buffers[name], buffers[other]):
                raise ConversionError(
                    message(f"{other} and {name} share memory but are two parameters", do="give each its own storage")
                )
        open_spans.append((stop, name))

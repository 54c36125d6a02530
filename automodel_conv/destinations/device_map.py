"""Interpret ``device_map``, which assigns devices to modules and parameters by name, as accelerate does."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from itertools import accumulate

import torch
from torch import Tensor, nn

from automodel_conv.destinations.devices import DeviceLike, loadable
from automodel_conv.distributed.placements import is_distributed
from automodel_conv.errors import ConversionError, UnsupportedError, listing, message
from automodel_conv.upstream.models import tied_names


class DeviceMap:
    """The device of each tensor, by name.

    The name itself is looked up first, then its parents, then "": the longest prefix of whole components wins. Every
    tensor needs an entry. Integers are CUDA devices. Accelerate 1.15.0 does the same in
    ``accelerate/utils/modeling.py`` (``_get_param_device``, ``check_device_map``).
    """

    def __init__(self, entries: Mapping[str, DeviceLike]):
        """Create the map and check every entry.

        Args:
            entries: devices by the name of a module or parameter.

        Raises:
            UnsupportedError: an entry names the disk, or a device that this machine does not have.
            ConversionError: a key is not a string, or a value is not a device.
        """
        self.entries = {name: _device(name, device) for name, device in entries.items()}

    def device_of(self, name: str) -> torch.device | None:
        """Return the device of a parameter, buffer or module; None if no entry covers it."""
        while name and name not in self.entries:
            name = name.rpartition(".")[0]
        return self.entries.get(name)

    def check(
        self,
        names: Collection[str],
        state: Mapping[str, object],
        model: nn.Module | None,
        *,
        strict: bool,
    ) -> None:
        """Check that the map fits the tensors to place.

        Args:
            names: names of these tensors.
            state: state dict of the whole model; {} without a model.
            model: the model; None if only rules determine the names. Without a model, module names are unknown, so any
                entry may name a module.
            strict: whether an entry that names nothing in the model is an error.

        Raises:
            UnsupportedError: a tensor is a DTensor, which is placed by its mesh.
            ConversionError: no entry covers a tensor, an entry names nothing in the model, or tied names are on
                different devices.
        """
        tensors = {name: tensor for name in names if isinstance(tensor := state.get(name), Tensor)}
        sharded = [name for name, tensor in tensors.items() if is_distributed(tensor)]
        if sharded:
            found = "\n" + listing(sharded)
            do = "leave device_map out; DTensors are loaded to the devices of their meshes"
            raise UnsupportedError(
                message("device_map places whole tensors, and these are DTensors", found=found, do=do)
            )
        uncovered = [name for name in names if self.device_of(name) is None]
        if uncovered:
            raise ConversionError(
                message(
                    f"device_map has no device for {len(uncovered)} of {len(names)} tensors",
                    found="\n" + listing(uncovered),
                    do='add their modules, or "" for all that no other entry covers',
                )
            )
        if model is None:
            return
        if strict:
            self._refuse_unknown_entries({*names, *state}, model)
        self._refuse_split_ties(tied_names(model))

    def check_in_place(self, state: Mapping[str, object]) -> None:
        """Check that parameters that have memory are on their devices.

        Buffers are not checked, because a load moves them.

        Args:
            state: state dict of the whole model.

        Raises:
            ConversionError: a parameter is on another device.
        """
        wrong = [
            f"{name}: {device} in the map, {tensor.device} in the model"
            for name, tensor in state.items()
            if isinstance(tensor, nn.Parameter)
            and not tensor.is_meta
            and (device := self.device_of(name)) not in (None, tensor.device)
        ]
        if wrong:
            do = "move the model, or build it on the meta device, where parameters have no place yet"
            raise ConversionError(
                message("parameters that have memory are filled where they are", found="\n" + listing(wrong), do=do)
            )

    def _refuse_unknown_entries(self, names: Iterable[str], model: nn.Module) -> None:
        known = {name for name, _ in model.named_modules(remove_duplicate=False)}
        for name in names:
            known.update(accumulate(name.split("."), lambda path, part: f"{path}.{part}"))
        unknown = [name for name in self.entries if name not in known]
        if unknown:
            found, do = "\n" + listing(unknown), ["correct or remove them", "{strict=False} ignores them"]
            raise ConversionError(message("entries of device_map name no module and no parameter", found=found, do=do))

    def _refuse_split_ties(self, groups: Iterable[tuple[str, ...]]) -> None:
        for group in groups:
            devices = {name: device for name in group if (device := self.device_of(name)) is not None}
            if len(set(devices.values())) > 1:
                raise ConversionError(
                    message(
                        f"{' and '.join(devices)} are one tensor of the model",
                        expected="one device in device_map",
                        found=", ".join(str(device) for device in devices.values()),
                        do="send them to the same device, or untie them in the model",
                    )
                )


def device_map_of(
    device_map: Mapping[str, DeviceLike] | None, device: str | torch.device | None, default: str | None
) -> DeviceMap | None:
    """Return the caller's ``device_map`` as a ``DeviceMap``; None if there is none.

    Args:
        device_map: the caller's argument.
        device: the caller's ``device``.
        default: default of ``device``. With a map, ``device`` must have this value or be None.

    Raises:
        ConversionError: ``device`` is given too, or ``device_map`` is not a mapping; see ``DeviceMap``.
        UnsupportedError: see ``DeviceMap``.
    """
    if device_map is None:
        return None
    if device is not None and str(device) != default:
        found = f"device={device!r} and device_map"
        do = 'put device into the map under ""'
        raise ConversionError(message("device and device_map exclude each other", found=found, do=do))
    if not isinstance(device_map, Mapping):
        raise ConversionError(
            message(
                "device_map is not a mapping",
                expected='names of modules to devices, as in {"model.embed_tokens": 0, "": "cuda:1"}',
                found=repr(device_map),
                do="device= is for one device; accelerate.infer_auto_device_map(model) computes a map for a model on "
                'the meta device; or use from_pretrained(device_map="auto") under accelerate_transformers()',
            )
        )
    return DeviceMap(device_map)


def _device(name: object, device: DeviceLike) -> torch.device:
    """Return the device of an entry, checked."""
    where = f"device_map[{name!r}]"
    if not isinstance(name, str):
        raise ConversionError(message("the keys of device_map must be names", where=where))
    if device == "disk":
        raise UnsupportedError(
            message(
                "tensors cannot be loaded to disk",
                where=where,
                do='send it to "cpu", or use from_pretrained(device_map=..., offload_folder=...) under '
                "accelerate_transformers()",
            )
        )
    return loadable(device, where)

"""Check the devices that callers pass."""

from __future__ import annotations

import torch

from automodel_conv.errors import UnsupportedError, message

DeviceLike = int | str | torch.device


def as_device(device: object, where: str | None = None) -> torch.device:
    """Return a caller's device as a ``torch.device``.

    Args:
        device: a device, its name, or the number of a CUDA device.
        where: the argument that holds it, for the error.

    Raises:
        UnsupportedError: torch has no such device.
    """
    if isinstance(device, (int, str, torch.device)) and not isinstance(device, bool):
        name = f"cuda:{device}" if isinstance(device, int) else str(device)
        try:
            parsed = torch.device(name)
            if str(parsed) == name:  # torch keeps the number in 8 bits, so that "cuda:256" becomes cuda:0
                return parsed
        except RuntimeError:  # torch has no device of that name
            pass
    expected = _devices(torch.cuda.device_count())
    do = '{device="cpu"} loads to the CPU'
    raise UnsupportedError(message(f"not a device: {device!r}", where=where, expected=expected, do=do))


def loadable(device: DeviceLike, where: str | None = None) -> torch.device:
    """Return a caller's device with its number, if tensors can be loaded to it.

    Args:
        device: a device, its name, or the number of a CUDA device.
        where: the argument that holds it, for the error.

    Raises:
        UnsupportedError: it is not a device, or neither the CPU nor a CUDA device of this machine.
    """
    device = as_device(device, where)
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type == "meta":
        text, do = (
            "the meta device holds no data, so nothing can be loaded to it",
            "{compile_plan(...)} plans a load without loading",
        )
        raise UnsupportedError(message(text, where=where, do=do))
    count = torch.cuda.device_count()
    if device.type != "cuda" or (device.index or 0) >= count:
        raise UnsupportedError(
            message(
                f"cannot load to {device}",
                where=where,
                expected=_devices(count),
                do=('{device="cpu"} loads to the CPU', "load to the CPU and move the model"),
            )
        )
    return torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)


def _devices(count: int) -> str:
    """Return the names of the devices that tensors can be loaded to, given the number of CUDA devices."""
    cuda = ", ".join(f'"cuda:{number}"' for number in range(count))
    return '"cpu"' + (f", {cuda}" if count else "; this machine has no CUDA devices")

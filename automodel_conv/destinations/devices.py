"""Check the devices that callers name."""

from __future__ import annotations

import torch

from automodel_conv.errors import UnsupportedError, message

DeviceLike = int | str | torch.device


def as_device(device: object, where: str | None = None) -> torch.device:
    """The device that a caller names.

    Raises:
        UnsupportedError: it is no device of torch.
    """
    if isinstance(device, (int, str, torch.device)) and not isinstance(device, bool):
        name = f"cuda:{device}" if isinstance(device, int) else str(device)
        try:
            found = torch.device(name)
            if str(found) == name:  # torch counts them in 8 bits: its "cuda:256" is cuda:0
                return found
        except RuntimeError:  # torch knows no device of that name
            pass
    expected = _devices(torch.cuda.device_count())
    raise UnsupportedError(message("not a device", where=where, expected=expected, found=repr(device)))


def loadable(device: DeviceLike, where: str | None = None) -> torch.device:
    """The device, with its number.

    Args:
        device: a number is that of a CUDA device.
        where: the argument that names it, for the error.

    Raises:
        UnsupportedError: it is neither the CPU nor a CUDA device that is there, or no device at all.
    """
    device = as_device(device, where)
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type == "meta":
        text, do = (
            "the meta device holds no data, so nothing can be loaded to it",
            "{compile_plan(...)} plans a load alone",
        )
        raise UnsupportedError(message(text, where=where, do=do))
    count = torch.cuda.device_count()
    if device.type != "cuda" or (device.index or 0) >= count:
        raise UnsupportedError(
            message(
                f"cannot load to {device}",
                where=where,
                expected=_devices(count),
                do="load to the CPU and move the model",
            )
        )
    return torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)


def _devices(count: int) -> str:
    there = ", ".join(f'"cuda:{number}"' for number in range(count))
    return '"cpu"' + (f", {there}" if count else "; there are no CUDA devices here")

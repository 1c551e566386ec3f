"""Devices and dtypes by name or torch object."""

import torch

from headscope.errors import ModelError

DTYPES = {
    str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
}
"""Dtypes that a model can compute in, by name."""


def dtype_of(dtype: str | torch.dtype) -> torch.dtype:
    """Return a dtype by its name, `bfloat16` or `torch.bfloat16`, or unchanged.

    Raises:
        ModelError: it is not one of `DTYPES`.
    """
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ModelError(f"dtype {dtype}", expected=", ".join(DTYPES), do="pass one of these")
    return DTYPES[name]


def device_of(device: str | torch.device) -> torch.device:
    """Return a device that can compute here, by its name or unchanged.

    Raises:
        ModelError: there is no such device, or it holds no numbers (`meta`).
    """
    try:
        found = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise _no_device(device, str(error).splitlines()[0]) from error
    if found.type == "meta":
        raise _no_device(device, "tensors without numbers")
    return found


def _no_device(device: str | torch.device, why: str) -> ModelError:
    return ModelError(
        f"device {str(device)!r}: {why}",
        expected="cpu, or cuda on a machine that has it",
        do="pass another device",
    )

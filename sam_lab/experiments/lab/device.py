"""What an experiment has to know of the device it runs on."""

from __future__ import annotations

import platform
import re
from pathlib import Path

import torch

__all__ = ["device_name", "has_bfloat16"]

CPUINFO = Path("/proc/cpuinfo")
"""What Linux says of its processors; other systems have no such file."""


def has_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies matrices in bfloat16 by instructions of its own: without them
    bfloat16 is slower than float32, by far. Of a CPU this is known on Linux alone."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    flags = _cpuinfo("flags").split() if device.type == "cpu" else []
    return not {"avx512_bf16", "amx_bf16"}.isdisjoint(flags)


def device_name(device: torch.device) -> str:
    """Kind and model, and whether the device has bfloat16, such as "cpu: AMD EPYC, bfloat16"."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = _cpuinfo("model name") or platform.processor() or platform.machine()
    return f"{device.type}: {name}{', bfloat16' if has_bfloat16(device) else ''}"


def _cpuinfo(field: str) -> str:
    """A field of the first processor, "" where it is not told."""
    try:
        text = CPUINFO.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    found = re.search(rf"^{field}\s*:(.*)$", text, re.MULTILINE)
    return found[1].strip() if found else ""

"""What an experiment has to know of the device it runs on."""

from __future__ import annotations

import platform
import re
import sys
from pathlib import Path

import torch

__all__ = ["device_name", "has_bfloat16"]


def has_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies matrices in bfloat16 by instructions of its own: without them
    bfloat16 is slower than float32, by far."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    able = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return any(able.get(name, False) for name in ("avx512_bf16", "amx_bf16"))


def device_name(device: torch.device) -> str:
    """Kind and model, and whether the device has bfloat16, such as "cpu: AMD EPYC, bfloat16"."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return f"{device.type}: {name}{', bfloat16' if has_bfloat16(device) else ''}"


def _processor() -> str:
    if sys.platform == "linux":
        try:
            text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        except OSError:
            text = ""
        model = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
        if model:
            return model[1].strip()
    return platform.processor() or platform.machine()

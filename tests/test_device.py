"""What an experiment knows of the device it runs on."""

import platform

import pytest
import torch

from sam_lab.experiments.lab import device
from sam_lab.experiments.lab.device import device_name, has_bfloat16
from sam_lab.experiments.recipe import Recipe

CPU = torch.device("cpu")
DIGITS = Recipe("digits", 60, 40, hidden=(5,), epochs=1)


@pytest.fixture(params=["", "avx2 bf16x", "avx512_bf16", "avx2 amx_bf16"])
def able(request, monkeypatch, tmp_path):
    """Whether the CPU, which has the instructions named, has those for bfloat16."""
    told = tmp_path / "cpuinfo"
    told.write_text(f"model name\t: Abacus 7\nflags\t\t: fpu {request.param} sse\n" * 2)
    monkeypatch.setattr(device, "CPUINFO", told)
    return request.param.endswith("_bf16")


def test_a_cpu_has_bfloat16_by_its_instructions_and_its_name_says_so(able):
    assert has_bfloat16(CPU) == able
    assert device_name(CPU) == f"cpu: Abacus 7{', bfloat16' if able else ''}"


@pytest.mark.parametrize("wanted", [False, True])
def test_a_recipe_trains_in_bfloat16_where_it_wants_to_and_the_device_can(able, wanted):
    training, _ = DIGITS.but(bfloat16=wanted).training()
    assert training.autocast == (torch.bfloat16 if able and wanted else None)


def test_a_processor_of_which_nothing_is_told_has_none_and_the_systems_name(monkeypatch, tmp_path):
    monkeypatch.setattr(device, "CPUINFO", tmp_path / "absent")
    monkeypatch.setattr(platform, "processor", lambda: "")
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    assert not has_bfloat16(CPU) and not has_bfloat16(torch.device("meta"))
    assert device_name(CPU) == "cpu: arm64"


@pytest.mark.cuda
def test_a_gpu_is_named_by_its_model():
    gpu = torch.device("cuda")
    assert torch.cuda.get_device_name(gpu) in device_name(gpu)
    assert device_name(gpu).endswith(", bfloat16") == has_bfloat16(gpu)

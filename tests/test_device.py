"""What an experiment knows of the device it runs on."""

import platform
import sys

import pytest
import torch

from sam_lab.experiments.lab.device import device_name, has_bfloat16
from sam_lab.experiments.recipe import Recipe

CPU = torch.device("cpu")
DIGITS = Recipe("digits", 60, 40, hidden=(5,), epochs=1)


@pytest.fixture(params=[(), ("avx2",), ("avx512_bf16",), ("amx_bf16", "avx2")], ids=str)
def able(request, monkeypatch):
    """Whether the CPU, which has the instructions named, has those for bfloat16."""
    found = dict.fromkeys(("avx2", "avx512_bf16", "amx_bf16"), False)
    found |= dict.fromkeys(request.param, True)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
    return any(name.endswith("bf16") for name in request.param)


def test_a_cpu_has_bfloat16_by_its_instructions_and_its_name_says_so(able):
    assert has_bfloat16(CPU) == able
    assert device_name(CPU).endswith(", bfloat16") == able


def test_a_cpu_of_another_kind_may_have_none(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    assert not has_bfloat16(CPU)
    assert not has_bfloat16(torch.device("meta"))


@pytest.mark.parametrize("wanted", [False, True])
def test_a_recipe_trains_in_bfloat16_where_it_wants_to_and_the_device_can(able, wanted):
    training, _ = DIGITS.but(bfloat16=wanted).training()
    assert training.autocast == (torch.bfloat16 if able and wanted else None)


def test_a_processor_that_no_file_names_is_named_by_the_system(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(platform, "processor", lambda: "")
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    assert device_name(CPU) == "cpu: arm64"


@pytest.mark.cuda
def test_a_gpu_is_named_by_its_model():
    device = torch.device("cuda")
    assert torch.cuda.get_device_name(device) in device_name(device)
    assert device_name(device).endswith(", bfloat16") == has_bfloat16(device)

"""Fixtures that several test files share."""

import os
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[1]


@pytest.fixture
def real_data(monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the real MNIST and CIFAR-10 files, with SAM_LAB_DATA set to it."""
    places = [os.environ.get("SAM_LAB_DATA"), CHECKOUT.parent / "shared" / "data"]
    for place in places:
        if (
            place
            and (Path(place) / "MNIST").is_dir()
            and (Path(place) / "cifar-10-batches-py").is_dir()
        ):
            monkeypatch.setenv("SAM_LAB_DATA", str(place))
            return Path(place)
    pytest.skip("no real MNIST and CIFAR-10 files (SAM_LAB_DATA, or ../shared/data)")

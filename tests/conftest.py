"""Fixtures that several test files share."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

settings.register_profile("patient", deadline=None)  # no timed assertions: machines are shared
settings.load_profile("patient")

CHECKOUT = Path(__file__).parents[1]
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
QUIET = [  # a browser that asks nobody for anything on its own account
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


# Fixtures that run a whole experiment, if a small one.
RUNS = {"result", "runs", "ran"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test that needs a run of an experiment is slow, one that needs a GPU skipped without."""
    for item in items:
        if RUNS & set(getattr(item, "fixturenames", ())):
            item.add_marker("slow")
        if item.get_closest_marker("cuda") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs CUDA"))


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """The system's Chromium, one for all tests: Playwright runs only once in a thread.

    Its absence is a failure where ``SAM_LAB_BROWSER=required`` (``make test``); elsewhere the tests
    that need it are skipped.
    """
    sync_api = pytest.importorskip("playwright.sync_api")
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        reason = "no Chromium found; on Debian and Ubuntu: apt-get install chromium"
        if os.environ.get("SAM_LAB_BROWSER") == "required":
            pytest.fail(reason)
        pytest.skip(reason)
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=program, args=QUIET)
        yield chromium
        chromium.close()


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


@pytest.fixture(scope="module")
def light_judges() -> Iterator[None]:
    """Quick judges for the experiments on robustness; the real ones are tested where they live."""
    from sam_lab.adversarial import pgd
    from sam_lab.experiments.inputs import robustness

    def light(model: Any, x: Any, y: Any, *, threat: Any, attacks: Any, seed: int) -> Any:
        return pgd(model, x, y, threat, steps=5)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(robustness, "STEPS", 3)
        patch.setattr(robustness, "RESTARTS", 1)
        patch.setattr(robustness, "autoattack", light)
        yield

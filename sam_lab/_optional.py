"""Optional packages, imported on first use.

`sam_lab` itself needs torch and numpy alone. Everything else is imported here, at the moment it is
needed, so that a missing package is one clear error and the trap of torchvision has one home.
"""

import importlib
import sys
from types import ModuleType

import torch

# What torchvision's Python files expect to exist once its compiled operators are loaded.
_TORCHVISION_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
# A library's schemas vanish with its last reference, so this one is kept.
_torchvision_library: torch.library.Library | None = None


def require(module: str, *, extra: str) -> ModuleType:
    """Import and return `module` (a dotted name), which the extra `extra` installs.

    Raises:
        ImportError: the module, or a package that it needs, is not installed; the message says
            what to install.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = "it" if error.name == module else repr(error.name)
        raise ImportError(
            f"{module!r} is needed here, and {missing} is not installed; in a copy of SAM Lab's "
            f"repository: pip install -e '.[{extra}]'",
            name=error.name,
        ) from error


def torchvision() -> ModuleType:
    """Import and return torchvision, whether or not its compiled operators load.

    torchvision's compiled operators are built against one build of torch. With another (a CPU
    build of torch beside the torchvision of PyPI for Linux, say) they cannot be loaded, and
    `import torchvision` then fails with "operator torchvision::nms does not exist" because two
    Python registrations name operators that nobody declared. Data sets, transforms and models call
    no compiled operator: declaring the two is enough to import them. Nothing is declared where the
    plain import succeeds. Calling an operator that is only declared is still an error.

    Raises:
        ImportError: torchvision is not installed.
    """
    try:
        return require("torchvision", extra="book")
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]  # half imported
    _declare_torchvision_operators()
    return require("torchvision", extra="book")


def _declare_torchvision_operators() -> None:
    global _torchvision_library
    if _torchvision_library is None:
        _torchvision_library = torch.library.Library("torchvision", "DEF")
        for schema in _TORCHVISION_SCHEMAS:
            _torchvision_library.define(schema)

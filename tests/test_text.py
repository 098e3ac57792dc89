"""sam_lab.text: real text as tokens, and what happens when a download goes wrong."""

import hashlib
import http.client
import io
import os
import platform
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch

from sam_lab import data, text

CHECKOUT = Path(__file__).parents[1]
PLAY = "".join(f"line {i} of a play, {i * i}\n" for i in range(10_020)).encode()


def words(tokens: torch.Tensor) -> str:
    return bytes(tokens.tolist()).decode("ascii")


class TestPythonReference:
    def test_it_is_readable_english_as_ascii_codes(self) -> None:
        t = text.load()
        assert t.name == "python_reference" and t.vocab == text.VOCAB == 128
        for tokens in (t.tokens, t.tokens_test):
            assert tokens.dtype == torch.int64 and tokens.ndim == 1
            assert tokens.min() >= 0 and tokens.max() < 128
        assert len(t.tokens) + len(t.tokens_test) > 300_000
        assert 'The "assert" statement' in words(t.tokens)

    def test_it_is_the_same_each_time(self) -> None:
        first, second = text.load("python_reference"), text.load("python_reference")
        assert torch.equal(first.tokens, second.tokens)
        assert torch.equal(first.tokens_test, second.tokens_test)

    def test_the_last_tenth_is_the_test_text(self) -> None:
        t = text.load()
        total = len(t.tokens) + len(t.tokens_test)
        assert len(t.tokens_test) == total // 10

    def test_no_paragraph_of_the_test_text_is_in_the_training_text(self) -> None:
        t = text.load()
        train, test = (set(words(x).split("\n\n")) for x in (t.tokens, t.tokens_test))
        assert len(test) > 50
        assert not train & test

    def test_the_source_names_the_version_of_python(self) -> None:
        assert f"Python {platform.python_version()}" in text.load().source

    def test_what_is_outside_ascii_becomes_a_question_mark(self, monkeypatch) -> None:
        from pydoc_data import topics

        monkeypatch.setattr(topics, "topics", {"b": "naïve – 9", "a": "one"})
        t = text.load()
        assert words(t.tokens) + words(t.tokens_test) == "one\n\nna?ve ? 9"


class TestWindows:
    TOKENS = torch.arange(40) * 3

    def test_targets_are_the_inputs_moved_on_by_one(self) -> None:
        x, y = text.windows(self.TOKENS, 5, 200, torch.Generator().manual_seed(0))
        assert x.shape == y.shape == (200, 5) and x.dtype == torch.int64
        assert torch.equal(x[:, 1:], y[:, :-1])
        assert torch.equal(y, x + 3)  # consecutive in the text
        assert set(x[:, 0].tolist()) == set(self.TOKENS[:35].tolist())  # every place is drawn

    def test_the_generator_alone_decides(self) -> None:
        before = torch.get_rng_state()
        first, again, other = (
            text.windows(self.TOKENS, 5, 8, torch.Generator().manual_seed(seed))[0]
            for seed in (1, 1, 2)
        )
        assert torch.equal(first, again) and not torch.equal(first, other)
        assert torch.equal(before, torch.get_rng_state())

    def test_the_generator_moves_on(self) -> None:
        generator = torch.Generator().manual_seed(1)
        draws = [text.windows(self.TOKENS, 5, 8, generator)[0] for _ in range(2)]
        assert not torch.equal(*draws)

    def test_the_longest_window_is_the_whole_text(self) -> None:
        x, y = text.windows(self.TOKENS, 39, 2, torch.Generator())
        assert torch.equal(x[0], self.TOKENS[:-1]) and torch.equal(y[1], self.TOKENS[1:])

    @pytest.mark.parametrize("length", [0, 40])
    def test_a_length_that_does_not_fit_is_refused(self, length) -> None:
        with pytest.raises(ValueError, match=f"length must be from 1 to 39, .*got {length}"):
            text.windows(self.TOKENS, length, 2, torch.Generator())

    def test_no_windows_are_refused(self) -> None:
        with pytest.raises(ValueError, match="count must be at least 1, got 0"):
            text.windows(self.TOKENS, 5, 0, torch.Generator())


def test_an_unknown_text_is_refused_with_the_names() -> None:
    with pytest.raises(
        ValueError, match="name must be one of python_reference, shakespeare, got 'x'"
    ):
        text.load("x")


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """Where the file of a made-up play is looked for, whose checksum is taken for the real one."""
    monkeypatch.setenv("SAM_LAB_DATA", str(tmp_path))
    monkeypatch.setattr(text, "_SHA256", hashlib.sha256(PLAY).hexdigest())
    return tmp_path / "tinyshakespeare" / "input.txt"


def network(monkeypatch, answer) -> list[str]:
    """Puts `answer()` in the place of the network; the addresses that are asked for."""
    asked: list[str] = []

    def urlopen(url, timeout):
        asked.append(url)
        return answer()

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    return asked


def left_behind(place: Path) -> list[Path]:
    return [path for path in place.parents[1].rglob("*") if path.is_file()]


class CutShort(io.BytesIO):
    def read(self, *_):
        raise http.client.IncompleteRead(b"line 0")


class TestShakespeare:
    def test_the_last_ten_thousand_lines_are_the_test_text(self, place, monkeypatch) -> None:
        network(monkeypatch, lambda: io.BytesIO(PLAY))
        t = text.load("shakespeare")
        assert words(t.tokens) + words(t.tokens_test) == PLAY.decode()
        assert words(t.tokens).count("\n") == 20
        assert words(t.tokens_test).startswith("line 20 of")

    def test_it_is_downloaded_once_and_kept_as_it_came(self, place, monkeypatch) -> None:
        asked = network(monkeypatch, lambda: io.BytesIO(PLAY))
        first, second = text.load("shakespeare"), text.load("shakespeare")
        assert torch.equal(first.tokens, second.tokens)
        assert asked == [text._URL]
        assert left_behind(place) == [place] and place.read_bytes() == PLAY
        assert os.access(place, os.R_OK)

    @pytest.mark.parametrize(
        ("answer", "reason"),
        [
            (lambda: io.BytesIO(PLAY[:-1]), "the checksum differs"),
            (lambda: io.BytesIO(b"<html>please log in</html>"), "the checksum differs"),
            (CutShort, "IncompleteRead"),
        ],
        ids=["short", "another page", "cut off"],
    )
    def test_a_bad_download_leaves_nothing(self, place, monkeypatch, answer, reason) -> None:
        network(monkeypatch, answer)
        with pytest.raises(FileNotFoundError, match=f"the download failed: {reason}"):
            text.load("shakespeare")
        assert left_behind(place) == []

    def test_without_a_network_the_error_says_where_and_how(self, place, monkeypatch) -> None:
        def offline():
            raise urllib.error.URLError("no network")

        network(monkeypatch, offline)
        with pytest.raises(FileNotFoundError) as caught:
            text.load("shakespeare")
        message = str(caught.value)
        for part in ("no network", str(place), "SAM_LAB_DATA", text._URL, "python_reference"):
            assert part in message
        assert left_behind(place) == []

    def test_a_failure_while_writing_leaves_nothing(self, place, monkeypatch) -> None:
        network(monkeypatch, lambda: io.BytesIO(PLAY))

        def full(source, target):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "replace", full)
        with pytest.raises(FileNotFoundError, match="cannot be written: .*No space left"):
            text.load("shakespeare")
        assert left_behind(place) == []

    def test_a_folder_that_cannot_be_made_is_an_error_with_the_place(
        self, place, monkeypatch
    ) -> None:
        network(monkeypatch, lambda: io.BytesIO(PLAY))
        monkeypatch.setenv("SAM_LAB_DATA", str(place.parents[1] / "file" / "below"))
        (place.parents[1] / "file").write_text("in the way")
        with pytest.raises(FileNotFoundError, match="not available .*file/below"):
            text.load("shakespeare")

    def test_a_damaged_file_is_named_and_left_alone(self, place, monkeypatch) -> None:
        asked = network(monkeypatch, lambda: io.BytesIO(PLAY))
        place.parent.mkdir()
        place.write_bytes(PLAY[:100])
        with pytest.raises(FileNotFoundError, match="damaged: the checksum differs.*remove that"):
            text.load("shakespeare")
        assert asked == [] and place.read_bytes() == PLAY[:100]

    def test_the_real_file(self, monkeypatch) -> None:
        places = [data.root(), CHECKOUT.parent / "shared" / "data"]
        found = [p for p in places if (p / "tinyshakespeare" / "input.txt").is_file()]
        if not found:
            pytest.skip("no tiny_shakespeare (SAM_LAB_DATA, or ../shared/data)")
        monkeypatch.setenv("SAM_LAB_DATA", str(found[0]))
        t = text.load("shakespeare")
        assert len(t.tokens) + len(t.tokens_test) == 1_115_394
        assert words(t.tokens).startswith("First Citizen:\nBefore we proceed")
        assert words(t.tokens).count("\n") == 30_000
        assert words(t.tokens_test).count("\n") == 10_000

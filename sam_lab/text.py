"""Real text as tokens on the device, for language models.

| name | what | where it comes from |
| --- | --- | --- |
| `python_reference` | about 370,000 characters of technical English (the default) | inside Python |
| `shakespeare` | tiny_shakespeare, 1,115,394 characters of drama | downloaded, with its checksum |

A token is a character's ASCII code, as in the code of Long & Bartlett (2024). What is outside ASCII
becomes a question mark.
"""

import hashlib
import http.client
import os
import platform
import tempfile
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sam_lab import data

__all__ = ["NAMES", "VOCAB", "Text", "load", "windows"]

VOCAB = 128
"""How many tokens there are: the codes of ASCII."""

_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
_FILE = "tinyshakespeare/input.txt"
_TEST_LINES = 10_000


@dataclass(frozen=True, eq=False)
class Text:
    """A training and a test text.

    Attributes:
        name: the name it was loaded by.
        tokens, tokens_test: (N,) and (M,), int64, in 0 .. vocab - 1, in reading order.
        vocab: how many different tokens there can be.
        source: where the text comes from, in words.
    """

    name: str
    tokens: Tensor
    tokens_test: Tensor
    vocab: int
    source: str


def load(name: str = "python_reference", *, device: torch.device | str = "cpu") -> Text:
    """Load a text.

    `python_reference` is the part of the Python language reference that `help()` shows, from the
    installed Python: it differs a little from one version of Python to the next, and `source` names
    the version. Its topics come in alphabetical order, and a paragraph that several of them contain
    is kept once; the last tenth is the test text. Of `shakespeare` the last 10,000 of the 40,000
    lines are the test text, as in Long & Bartlett (2024).

    Args:
        name: one of `NAMES`.
        device: where the tokens live.

    Raises:
        ValueError: an unknown name.
        FileNotFoundError: the text is not there and cannot be downloaded, or is damaged; says where
            it was looked for and how to get it.
    """
    if name not in _READERS:
        raise ValueError(f"name must be one of {', '.join(NAMES)}, got {name!r}")
    train, test, source = _READERS[name]()

    def tokens(text: str) -> Tensor:
        codes = np.frombuffer(text.encode("ascii", "replace"), np.uint8)
        return torch.from_numpy(codes.astype(np.int64)).to(device)

    return Text(name, tokens(train), tokens(test), VOCAB, source)


def windows(
    tokens: Tensor, length: int, count: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """A batch for next-token prediction: windows of the text, cut out at random places.

    Args:
        tokens: (N,) the text.
        length: tokens of a window.
        count: how many windows; they may overlap.
        generator: draws the places, on the CPU, so that they are the same for every device.

    Returns:
        Inputs and targets, both (count, length) on the device of `tokens`: the targets are the
        inputs moved on by one token.

    Raises:
        ValueError: `length` or `count` is below 1, or the text too short for such a window.
    """
    if not 1 <= length < len(tokens):
        raise ValueError(
            f"length must be from 1 to {len(tokens) - 1}, one less than the text has tokens, "
            f"got {length}"
        )
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    starts = torch.randint(len(tokens) - length, (count, 1), generator=generator, device="cpu")
    cut = tokens[(starts + torch.arange(length + 1, device="cpu")).to(tokens.device)]
    return cut[:, :-1], cut[:, 1:]


# --- inside Python ----------------------------------------------------------------------------


def _python_reference() -> tuple[str, str, str]:
    from pydoc_data.topics import topics

    paragraphs = "\n\n".join(topics[title] for title in sorted(topics)).split("\n\n")
    text = "\n\n".join(dict.fromkeys(paragraphs))
    border = len(text) - len(text) // 10
    source = (
        f"The Python language reference, as shipped with Python {platform.python_version()} "
        "(pydoc_data.topics)"
    )
    return text[:border], text[border:], source


# --- downloaded -------------------------------------------------------------------------------


def _shakespeare() -> tuple[str, str, str]:
    place = data.root() / _FILE
    try:
        raw = place.read_bytes()
    except FileNotFoundError:
        raw = _download(place)
    except OSError as error:
        raise _unavailable(place, f"it cannot be read: {error}") from None
    if not _genuine(raw):
        raise _unavailable(place, "damaged: the checksum differs")
    lines = raw.decode("ascii").splitlines(keepends=True)
    source = "tiny_shakespeare (Karpathy 2015), plays of Shakespeare"
    return "".join(lines[:-_TEST_LINES]), "".join(lines[-_TEST_LINES:]), source


def _download(place: Path) -> bytes:
    """The file from the network, written whole or not at all."""
    try:
        with urllib.request.urlopen(_URL, timeout=60) as response:
            raw: bytes = response.read()
    except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
        reason = " ".join(str(error).split()) or type(error).__name__
        raise _unavailable(place, f"the download failed: {reason}") from None
    if not _genuine(raw):
        raise _unavailable(place, "the download failed: the checksum differs")
    part = None
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=place.parent, delete=False) as file:
            part = Path(file.name)
            file.write(raw)
        part.chmod(0o644)  # temporary files are their owner's alone
        os.replace(part, place)
    except OSError as error:
        if part is not None:
            part.unlink(missing_ok=True)
        raise _unavailable(place, f"it cannot be written: {error}") from None
    return raw


def _genuine(raw: bytes) -> bool:
    return hashlib.sha256(raw).hexdigest() == _SHA256


def _unavailable(place: Path, reason: str) -> FileNotFoundError:
    return FileNotFoundError(
        f"the text 'shakespeare' is not available ({reason}). It was looked for in {place}. To get "
        "it: call load('shakespeare') once with a network connection, or set SAM_LAB_DATA to a "
        f"folder that holds {_FILE}, which is {_URL}; remove that file first if it is damaged. "
        "python_reference needs no download."
    )


_READERS: dict[str, Callable[[], tuple[str, str, str]]] = {
    "python_reference": _python_reference,
    "shakespeare": _shakespeare,
}
NAMES = tuple(_READERS)
"""The texts that `load` knows."""

"""A result: everything one experiment measured, in one small JSON file.

The file is strict JSON, written whole or not at all, and sealed with a digest of its contents, so
that a file that was cut short, edited or made by another version is refused with a clear error.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "Columns",
    "Result",
    "ResultError",
    "Rows",
    "Run",
    "SeedRuns",
    "Setting",
    "command",
    "merge",
    "plain",
    "write_whole",
]

SCHEMA = "sam-lab/result/2"
Setting = dict[str, Any]
Columns = dict[str, list[float]]
_NONFINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class ResultError(ValueError):
    """A result file that is damaged, from another schema, or holds something of a wrong type."""


@dataclass(frozen=True)
class Run:
    """One setting with one seed, and the columns it measured.

    ``run["loss"]`` is the column as a float64 array. Columns are one-dimensional and may differ in
    length; a single number makes a column of length one. Floats are kept to six significant
    digits, as in the file, so that a run just made equals the one read back.

    Raises:
        TypeError: when a setting or a column holds something that a result file cannot.
    """

    settings: Setting
    seed: int
    columns: Columns

    def __post_init__(self) -> None:
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise TypeError(f"seed must be an int, got {self.seed!r}")
        settings = plain(self.settings, "settings")
        if not isinstance(settings, dict):
            raise TypeError(f"settings must be a dict, got {self.settings!r:.100}")
        if not isinstance(self.columns, Mapping):
            raise TypeError(f"columns must be a dict of columns, got {self.columns!r:.100}")
        columns = {str(name): _column(name, values) for name, values in self.columns.items()}
        object.__setattr__(self, "settings", settings)
        object.__setattr__(self, "columns", columns)

    def __getitem__(self, name: str) -> NDArray[np.float64]:
        if name not in self.columns:
            raise KeyError(f"no column {name!r}; this run has {', '.join(self.columns) or 'none'}")
        return np.array(self.columns[name], dtype=np.float64)

    def __contains__(self, name: object) -> bool:
        return name in self.columns

    def value(self, name: str) -> float:
        """The one number of a column of length one.

        Raises:
            KeyError: when there is no such column.
            ValueError: when it holds none, or several.
        """
        values = self[name]
        if len(values) != 1:
            raise ValueError(f"column {name!r} must hold one number here, it holds {len(values)}")
        return float(values[0])

    @property
    def label(self) -> str:
        """The settings in words, such as ``lr=0.1, momentum=0.9``."""
        return ", ".join(f"{name}={_short(value)}" for name, value in self.settings.items())


class Rows:
    """Columns that grow by a row at a time: ``rows.add(step=0, loss=2.3)``; then `columns`."""

    def __init__(self) -> None:
        self.columns: Columns = {}

    def add(self, **row: float) -> None:
        """Append a value to each column.

        Raises:
            ValueError: when the row does not name the columns of the first one.
        """
        if not self.columns:
            self.columns = {name: [] for name in row}
        if row.keys() != self.columns.keys():
            raise ValueError(f"a row must have {_listed(self.columns)}, got {_listed(row)}")
        for name, value in row.items():
            self.columns[name].append(value)


@dataclass(frozen=True)
class SeedRuns:
    """All runs of one seed, of which a claim makes one number."""

    seed: int
    config: Mapping[str, Any]
    runs: Sequence[Run]

    def all(self, **settings: Any) -> list[Run]:
        """The runs with these settings; errors as those of `Result.select`."""
        return _select(self.runs, settings)

    def one(self, **settings: Any) -> Run:
        """The only run with these settings.

        Raises:
            ValueError: when none matches, or more than one.
        """
        found = self.all(**settings)
        if len(found) > 1:
            there = "; ".join(run.label for run in found)
            raise ValueError(f"{len(found)} runs match, one was expected: {there}")
        return found[0]

    def base(self, **changed: Any) -> Run:
        """The run with the first setting, or the one that differs from it in this."""
        return self.one(**{**self.runs[0].settings, **changed})

    def where(self, **settings: Any) -> SeedRuns:
        """Only those runs with these settings."""
        return SeedRuns(self.seed, self.config, self.all(**settings))


@dataclass(frozen=True)
class Result:
    """The runs of one experiment at one scale, and where they came from.

    Attributes:
        provenance: for each go in which runs were made (one, or one a shard), its ``seeds``,
            versions, device, command, seconds and date.
    """

    experiment: str
    scale: str
    config: dict[str, Any]
    runs: list[Run]
    provenance: list[dict[str, Any]]

    def __post_init__(self) -> None:
        object.__setattr__(self, "config", plain(self.config, "config"))
        object.__setattr__(self, "provenance", plain(self.provenance, "provenance"))
        seen = set()
        for run in self.runs:
            key = (_setting_key(run.settings), run.seed)
            if key in seen:
                raise ValueError(f"two runs with {run.label} and seed {run.seed}")
            seen.add(key)

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds, in the order in which they were asked for."""
        return tuple(dict.fromkeys(run.seed for run in self.runs))

    @property
    def settings(self) -> list[Setting]:
        """The different settings, in the order of the runs."""
        return list({_setting_key(run.settings): run.settings for run in self.runs}.values())

    @property
    def command(self) -> str:
        """The command line that makes the whole result in one go."""
        return command(self.experiment, self.scale, self.seeds)

    def by_seed(self) -> list[SeedRuns]:
        """The runs of each seed, in the order of `seeds`."""
        return [
            SeedRuns(seed, self.config, [run for run in self.runs if run.seed == seed])
            for seed in self.seeds
        ]

    def select(self, *, seed: int | None = None, **settings: Any) -> list[Run]:
        """The runs with these settings (all seeds, or one), in the order of the file.

        ``result.select(lr=0.1, seed=0)``. Numbers are compared to nine digits.

        Raises:
            ValueError: when no run matches; it names what there is.
        """
        found = self.runs
        if seed is not None:
            found = [run for run in found if run.seed == seed]
            if not found:
                raise ValueError(f"no run with seed={seed!r}; seeds are {_listed(self.seeds)}")
        return _select(found, settings)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the file whole or not at all; returns its path."""
        body = {
            "schema": SCHEMA,
            "experiment": self.experiment,
            "scale": self.scale,
            "config": self.config,
            "seeds": list(self.seeds),
            "provenance": self.provenance,
            "runs": [pack_run(run) for run in self.runs],
        }
        return write_whole(Path(path), seal(body))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Result:
        """Read a result file.

        Raises:
            FileNotFoundError: when there is none.
            ResultError: when it is damaged, from another schema or of wrong types; nothing is
                returned half-read.
        """
        path = Path(path)
        try:
            body = unseal(path.read_bytes(), SCHEMA)
            experiment, scale = _get(body, "experiment", str), _get(body, "scale", str)
            config = _get(body, "config", dict)
            provenance = [_typed(o, "provenance", dict) for o in _get(body, "provenance", list)]
            runs = [unpack_run(run) for run in _get(body, "runs", list)]
            result = cls(experiment, scale, config, runs, provenance)
            if list(result.seeds) != _get(body, "seeds", list):
                raise ResultError("'seeds' does not list the seeds of the runs")
        except ResultError as error:
            raise ResultError(f"{path.name}: {error}") from None
        except (TypeError, ValueError) as error:
            raise ResultError(f"{path.name}: {error}") from error
        return result


def merge(shards: Sequence[Result]) -> Result:
    """One result of several that differ in their seeds alone.

    Runs are in the order of one go: every setting with every seed, seeds in the order of the
    shards. Each shard's provenance is kept.

    Raises:
        ResultError: fewer than two shards; another experiment, scale, config or other settings in
            one of them; or a seed that stands in two.
    """
    if len(shards) < 2:
        raise ResultError(f"at least two results are needed to merge, got {len(shards)}")
    first = shards[0]
    for number, other in enumerate(shards[1:], 2):
        for name in ("experiment", "scale", "config"):
            one, two = getattr(first, name), getattr(other, name)
            if one != two:
                raise ResultError(f"result {number} has another {name}: {_difference(one, two)}")
        if _keys(first.settings) != _keys(other.settings):
            raise ResultError(f"result {number} has other settings than result 1")
        for earlier in shards[: number - 1]:
            shared = set(earlier.seeds) & set(other.seeds)
            if shared:
                raise ResultError(f"seed {min(shared)} stands in two results: a run counts once")
    runs = [
        run
        for setting in first.settings
        for shard in shards
        for run in shard.runs
        if run.settings == setting
    ]
    origins = [origin for shard in shards for origin in shard.provenance]
    return Result(first.experiment, first.scale, first.config, runs, origins)


def command(experiment: str, scale: str, seeds: Iterable[int] = (0, 1, 2), out: str = "") -> str:
    """The command line that makes the result of a preset, in the folder ``out`` if given."""
    seeds = list(seeds)
    chosen = str(len(seeds)) if seeds == list(range(len(seeds))) else ",".join(map(str, seeds))
    # A lone seed is written with a comma, or it would be read as a number of seeds.
    chosen += "," if len(seeds) == 1 and seeds != [0] else ""
    line = f"python -m sam_lab.experiments run {experiment} --scale {scale} --seeds {chosen}"
    return f"{line} --out {out}" if out else line


# --- strict JSON ---------------------------------------------------------------------------------


def plain(value: Any, where: str) -> Any:
    """``value`` as JSON can hold it: tuples become lists; floats have to be finite."""
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:  # numpy and torch scalars
        value = value.item()
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise TypeError(f"{where} must be finite, got {value!r}")
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, where) for item in value]
    raise TypeError(f"{where} must hold numbers, text, lists and dicts only, got {value!r:.100}")


def seal(body: Mapping[str, Any]) -> str:
    """``body`` as JSON text, a line for each entry and each run, with a digest of the contents."""
    lines = []
    for name, value in {**body, "digest": _digest(body)}.items():
        if name == "runs" and value:
            text = "[\n" + ",\n".join("  " + _dumps(item) for item in value) + "\n ]"
        else:
            text = _dumps(value)
        lines.append(f" {_dumps(name)}: {text}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def unseal(data: bytes, schema: str) -> dict[str, Any]:
    """The body of :func:`seal`, checked: whole, of this ``schema``, unchanged since written.

    Raises:
        ResultError: when it is not.
    """

    def refuse(constant: str) -> float:
        raise ResultError(f"holds {constant}, which JSON does not know")

    try:
        body = json.loads(data.decode("utf-8"), parse_constant=refuse)
    except UnicodeDecodeError:
        raise ResultError("damaged: not UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise ResultError(f"damaged or cut short: {error}") from None
    except RecursionError:
        raise ResultError("damaged: nested too deeply") from None
    if not isinstance(body, dict) or "schema" not in body:
        raise ResultError(f"no result file: it does not name its schema ({schema!r} expected)")
    if body["schema"] != schema:
        raise ResultError(f"has schema {body['schema']!r}; this version reads {schema!r}")
    digest = body.pop("digest", None)
    if digest != _digest(body):
        raise ResultError("changed since it was written: its digest does not match; run it again")
    return body


def write_whole(path: Path, text: str) -> Path:
    """Write ``text`` to ``path`` so that the old or the new file stands there at any moment."""
    scratch = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(scratch, "x", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)
    return path


def pack_run(run: Run) -> dict[str, Any]:
    """The run as JSON can hold it; floats that are not finite become words."""
    columns = {name: [_pack(value) for value in values] for name, values in run.columns.items()}
    return {"settings": run.settings, "seed": run.seed, "columns": columns}


def unpack_run(data: Any) -> Run:
    """The inverse of :func:`pack_run`.

    Raises:
        ResultError: when ``data`` is something else.
    """
    columns = {
        name: [_unpack(value) for value in _typed(values, name, list)]
        for name, values in _get(data, "columns", dict).items()
    }
    return Run(_get(data, "settings", dict), _get(data, "seed", int), columns)


def _column(name: Any, values: Any) -> list[float]:
    if hasattr(values, "tolist"):  # numpy arrays and tensors, on any device
        values = values.tolist()
    if isinstance(values, int | float):
        values = [values]
    if not isinstance(values, list | tuple):
        raise TypeError(f"column {name!r} must be a list of numbers, got {values!r:.100}")
    return [_number(name, value) for value in values]


def _number(name: Any, value: Any) -> float:
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        value = value.item()
    if isinstance(value, bool | int):
        return int(value)
    if not isinstance(value, float):
        raise TypeError(f"column {name!r} must hold numbers only, got {value!r:.100}")
    # One NaN object throughout, so that columns with NaN compare equal.
    return math.nan if math.isnan(value) else float(f"{value:.6g}")


def _pack(value: float) -> float | str:
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")


def _unpack(value: Any) -> float:
    if isinstance(value, str) and value in _NONFINITE:
        return _NONFINITE[value]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ResultError(f"a number was expected, got {value!r:.100}")
    return value


def _typed(value: Any, name: str, kind: type) -> Any:
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ResultError(f"{name!r} must be {kind.__name__}, got {value!r:.100}")
    return value


def _get(data: Any, name: str, kind: type) -> Any:
    if not isinstance(data, dict) or name not in data:
        raise ResultError(f"{name!r} is missing")
    return _typed(data[name], name, kind)


def _dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _digest(body: Mapping[str, Any]) -> str:
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _select(runs: Iterable[Run], settings: Mapping[str, Any]) -> list[Run]:
    """The runs with these settings; ValueError, naming what there is, where none has them."""
    found = runs = list(runs)
    for name, value in settings.items():
        wanted = plain(value, name)
        having = [run for run in found if name in run.settings]
        if not having:
            known = dict.fromkeys(key for run in runs for key in run.settings)
            raise ValueError(f"no setting {name!r}; settings are {_listed(known)}")
        found = [run for run in having if _same(run.settings[name], wanted)]
        if not found:
            there = {_short(run.settings[name]): None for run in having}
            raise ValueError(f"no run with {name}={_short(wanted)}; {name} is {_listed(there)}")
    return found


def _setting_key(setting: Setting) -> str:
    return json.dumps(setting, sort_keys=True)


def _keys(settings: Iterable[Setting]) -> set[str]:
    return {_setting_key(setting) for setting in settings}


def _difference(one: Any, two: Any, where: str = "") -> str:
    """The first place in which two plain values differ, such as ``task.lr is 0.1 and 0.2``."""
    if isinstance(one, dict) and isinstance(two, dict):
        for name in [*one, *(name for name in two if name not in one)]:
            if name not in one or name not in two or one[name] != two[name]:
                path = f"{where}.{name}" if where else name
                return _difference(one.get(name, "absent"), two.get(name, "absent"), path)
    return f"{where or 'it'} is {_short(one)} in one and {_short(two)} in the other"


def _same(a: Any, b: Any) -> bool:
    number = (int, float)
    if isinstance(a, number) and isinstance(b, number):
        return math.isclose(a, b, rel_tol=1e-9)
    return bool(a == b)


def _short(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _listed(values: Any) -> str:
    return ", ".join(str(value) for value in values) or "none"

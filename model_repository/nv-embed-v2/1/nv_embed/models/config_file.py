"""config.json, key by key: each value is checked, and what is wrong with one is said in three parts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

from nv_embed.errors import CheckpointError

_MOST = 2**31 - 1  # of a size: beyond it nothing is a network
_LARGEST = 1e30
DTYPES = ("float16", "bfloat16", "float32")


class Section:
    """One object of a config.json."""

    def __init__(self, raw: Any, name: str = "", file: str = "") -> None:
        """Raises CheckpointError if it is no object.

        Args:
            raw: what JSON holds.
            name: of the object within its file; empty for the whole of it.
            file: where it stands, for messages.
        """
        self.name, self._file = name, file
        if not isinstance(raw, dict):
            raise CheckpointError(f"{self._place(name)}: expected a JSON object; got {_shown(raw)}; {self._remedy()}")
        self.raw: dict[str, Any] = raw

    @classmethod
    def of_folder(cls, folder: Path) -> Section:
        """Read `<folder>/config.json`; raises CheckpointError if folder or file are missing or damaged."""
        check_folder(folder)
        return cls.of_file(folder / "config.json")

    @classmethod
    def of_file(cls, path: Path) -> Section:
        """Read a file; raises CheckpointError if it is missing or damaged."""
        return cls(read_json(path), file=str(path))

    def section(self, key: str, default: dict[str, Any] | None = None) -> Section:
        """The object of a key; `default` where it is absent or null."""
        value = self.raw.get(key)
        return Section(default if value is None and default is not None else value, self._name_of(key), self._file)

    def overlaid(self, other: Section) -> Section:
        """The same, with the values of another one in the place of its own."""
        return Section(self.raw | other.raw, self.name, self._file)

    def integer(self, key: str, default: int | None = None) -> int:
        """A size, at least 1; `default` where it is absent or null."""
        value = self.raw.get(key)
        if value is None and default is not None:
            return default
        if type(value) is not int or not 1 <= value <= _MOST:
            self.refuse(key, f"a whole number from 1 to {_MOST}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive number; `default` where it is absent or null."""
        value = self.raw.get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 1 / _LARGEST < value < _LARGEST:
            self.refuse(key, "a positive number")
        return float(value)

    def require(self, key: str, required: object, *, is_optional: bool = False) -> None:
        """Refuse every other value: one that belongs to another model is not guessed at."""
        value = self.raw.get(key)
        if value is None and is_optional:
            return
        if type(value) is not type(required) or value != required:
            self.refuse(key, json.dumps(required))

    def dtype(self) -> str:
        """Of the weights: `dtype`, which was `torch_dtype` before transformers 4.56."""
        values = {key: self.raw[key] for key in ("dtype", "torch_dtype") if self.raw.get(key) is not None}
        for key, value in values.items():
            if not isinstance(value, str) or value not in DTYPES:
                self.refuse(key, "'float16', 'bfloat16' or 'float32'")
        if not values:
            self.refuse("dtype", "'float16', 'bfloat16' or 'float32', here or as torch_dtype")
        first, *others = values.values()
        if others and first != others[0]:
            self.refuse("dtype", f"the same as torch_dtype, {others[0]!r}")
        return str(first)

    def refuse(self, key: str, expected: str) -> NoReturn:
        """Raise CheckpointError: what was expected of a key, what it holds, what to do."""
        raise CheckpointError(
            f"{self._place(self._name_of(key))}: expected {expected}; got {_shown(self.raw.get(key))}; {self._remedy()}"
        )

    def _remedy(self) -> str:
        name = Path(self._file or "config.json").name
        return f"take {name} as it was published with the weights, or another checkpoint"

    def _place(self, name: str) -> str:
        return ": ".join(filter(None, (self._file, name))) or "config.json"

    def _name_of(self, key: str) -> str:
        return f"{self.name}.{key}" if self.name else key


def check_folder(folder: Path) -> None:
    """Raise CheckpointError if there is no such folder."""
    if not folder.is_dir():
        raise CheckpointError(
            f"model_path: expected the folder of a checkpoint; got {str(folder)!r}, which is "
            f"{'no folder' if folder.exists() else 'missing'}; download the checkpoint there or correct model_path"
        )


def read_json(path: Path) -> Any:
    """What a file holds; raises CheckpointError if it is missing or damaged."""
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; model_path must hold the whole published checkpoint")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: expected JSON; got a file that ends early or is damaged ({error}); download it again"
        ) from None


def _shown(value: object) -> str:
    """Enough of a value to recognize it."""
    text = "null" if value is None else ascii(value)
    return text if len(text) <= 80 else text[:80] + "..."

"""A folder on any file system: names in, bytes out. A file that it writes is there whole, or not at all."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
from pyarrow import fs

from nv_embed_client.errors import InvalidInput

_WRITING = "_writing"  # files on their way to their names


@dataclass(frozen=True, slots=True)
class Entry:
    """One file of a folder."""

    name: str  # relative to the folder
    size: int
    modified_ns: int | None


@dataclass(frozen=True, slots=True)
class Folder:
    """A folder, or a single file with the folder around it."""

    files: Any  # a pyarrow.fs.FileSystem
    path: str
    only: str | None = None  # the single file

    @classmethod
    def at(cls, address: str) -> Folder:
        """The folder at a local path, or at a URI such as s3://bucket/folder, which pyarrow or fsspec knows.

        Raises:
            InvalidInput: neither knows it, or it cannot be reached.
        """
        try:
            files, path = _resolved(address)
            kind = files.get_file_info(path).type
        except (OSError, ValueError, ImportError) as error:
            raise InvalidInput.of(
                expected="a path, or an address that pyarrow or fsspec reads",
                got=f"{address!r}: {error}",
                remedy="correct it, or install what fsspec names",
            ) from None
        if kind == fs.FileType.File:
            folder, _, name = path.rpartition("/")
            return cls(files, folder, name)
        return cls(files, path)

    def entries(self) -> list[Entry]:
        """Every file, by name, at any depth; none if the folder is not there. Hidden ones and `_...` are left out."""
        if self.only is not None:
            found = [self.files.get_file_info(self._path(self.only))]
        else:
            selector = fs.FileSelector(self.path, recursive=True, allow_not_found=True)
            found = [info for info in self.files.get_file_info(selector) if info.type == fs.FileType.File]
        start = len(self.path.rstrip("/")) + 1
        entries = [Entry(info.path[start:], info.size, info.mtime_ns) for info in found]
        shown = [each for each in entries if not any(part[0] in "._" for part in each.name.split("/"))]
        return sorted(shown, key=lambda each: each.name)

    def is_empty(self) -> bool:
        """Whether nothing at all is there, or only what a first run left that was killed before it had a plan."""
        selector = fs.FileSelector(self.path, allow_not_found=True)
        return self.only is None and all(info.base_name == _WRITING for info in self.files.get_file_info(selector))

    def read(self, name: str) -> bytes | None:
        """The content of a file, None if it is not there."""
        try:
            with self.files.open_input_stream(self._path(name), compression=None) as stream:
                content: bytes = stream.read()
                return content
        except FileNotFoundError:
            return None

    def open(self, name: str) -> Any:
        """A file to read at any place."""
        return self.files.open_input_file(self._path(name))

    def open_stream(self, name: str) -> Any:
        """A file to read from its front; decompressed if its name says that it is compressed."""
        return self.files.open_input_stream(self._path(name), compression="detect")

    def write(self, name: str, content: bytes) -> None:
        """Have a file with this content, in place of one of that name."""
        aside = f"{_WRITING}/{uuid.uuid4().hex}"
        for each in (aside, name):
            self.files.create_dir(self._path(each).rpartition("/")[0], recursive=True)
        with self.files.open_output_stream(self._path(aside), compression=None) as stream:
            stream.write(content)
        self.files.move(self._path(aside), self._path(name))

    def remove(self, name: str) -> None:
        """Have no file of that name."""
        if self.files.get_file_info(self._path(name)).type == fs.FileType.File:
            self.files.delete_file(self._path(name))

    def tidy(self) -> None:
        """Remove what killed processes left half written."""
        if self.files.get_file_info(self._path(_WRITING)).type == fs.FileType.Directory:
            self.files.delete_dir(self._path(_WRITING))

    def _path(self, name: str) -> str:
        return f"{self.path.rstrip('/')}/{name}"


def absolute(address: str) -> str:
    """The same address for processes with another working directory."""
    return address if "://" in address else str(Path(address).absolute())


def _resolved(address: str) -> tuple[Any, str]:
    if "://" not in address:
        return fs.LocalFileSystem(), absolute(address)
    try:
        found: tuple[Any, str] = fs.FileSystem.from_uri(address)
        return found
    except pa.ArrowInvalid as error:
        if "nrecognized filesystem" not in str(error):
            raise
    other, path = fsspec.core.url_to_fs(address)
    return fs.PyFileSystem(fs.FSSpecHandler(other)), path

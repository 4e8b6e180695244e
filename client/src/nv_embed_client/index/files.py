"""The text files of a folder; knows neither passages nor vectors."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field

from nv_embed_client.errors import InvalidInput

MAX_BYTES = 64 * 2**20
"""Of a file, because it is read as a whole."""
_HEAD_BYTES = 8192  # binary files mostly have a zero byte in these


@dataclass
class TextFiles:
    """The text files under some folders or files; iterating reads them, in the order of their names.

    Hidden files and folders are left out, unless they are named in `paths`. So is what is not UTF-8, and what is no
    regular file. Links to folders are not followed.
    """

    paths: list[str]
    excluded: str
    """A folder that is left out, too."""
    num_hidden: int = 0
    """Files and folders that were left out, so far."""
    num_binary: int = 0
    """Files that were left out, so far, because they are not text."""
    unread: dict[str, InvalidInput] = field(default_factory=dict)
    """Why files could not be read, so far, by their absolute paths."""

    def __post_init__(self) -> None:
        """
        Raises:
            InvalidInput: a path does not exist, or is the excluded folder.
        """
        self.paths = [os.path.abspath(path) for path in self.paths]
        self.excluded = os.path.abspath(self.excluded)
        for path in self.paths:
            if not os.path.exists(path):
                raise InvalidInput.of(
                    expected="folders or files that exist", got=repr(path),
                    remedy="correct the path; to forget a folder that is gone, index the one that it was in",
                )  # fmt: skip
            if path == self.excluded:
                raise InvalidInput.of(
                    expected="folders or files other than the index itself", got=repr(path), remedy="name another path"
                )

    def __iter__(self) -> Iterator[tuple[str, str]]:
        """The absolute path and the text of each."""
        seen: set[str] = set()
        for path in self.paths:
            for file in self._below(path) if os.path.isdir(path) else [path]:
                if file in seen:
                    continue
                seen.add(file)
                try:
                    file.encode()
                    text = self._text(file)
                except UnicodeEncodeError:
                    self.unread[file] = InvalidInput.of(
                        expected="a name in UTF-8", got=ascii(file), remedy="rename the file"
                    )
                except OSError as error:
                    self.unread[file] = InvalidInput.of(
                        expected="a file that can be read", got=f"{file}: {error.strerror}",
                        remedy="change its permissions, or index others",
                    )  # fmt: skip
                except InvalidInput as error:
                    self.unread[file] = error
                else:
                    if text is None:
                        self.num_binary += 1
                    else:
                        yield file, text

    def _below(self, folder: str) -> Iterator[str]:
        for here, folders, files in os.walk(folder, onerror=self._unread_folder):
            visible = sorted(name for name in folders if not name.startswith("."))
            self.num_hidden += len(folders) - len(visible)
            folders[:] = [name for name in visible if os.path.join(here, name) != self.excluded]
            for name in sorted(files):
                if name.startswith("."):
                    self.num_hidden += 1
                else:
                    yield os.path.join(here, name)

    def _unread_folder(self, error: OSError) -> None:
        self.unread[str(error.filename)] = InvalidInput.of(
            expected="a folder that can be read", got=f"{error.filename}: {error.strerror}",
            remedy="change its permissions, or index others",
        )  # fmt: skip

    @staticmethod
    def _text(path: str) -> str | None:
        """What the file says; None: it is not text."""
        status = os.stat(path)  # before it is opened, because opening a pipe waits
        if not stat.S_ISREG(status.st_mode):
            return None
        with open(path, "rb") as file:
            head = file.read(_HEAD_BYTES)
            if b"\0" in head:
                return None
            if status.st_size > MAX_BYTES:
                raise InvalidInput.of(
                    expected=f"text files of at most {MAX_BYTES:,} bytes", got=f"{path} with {status.st_size:,}",
                    remedy="split it",
                )  # fmt: skip
            try:
                return (head + file.read()).decode("utf-8-sig")
            except UnicodeDecodeError:
                return None

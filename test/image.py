"""The Dockerfile as data, and a folder laid out like the image: what stands in for a build where Docker is absent."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from serving import ROOT


@dataclass(frozen=True)
class Image:
    """What the Dockerfile says about a container."""

    entrypoint: list[str]
    command: list[str]
    user: int
    environment: dict[str, str]
    copies: list[tuple[list[str], str]]
    """Sources, relative to the repository and perhaps with a `*`, and where they go."""
    runs: list[str]

    @property
    def links(self) -> dict[str, str]:
        """Where each link leads that a RUN makes."""
        made = (
            re.fullmatch(r"ln --symbolic (\S+) (\S+)", part.strip()) for run in self.runs for part in run.split("&&")
        )
        return {match[2]: match[1] for match in made if match}

    @classmethod
    def read(cls, root: Path = ROOT) -> Image:
        text = (root / "Dockerfile").read_text(encoding="utf-8")
        text = re.sub(r"^#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ")
        lines = dict[str, list[str]]()
        for line in filter(None, text.splitlines()):
            word, _, rest = line.strip().partition(" ")
            lines.setdefault(word, []).append(rest.strip())
        copies = [copy.split() for copy in lines["COPY"]]
        return cls(
            entrypoint=json.loads(lines["ENTRYPOINT"][-1]),
            command=json.loads(lines["CMD"][-1]),
            user=int(lines["USER"][-1]),
            environment=dict(pair.split("=", 1) for line in lines["ENV"] for pair in line.split()),
            copies=[(sources, target) for *sources, target in copies],
            runs=lines["RUN"],
        )

    def files(self, root: Path = ROOT) -> dict[str, Path]:
        """What reaches the image: its path there, without a slash at the start, and the file here."""
        sends = sent_by(root / ".dockerignore")
        files = {}
        for sources, target in self.copies:
            for source in (path for pattern in sources for path in sorted(root.glob(pattern))):
                for file in sorted(source.rglob("*")) if source.is_dir() else [source]:
                    if file.is_file() and sends(file.relative_to(root).as_posix()):
                        inside = file.relative_to(source) if source.is_dir() else file.name
                        files[str(Path(target, inside)).lstrip("/")] = file
        return files

    def lay_out(self, folder: Path) -> None:
        """Copy those files into a folder that stands for the image's root, and make the links."""
        for inside, file in self.files().items():
            (folder / inside).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, folder / inside)
        for link, target in self.links.items():
            if not link.startswith("/usr/"):  # which is not of this image
                (folder / link.lstrip("/")).symlink_to(target)


def sent_by(dockerignore: Path):
    """Whether a path, relative to the repository, travels to the Docker daemon: the last line that matches decides."""
    rules = []
    for line in dockerignore.read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            pattern = re.escape(line.lstrip("!"))
            pattern = pattern.replace(r"\*\*/", "(?:.*/)?").replace(r"\*", "[^/]*")
            rules.append((line.startswith("!"), re.compile(rf"{pattern}(?:/.*)?")))

    def sends(path: str) -> bool:
        return next((sent for sent, rule in reversed(rules) if rule.fullmatch(path)), True)

    return sends

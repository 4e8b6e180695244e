"""A folder's fingerprint: what it notices, what it does not, and that it does not depend on the place."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import pytest
from nv_embed.models.fingerprint import fingerprint


@pytest.fixture
def checkpoint(mini, tmp_path) -> Path:
    return Path(shutil.copytree(mini, tmp_path / "checkpoint"))


def flip_a_bit(path: Path, place: int) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        (byte,) = file.read(1)
        file.seek(place)
        file.write(bytes([byte ^ 1]))


def test_it_depends_on_neither_place_nor_dates_nor_links(mini, checkpoint, tmp_path):
    expected = fingerprint(mini)
    assert len(bytes.fromhex(expected)) == 16
    linked = tmp_path / "linked"  # as in Hugging Face's cache
    linked.mkdir()
    for path in checkpoint.iterdir():
        (linked / path.name).symlink_to(path)
    assert fingerprint(checkpoint) == fingerprint(linked) == expected


def test_the_default_checkpoint_has_the_fingerprint_that_it_had(mini):
    """It is in what clients have stored: a release that changes how it is made would disown their vectors."""
    assert fingerprint(mini) == "b7ae75e85fdf7ae5d14bf05ac3aa5199"


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
@pytest.mark.parametrize("place", [0, 0.37, 1])
def test_any_byte_of_a_small_file_is_noticed(mini, checkpoint, name, place):
    flip_a_bit(checkpoint / name, int(place * ((checkpoint / name).stat().st_size - 1)))
    assert fingerprint(checkpoint) != fingerprint(mini)


def test_a_model_card_is_not_noticed_nor_another_format_of_the_weights(mini, checkpoint):
    (checkpoint / "README.md").write_text("another card")
    (checkpoint / "results.json").unlink()
    (checkpoint / "onnx").mkdir()
    (checkpoint / "onnx" / "config.json").write_text("{}")
    assert fingerprint(checkpoint) == fingerprint(mini)


def test_the_files_of_a_module_count_wherever_modules_json_says(tmp_path):
    (tmp_path / "modules.json").write_text('[{"type": "a.Pooling", "path": "pooling"}]')
    (tmp_path / "pooling").mkdir()
    seen = set()
    for mode in ("mean", "cls"):
        (tmp_path / "pooling" / "config.json").write_text(f'{{"pooling_mode": "{mode}"}}')
        seen.add(fingerprint(tmp_path))
    assert len(seen) == 2


def test_a_file_moved_or_cut_elsewhere_is_noticed(tmp_path):
    seen = set()
    for number, (first, second) in enumerate([(b"ab", b"c"), (b"a", b"bc"), (b"c", b"ab")]):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "model-1.safetensors").write_bytes(first)
        (folder / "model-2.safetensors").write_bytes(second)
        seen.add(fingerprint(folder))
    assert len(seen) == 3


@pytest.fixture
def large(tmp_path) -> tuple[Path, int]:
    """A file with a table of 80 MiB and a norm of 8 KiB behind it, and where the first begins."""
    table, norm = 80 * 2**20, 8 * 2**10
    header = json.dumps({
        "__metadata__": {"format": "pt"},
        "norm": {"dtype": "F16", "shape": [norm // 2], "data_offsets": [table, table + norm]},
        "table": {"dtype": "F16", "shape": [table // 2], "data_offsets": [0, table]},
    }).encode()  # fmt: skip
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + table + norm)
    return path, 8 + len(header)


@pytest.mark.parametrize("place", [0, 4095, 40 * 2**20, 80 * 2**20 - 1, 80 * 2**20, 80 * 2**20 + 5000, -1])
def test_a_change_at_the_sampled_places_of_a_large_file_is_noticed(large, place):
    path, begin = large
    before = fingerprint(path.parent)
    flip_a_bit(path, begin + place if place >= 0 else path.stat().st_size - 1)
    assert fingerprint(path.parent) != before


def test_a_change_between_the_sampled_places_of_a_large_file_is_not_noticed(large):
    path, begin = large
    before = fingerprint(path.parent)
    flip_a_bit(path, begin + 10 * 2**20)
    assert fingerprint(path.parent) == before


def test_a_large_file_is_not_read_in_full(tmp_path):
    """Sizes of the published shards, most of it a hole: reading 5 GB would take seconds, and memory if it were kept."""
    header = json.dumps({
        f"layer.{n}": {"dtype": "F16", "shape": [2**26], "data_offsets": [n * 2**27, (n + 1) * 2**27]}
        for n in range(40)
    }).encode()  # fmt: skip
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + 40 * 2**27)
    before = _bytes_read()
    fingerprint(tmp_path)
    assert _bytes_read() - before < 4 * 2**20


def _bytes_read() -> int:
    """By this process so far."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("rchar"))

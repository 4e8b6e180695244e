"""Which checkpoint a folder holds, as a short text; knows files, but neither torch nor kinds of checkpoints."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from nv_embed.models.pipeline import read_modules

# What says how texts become vectors. Model cards, pictures, results and code are left out.
_FILES = (
    "*.safetensors", "config*.json", "modules.json", "sentence_*.json", "tokenizer*", "special_tokens_map.json",
    "added_tokens.json", "vocab.*", "merges.txt", "*.model",
)  # fmt: skip
_WHOLE_BYTES = 2**26  # a larger file of tensors is sampled
_SAMPLE_BYTES = 2**12
_SAMPLES = 3  # of each tensor: its start, its middle, its end


def fingerprint(folder: Path) -> str:
    """32 hexadecimal digits: the same for the same files wherever they lie, others for another checkpoint.

    Files up to 64 MiB count byte by byte. Of a larger file of tensors these count: its size, its header, and of each
    tensor 4 KiB at the start, in the middle and at the end. So what is not noticed is a change that spares all these
    places, such as one row of a large table. Training changes every place.

    Raises:
        CheckpointError: modules.json is damaged.
        OSError: a file may not be read.
    """
    digest = hashlib.blake2b(digest_size=16)
    folders = {folder, *(folder / inner for _, inner in read_modules(folder))}
    files = {path for each in folders for name in _FILES for path in each.glob(name)}
    for path in sorted(path for path in files if path.is_file()):
        name = path.relative_to(folder).as_posix().encode("utf-8", "surrogateescape")
        content = hashlib.blake2b()
        for part in _parts(path):
            content.update(part)
        digest.update(b"%d:%s %d:" % (len(name), name, path.stat().st_size) + content.digest())
    return digest.hexdigest()


def _parts(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        size = path.stat().st_size
        if path.suffix != ".safetensors" or size <= _WHOLE_BYTES:
            while part := file.read(2**20):
                yield part
            return
        # 8 bytes, the length of the header; the header, JSON with the place of each tensor behind it; the tensors.
        header = file.read(int.from_bytes(file.read(8), "little"))
        yield header
        begin = file.tell()
        places = (tensor["data_offsets"] for name, tensor in json.loads(header).items() if name != "__metadata__")
        for start, stop in sorted(places):
            last = max(stop - start - _SAMPLE_BYTES, 0)
            for number in range(_SAMPLES):
                file.seek(begin + start + last * number // (_SAMPLES - 1))
                yield file.read(min(_SAMPLE_BYTES, stop - start))

"""The folder of a static twin: files that model2vec and sentence-transformers load, and a model card."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from string import Template

import numpy as np
from model2vec import StaticModel
from tokenizers import Tokenizer

from nv_embed_client import __version__
from nv_embed_client.distill.fit import Rows
from nv_embed_client.errors import InvalidInput

_CARD = Template("""\
---
library_name: model2vec
license: other
tags:
- embeddings
- static-embeddings
- sentence-transformers
---
# A static twin

A table of $num_tokens tokens with $dimensions numbers each. A text's vector is the mean of its tokens' rows, with
length 1. It was made on $date from the vectors of another model, its teacher, and holds none of its weights.

| | |
| --- | --- |
| teacher | `$teacher`, as its server names it; $teacher_dimensions dimensions |
| taught with | $taught texts, as documents |
| mean cosine to the teacher on $kept_out further texts | $cosine |
| made by | nv-embed-client $version |

$licence

## Use

```python
from model2vec import StaticModel

model = StaticModel.from_pretrained("this/folder")
```

`SentenceTransformer("this/folder")` and LangChain's `Model2vecEmbeddings("this/folder")` give the same vectors. Put no
instruction before a query: this model would count its words as the query's. Its vectors are no neighbours of the
teacher's: embed an index and its queries with one of the two. It does not read the order of words, and does not tell
capitals from small letters.
""")


def licence_note(teacher: str) -> str:
    """What whoever uses a twin should know; `teacher`: as its server names it."""
    return (
        f"The licence of its teacher, {teacher}, may bind this twin, too. Read the licence of the model that was "
        "served under this name before you use this folder or pass it on."
    )


@contextmanager
def prepared(out: Path) -> Iterator[Path]:
    """The folder, made before the work, so that a wrong path does not cost it. If the work fails, none is left behind.

    Raises:
        InvalidInput: it cannot be made, or it has files.
    """
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
        empty = next(out.iterdir(), None) is None
    except OSError as error:
        raise InvalidInput.of(
            expected="a folder that can be made", got=f"{str(out)!r}: {error.strerror}", remedy="correct the path"
        ) from None
    if not empty:
        raise InvalidInput.of(
            expected="a folder that is empty or does not exist",
            got=f"{str(out)!r} with files in it",
            remedy="choose another, or empty it",
        )
    try:
        yield out
    except BaseException:
        with suppress(OSError):  # it has files by now
            for folder in made:
                folder.rmdir()
        raise


def write(out: Path, tokenizer: Tokenizer, rows: Rows, *, teacher: str, **facts: object) -> None:
    """The files; `teacher`: as its server names it; `facts`: what else the model card says."""
    model = StaticModel(np.ascontiguousarray(rows), tokenizer, normalize=True, max_length=None)
    model.save_pretrained(out)
    # safetensors lets nobody else read its file; a server may run as somebody else.
    (out / "model.safetensors").chmod((out / "tokenizer.json").stat().st_mode)
    card = _CARD.substitute(
        facts, teacher=teacher, num_tokens=len(rows), dimensions=rows.shape[1], licence=licence_note(teacher),
        version=__version__,
    )  # fmt: skip
    (out / "README.md").write_text(card, encoding="utf-8")  # over model2vec's, which names a licence of its own

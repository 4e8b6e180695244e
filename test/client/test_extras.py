"""What somebody reads who has the client and not the extra."""

import subprocess
import sys

import pytest
from conftest import REPO

ENCODER = "import nv_embed_client; nv_embed_client.NVEmbedEncoder().similarity([[1.0]], [[1.0]])"

PARQUET = "from nv_embed_client.cli.rows import rows_of; next(rows_of('a.parquet'))"


@pytest.mark.slow  # each imports much in a process of its own
@pytest.mark.parametrize(
    ("extra", "missing", "statement"),
    [
        ("distill", "model2vec", "import nv_embed_client.distill"),
        ("gateway", "fastapi", "import nv_embed_client.gateway.__main__"),
        ("index", "lancedb", "import nv_embed_client.index"),
        ("parquet", "pyarrow", PARQUET),
        ("bulk", "ray", "from nv_embed_client.cli.__main__ import main; main(['bulk', 'a', 'b'])"),
        ("langchain", "langchain_core", "import nv_embed_client.langchain"),
        ("llama-index", "llama_index", "import nv_embed_client.llama_index"),
        ("sentence-transformers", "torch", ENCODER),
        ("mteb", "mteb", "import nv_embed_client.mteb"),
        ("chroma", "chromadb", "import nv_embed_client.chroma"),
        ("bertopic", "bertopic", "import nv_embed_client.bertopic"),
        ("keybert", "keybert", "import nv_embed_client.keybert"),
    ],
)
def test_a_missing_extra_is_named(extra, missing, statement):
    hide = f"import sys; sys.modules[{missing!r}] = None"
    done = subprocess.run([sys.executable, "-c", f"{hide}; {statement}"], capture_output=True, text=True, check=False)
    last = done.stderr.splitlines()[-1]
    assert f"expected the module {missing}" in last
    assert f'pip install "./client[{extra}]" in a clone of the repository' in last
    assert f"\n{extra} = [" in (REPO / "client" / "pyproject.toml").read_text(encoding="utf-8")

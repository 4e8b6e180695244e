"""sentence-transformers behind FastAPI, as one would write it in an afternoon: to be measured, not to be used.

    MODEL=/models/all-MiniLM-L6-v2 uvicorn fastapi_server:app --app-dir benchmarks/peers

One `encode` for each request, in a thread of the pool that FastAPI has for such functions. DTYPE, float32 if it is not
set, is the precision of the network.
"""

import base64
import os
from typing import Literal

import torch
from fastapi import FastAPI
from pydantic import BaseModel
from sentence_transformers import SentenceTransformer

app = FastAPI()
dtype = getattr(torch, os.environ.get("DTYPE", "float32"))
model = SentenceTransformer(os.environ["MODEL"], device="cpu", model_kwargs={"dtype": dtype})


class EmbeddingsRequest(BaseModel):
    """What this server understands of OpenAI's; other fields are ignored."""

    input: str | list[str]
    model: str = ""
    encoding_format: Literal["float", "base64"] = "float"


@app.get("/health")
def health() -> dict[str, str]:
    return {"status": "ok"}


@app.post("/v1/embeddings")
def embeddings(request: EmbeddingsRequest) -> dict[str, object]:
    texts = [request.input] if isinstance(request.input, str) else request.input
    rows = model.encode(texts, normalize_embeddings=True, show_progress_bar=False).astype("<f4")
    if request.encoding_format == "base64":
        vectors = [base64.b64encode(row.tobytes()).decode() for row in rows]
    else:
        vectors = rows.tolist()
    data = [{"object": "embedding", "index": i, "embedding": vector} for i, vector in enumerate(vectors)]
    return {"object": "list", "model": request.model, "data": data, "usage": {"prompt_tokens": 0, "total_tokens": 0}}

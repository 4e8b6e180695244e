"""The vectors that all must give: sentence-transformers itself, in float32, one text at a time.

    python benchmarks/peers/reference.py FOLDER < texts.json > vectors.json

That is how every server here is asked to compute, whatever it batches.
"""

import json
import sys

from sentence_transformers import SentenceTransformer

model = SentenceTransformer(sys.argv[1], device="cpu")
json.dump([model.encode(text, normalize_embeddings=True).tolist() for text in json.load(sys.stdin)], sys.stdout)

"""Embeds and ranks through a server: `check.py URL MODEL [CA [CERTIFICATE KEY]]`. Exit code 0 if that works."""

import sys

from nv_embed_client import TLS, NVEmbedClient

url, model, *files = sys.argv[1:]
tls = TLS(files[0], private_key=files[2], certificate_chain=files[1]) if files[1:] else TLS(*files) if files else None
passages = ["Bread rises because yeast gives off gas.", "The moon shines because the sun lights it."]
with NVEmbedClient(url, model_name=model, tls=tls) as client:
    scores = (client.embed_query("Why does bread dough rise?") @ client.embed_documents(passages).T)[0]
for score, passage in zip(scores, passages, strict=True):
    print(f"{score:6.3f}  {passage}")
if scores[0] <= scores[1]:
    sys.exit("expected the first passage to rank first; got the other; look at the server's log")

"""A corpus to vectors in Parquet with Ray, and from there into LanceDB; needs the extra `bulk`."""

from nv_embed_client.extras import needs_extra

with needs_extra("bulk"):
    from nv_embed_client.bulk.job import Summary as Summary
    from nv_embed_client.bulk.job import embed_corpus as embed_corpus
    from nv_embed_client.bulk.lance import Loaded as Loaded
    from nv_embed_client.bulk.lance import load as load
    from nv_embed_client.bulk.plan import Wish as Wish

"""Files to a folder that can be searched: passages of text with their vectors, in LanceDB. Needs the extra `[index]`.

`files` reads, `passages` cuts, `store` keeps, and `indexing` does what changed since the last time.
"""

from nv_embed_client.index.files import TextFiles
from nv_embed_client.index.indexing import Progress, Summary, index
from nv_embed_client.index.store import Hit, Store

__all__ = ["index", "Progress", "Summary", "Store", "Hit", "TextFiles"]

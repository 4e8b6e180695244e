"""Make a static twin of a served model, from its vectors alone. Needs the extra `distill`."""

from nv_embed_client.extras import needs_extra

with needs_extra("distill"):
    from nv_embed_client.distill.folder import LICENCE
    from nv_embed_client.distill.twin import Twin, distill

__all__ = ["LICENCE", "Twin", "distill"]

"""Make a static twin of a served model, from its vectors alone. Needs the extra `distill`."""

from nv_embed_client.extras import needs_extra

with needs_extra("distill"):
    from nv_embed_client.distill.folder import licence_note
    from nv_embed_client.distill.twin import Twin, distill

__all__ = ["Twin", "distill", "licence_note"]

"""An OpenAI-style door to the server: `POST /v1/embeddings` in front of Triton. Needs the extra `gateway`."""

from nv_embed_client.extras import needs_extra

with needs_extra("gateway"):
    from nv_embed_client.gateway.app import create_app
    from nv_embed_client.gateway.settings import GatewaySettings

__all__ = ["GatewaySettings", "create_app"]

"""What probes and dashboards ask: alive, ready, counted, and NVIDIA's NIM's description of itself."""

from __future__ import annotations

from typing import Any, Literal

from fastapi import APIRouter, Response
from pydantic import BaseModel

from nv_embed_client.gateway import refusals
from nv_embed_client.gateway.embedder import Embedder
from nv_embed_client.gateway.metrics import GatewayMetrics
from nv_embed_client.gateway.openapi import VERSION, responses
from nv_embed_client.gateway.settings import GatewaySettings


class Health(BaseModel):
    """A gateway that is well."""

    status: Literal["live", "ready"]


class NIMLive(BaseModel):
    """A gateway that answers, in NIM's shape."""

    object: Literal["health.response"]
    message: Literal["live"]
    live: Literal[True]


class NIMReady(BaseModel):
    """A gateway that can embed, in NIM's shape."""

    object: Literal["health.response"]
    message: Literal["ready"]
    ready: Literal[True]


class License(BaseModel):
    """Of the gateway, not of the model."""

    name: str
    path: str
    sha: str
    size: int
    url: str
    type: str
    content: str


class ModelInfo(BaseModel):
    """A model behind the gateway."""

    modelUrl: str
    shortName: str


class Metadata(BaseModel):
    """The gateway and its model, in NIM's shape; empty where NIM speaks of its own files."""

    version: str
    assetInfo: list[str]
    licenseInfo: License
    modelInfo: list[ModelInfo]
    repository_override: str
    selectedModelProfileId: str


def operations(settings: GatewaySettings, embedder: Embedder, metrics: GatewayMetrics) -> APIRouter:
    """The routes of one gateway."""
    router = APIRouter()

    async def check_ready() -> None:
        if not await embedder.is_ready():
            raise refusals.unavailable(
                f"expected a server that has loaded {', '.join(settings.model_names)}; got none that answers so; try "
                "again later"
            )

    @router.get("/health/live", summary="Is the gateway alive?", response_model=Health)
    async def live() -> dict[str, str]:
        """200 as long as the process answers."""
        return {"status": "live"}

    @router.get("/v1/health/live", summary="Is the gateway alive? In NIM's shape", response_model=NIMLive)
    async def nim_live() -> dict[str, Any]:
        """200 as long as the process answers."""
        return {"object": "health.response", "message": "live", "live": True}

    @router.get("/health", summary="As /health/ready", response_model=Health, responses=responses(503))
    @router.get("/health/ready", summary="Can it embed?", response_model=Health, responses=responses(503))
    async def ready() -> dict[str, str]:
        """200 when Triton answers and its models are loaded, else 503."""
        await check_ready()
        return {"status": "ready"}

    @router.get(
        "/v1/health/ready", summary="Can it embed? In NIM's shape", response_model=NIMReady, responses=responses(503)
    )
    async def nim_ready() -> dict[str, Any]:
        """200 when Triton answers and its models are loaded, else 503."""
        await check_ready()
        return {"object": "health.response", "message": "ready", "ready": True}

    @router.get(
        "/metrics",
        summary="Prometheus metrics",
        response_class=Response,
        responses={200: {"description": "Prometheus' text format", "content": {"text/plain": {}}}},
    )
    async def prometheus() -> Response:
        """Requests, texts, tokens, durations and clients that hung up."""
        return Response(metrics.exposition(), media_type="text/plain; version=0.0.4")

    @router.get("/v1/metadata", summary="NIM's metadata", response_model=Metadata, responses=responses(401))
    async def metadata() -> dict[str, Any]:
        """What NIM says of itself."""
        return {
            "version": VERSION,
            "assetInfo": [],
            "licenseInfo": {
                "name": "Apache License 2.0",
                "path": "",
                "sha": "",
                "size": 0,
                "url": "https://www.apache.org/licenses/LICENSE-2.0",
                "type": "Apache-2.0",
                "content": "",
            },
            "modelInfo": [{"modelUrl": "", "shortName": settings.default_model}],
            "repository_override": "",
            "selectedModelProfileId": "",
        }

    return router

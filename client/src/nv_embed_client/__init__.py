"""Client of NV-Embed-v2 behind NVIDIA Triton.

    from nv_embed_client import NVEmbedClient

    with NVEmbedClient("localhost:8001") as client:
        scores = client.embed_query("...") @ client.embed_documents(["...", "..."]).T

Adapters are modules of their own, each with an extra of the same name: `bertopic`, `chroma`, `gateway`, `keybert`,
`langchain`, `llama_index`, `mteb`, and without an extra `beir`. So is `distill`, which makes a static twin.
"""

from nv_embed_client.async_client import AsyncNVEmbedClient
from nv_embed_client.client import NVEmbedClient
from nv_embed_client.connection import TLS, Settings
from nv_embed_client.embedding_type import packed
from nv_embed_client.errors import (
    AccessDenied,
    ClientClosed,
    DeadlineExceeded,
    Failure,
    InvalidInput,
    ModelNotFound,
    NVEmbedError,
    PartialFailure,
    ServerFailure,
    ServerTooOld,
    Unavailable,
)
from nv_embed_client.grpc_transport import GrpcTransport
from nv_embed_client.instructions import DOCUMENT_INSTRUCTIONS, QUERY_INSTRUCTION, TASK_INSTRUCTIONS, instruction_of
from nv_embed_client.model_info import ModelInfo
from nv_embed_client.retry import RetryPolicy
from nv_embed_client.sentence_transformers import NVEmbedEncoder
from nv_embed_client.transport import MockTransport, Transport
from nv_embed_client.wire import EmbedRequest, EmbedResult

__version__ = "0.1.0"

__all__ = [
    "NVEmbedClient",
    "AsyncNVEmbedClient",
    "NVEmbedEncoder",
    "EmbedRequest",
    "EmbedResult",
    "ModelInfo",
    "Transport",
    "GrpcTransport",
    "MockTransport",
    "RetryPolicy",
    "TLS",
    "Settings",
    "QUERY_INSTRUCTION",
    "TASK_INSTRUCTIONS",
    "DOCUMENT_INSTRUCTIONS",
    "instruction_of",
    "packed",
    "NVEmbedError",
    "InvalidInput",
    "AccessDenied",
    "ModelNotFound",
    "Unavailable",
    "DeadlineExceeded",
    "ServerFailure",
    "ServerTooOld",
    "ClientClosed",
    "PartialFailure",
    "Failure",
    "__version__",
]

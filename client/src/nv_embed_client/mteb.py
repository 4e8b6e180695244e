"""mteb's encoder. Needs the extra `mteb`."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from nv_embed_client.extras import needs_extra
from nv_embed_client.instructions import instruction_of
from nv_embed_client.sentence_transformers import NVEmbedEncoder

with needs_extra("mteb"):
    from mteb.models.abs_encoder import AbsEncoder
    from mteb.models.model_meta import ModelMeta, ScoringFunction
    from mteb.types import PromptType


class NVEmbedTaskEncoder(AbsEncoder):
    """NV-Embed-v2 for mteb, with the instruction of each task.

    mteb.evaluate(NVEmbedTaskEncoder("localhost:8001"), mteb.get_tasks(["SciFact"]))

    Queries, and the texts of tasks that have no sides, get the instruction published with the model for their task.
    Where there is none, they get mteb's own in the published template. Documents get none, except QuoraRetrieval's.
    """

    model: NVEmbedEncoder

    def __init__(
        self,
        model: NVEmbedEncoder | str = "localhost:8001",
        *,
        name: str = "nvidia/NV-Embed-v2",
        revision: str = "served",
    ) -> None:
        """
        Args:
            model: an encoder, which stays its owner's to close, or the gRPC address for one of this object's own.
            name: under which mteb keeps the results.
            revision: the same; change it with the weights, because mteb does not compute what it finds in its cache.
        """
        self.model = NVEmbedEncoder(model) if isinstance(model, str) else model
        self.mteb_model_meta = ModelMeta.create_empty(
            {"name": name, "revision": revision, "similarity_fn_name": ScoringFunction.COSINE}
        )

    def encode(
        self,
        inputs: Any,
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        prompt_type: PromptType | None = None,
        **kwargs: Any,
    ) -> npt.NDArray[np.float32]:
        """[texts, dim]; `inputs` gives batches with a list of texts under "text"."""
        del hf_split, hf_subset
        texts = [text for batch in inputs for text in batch["text"]]
        return self.model.client.embed_documents(
            texts,
            instruction=self.instruction(task_metadata, prompt_type),
            progress=bool(kwargs.get("show_progress_bar", False)),
        )

    def instruction(self, task_metadata: Any, prompt_type: PromptType | None) -> str:
        """What stands before each text of this side of the task; empty for none."""
        if prompt_type == PromptType.document:
            return self.model.prompts.get(f"{task_metadata.name}-document", "")
        published = self.published_instruction(task_metadata)
        if published is not None:
            return published
        return instruction_of(self.get_instruction(task_metadata, prompt_type))

    def published_instruction(self, task_metadata: Any) -> str | None:
        """Of the task or of its kind, None when there is none."""
        prompts = self.model.prompts
        return prompts.get(task_metadata.name) or prompts.get(task_metadata.type)

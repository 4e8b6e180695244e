"""What the tools take of the server: how it reads a checkpoint's config and texts, and how it computes."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.append(str(ROOT / "model_repository/nv-embed-v2/1"))

from nv_embed.compute.loading import load_engine  # noqa: E402, F401
from nv_embed.models import read_checkpoint  # noqa: E402
from nv_embed.models.nv_embed import NVEmbedCheckpoint as CheckpointConfig  # noqa: E402, F401

CONFIG = read_checkpoint(HERE)  # of the config.json beside this file, which is copied into the checkpoint

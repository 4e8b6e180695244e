"""What the tools take of the server: how it reads a checkpoint's config and texts, and how it computes."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.append(str(ROOT / "model_repository/nv-embed-v2/1"))

from nv_embed.compute.engine import Engine  # noqa: E402, F401
from nv_embed.config import CheckpointConfig  # noqa: E402
from nv_embed.tokenizer import Tokenizer  # noqa: E402, F401

CONFIG = CheckpointConfig.load(HERE)  # of the config.json beside this file, which is copied into the checkpoint

"""The command `nv-embed`: a file for each of its subcommands, which `__main__` lists."""

from __future__ import annotations

import argparse
from typing import TypeAlias

# What argparse calls it; no other name is public.
Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
"""To which each subcommand adds its parser."""

"""Scores the served model on MTEB tasks, to be compared with the figures its publishers state.

pip install -e client[mteb]
python benchmarks/mteb_task.py SciFact NFCorpus STSBenchmark --url localhost:8001

Downloads each task's data once. Queries have the instruction published for their task, documents have none (but
for QuoraRetrieval); a task without a published instruction has MTEB's own, in the same template, and the table says
so. The published figures were computed on the original weights: serve those. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import mteb
from nv_embed_client import NVEmbedEncoder
from nv_embed_client.mteb import NVEmbedTaskEncoder


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="+", help="names as MTEB has them")
    parser.add_argument("--url", default="localhost:8001", help="Triton's gRPC address")
    parser.add_argument("--output", type=Path, help="folder for mteb's own result files")
    arguments = parser.parse_args()

    scores = {}
    with NVEmbedEncoder(arguments.url) as model:
        model.client.wait_until_ready()
        encoder = NVEmbedTaskEncoder(model)
        print(f"{'task':32} {'metric':20} {'x 100':>7} {'minutes':>8}  instruction")
        for task in mteb.get_tasks(tasks=arguments.tasks, languages=["eng"]):
            start = time.monotonic()
            cache = mteb.ResultCache(arguments.output) if arguments.output else None
            result = mteb.evaluate(encoder, task, cache=cache, co2_tracker=False).task_results[0]
            scores[task.metadata.name] = round(100 * result.get_score(), 2)
            source = "published" if encoder.published_instruction(task.metadata) else "MTEB's own"
            minutes = (time.monotonic() - start) / 60
            print(
                f"{task.metadata.name:32} {task.metadata.main_score:20} {scores[task.metadata.name]:7.2f} "
                f"{minutes:8.1f}  {source}"
            )
    print(json.dumps({"benchmark": "mteb", "mteb": mteb.__version__, "scores_x100": scores}))
    return 0


if __name__ == "__main__":
    sys.exit(main())

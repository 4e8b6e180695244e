"""mteb runs small local tasks through the served endpoint, by the package's encoder and by the committed command."""

import json

import mteb
import pytest
from mteb.types import PromptType
from mteb_task import main
from nv_embed_client import QUERY_INSTRUCTION, TASK_INSTRUCTIONS, NVEmbedEncoder, instruction_of
from nv_embed_client.mteb import NVEmbedTaskEncoder
from small_tasks import SmallRetrieval, SmallSTS


@pytest.fixture
def encoder(client):
    return NVEmbedTaskEncoder(NVEmbedEncoder(client))


@pytest.mark.parametrize(("task", "least"), [(SmallRetrieval(), 0.8), (SmallSTS(), 0.5)])
def test_mteb_scores_the_served_model(encoder, task, least, default_checkpoint):
    result = mteb.evaluate(encoder, task, cache=None, co2_tracker=False, show_progress_bar=False)
    score = result.task_results[0].get_score()
    assert -1 <= score <= 1
    if default_checkpoint:
        assert score >= least


def test_queries_have_the_published_instruction_and_documents_none(encoder):
    scifact = mteb.get_task("SciFact").metadata
    assert encoder.instruction(scifact, PromptType.query) == TASK_INSTRUCTIONS["SciFact"]
    assert encoder.instruction(scifact, PromptType.document) == ""
    quora = mteb.get_task("QuoraRetrieval").metadata
    assert encoder.instruction(quora, PromptType.document) == TASK_INSTRUCTIONS["QuoraRetrieval"]
    assert encoder.instruction(mteb.get_task("STSBenchmark").metadata, None) == TASK_INSTRUCTIONS["STS"]


def test_other_tasks_have_mtebs_own_instruction_in_the_published_template(encoder):
    banking = encoder.instruction(mteb.get_task("Banking77Classification").metadata, None)
    assert banking == instruction_of(mteb.get_task("Banking77Classification").metadata.prompt)
    assert banking != QUERY_INSTRUCTION


def test_the_command_prints_a_table_and_one_json_line(server, monkeypatch, capsys):
    # The real tasks are downloads.
    monkeypatch.setattr(mteb, "get_tasks", lambda tasks, languages: [SmallRetrieval()])
    monkeypatch.setattr("sys.argv", ["mteb_task.py", "SmallRetrieval", "--url", server.url])
    assert main() == 0
    *table, last = capsys.readouterr().out.splitlines()
    assert table[1].split()[:2] == ["SmallRetrieval", "ndcg_at_10"]
    assert "MTEB's own" in table[1]
    assert set(json.loads(last)["scores_x100"]) == {"SmallRetrieval"}

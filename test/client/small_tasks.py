"""mteb's tasks over a corpus small enough to read, with nothing to download."""

from corpus import DOCUMENTS, QUERIES, RELEVANT, SIMILAR_PAIRS
from datasets import Dataset, DatasetDict
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData
from mteb.abstasks.sts import AbsTaskSTS
from mteb.abstasks.task_metadata import TaskMetadata

LOCAL = {
    "description": "Made for this test.",
    "reference": "https://example.com",
    "dataset": {"path": "local", "revision": "1"},
    "category": "t2t",
    "eval_splits": ["test"],
    "eval_langs": ["eng-Latn"],
    "date": ("2026-01-01", "2026-01-01"),
    "dialect": [],
    "domains": [],
    "task_subtypes": [],
    "license": "apache-2.0",
    "annotations_creators": "derived",
    "modalities": ["text"],
    "sample_creation": "created",
    "bibtex_citation": "",
}


class SmallRetrieval(AbsTaskRetrieval):
    metadata = TaskMetadata(type="Retrieval", name="SmallRetrieval", main_score="ndcg_at_10", **LOCAL)

    def load_data(self, num_proc=None, **kwargs):
        split = RetrievalSplitData(
            queries=Dataset.from_dict({"id": list(QUERIES), "text": list(QUERIES.values())}),
            corpus=Dataset.from_dict(
                {"id": list(DOCUMENTS), "text": list(DOCUMENTS.values()), "title": [""] * len(DOCUMENTS)}
            ),
            relevant_docs={query: dict.fromkeys(documents, 1) for query, documents in RELEVANT.items()},
            top_ranked=None,
        )
        self.dataset = {"default": {"test": split}}
        self.data_loaded = True


class SmallSTS(AbsTaskSTS):
    metadata = TaskMetadata(type="STS", name="SmallSTS", main_score="cosine_spearman", **LOCAL)
    min_score = 0
    max_score = 1

    def load_data(self, num_proc=None, **kwargs):
        first, second, scores = zip(*SIMILAR_PAIRS, strict=True)
        self.dataset = DatasetDict(
            {"test": Dataset.from_dict({"sentence1": first, "sentence2": second, "score": scores})}
        )
        self.data_loaded = True

"""Train nv-embed-mini: `python tools/train_mini/train.py`, from nothing to a checkpoint with its model card.

It fetches text, makes the tokenizers, embeds the text with the teacher, trains the student and the static baseline,
evaluates and writes the model card. Packages, tokenizers, the teacher's vectors and the state of training are kept in
the work folder: stop it at any time and run the same command again. Needs Debian's tools for packages and, to compile
the layers, a C++ compiler and Python's headers.
"""

import argparse
import hashlib
import json
import os
import platform
import random
import re
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path

import card
import text
import torch
import torch.distributed as dist
import torch.nn.functional as F
from bag import Bag
from evaluate import check_unseen, evaluate, plain, read_judged, served
from first_weights import copy_teacher
from product import CONFIG, HERE, ROOT
from student import LatentPooling, Student, by_length
from teacher import Teacher, embed_cached
from torch import Tensor, nn
from tqdm import tqdm
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer
from vocabulary import STANDARD, TASKS, TEMPLATE, Vocabulary, trained_vocabulary

CHUNK = 16_384  # texts drawn, sorted by length and cut into batches together
REPORT_CHUNKS = 8  # from one point of the learning curve, and one saved state, to the next
BATCH_TOKENS = 3072  # small batches, which give more steps for the same text
TOKEN_LR, OTHER_LR, BETAS = 0.01, 0.001, (0.9, 0.98)
SECOND_PEAK = 0.4  # of these rates
BASELINE_VOCAB = 30_000  # about as many parameters in token vectors alone as the student has in all
BASELINE_PASSES = 2
ACCENTS = {"e": "é", "a": "à", "o": "ö", "u": "ü", "i": "î", "n": "ñ", "c": "ç"}


@dataclass(frozen=True, slots=True)
class Job:
    """All that a training process needs: each has the tensors in common with the others, and a copy of the texts."""

    name: str
    model: nn.Module
    tokenizer: Path
    texts: list[str]
    targets: Tensor
    held: list[str]  # for the learning curve
    held_targets: Tensor
    samples: int
    seed: int
    device: str
    world: int
    folder: Path


def examples(
    job: Job, vocabulary: Vocabulary, picked: list[int], seed: int
) -> tuple[list[list[int]], list[int], list[Tensor]]:
    """The chunk's texts as the student sees them: some joined, some made untidy, some behind an instruction.

    Returns:
        each text's input ids, where its pooling starts, and the teacher's vector.
    """
    pick = random.Random(seed)
    strings, masked, vectors = [], [], []
    for i in picked:
        string, vector = job.texts[i], job.targets[i].float()
        fate = pick.random()
        if fate < 0.036:
            # A text too long for the teacher is taught as the mean of its parts.
            several = pick.randint(5, 40) if fate < 0.006 else pick.randint(2, 3)
            parts = [i] + [pick.randrange(len(job.texts)) for _ in range(several - 1)]
            string = pick.choice([" ", "\n", " "]).join(job.texts[j] for j in parts)
            vector = F.normalize(job.targets[parts].float().mean(0), dim=0)
        elif fate < 0.08:
            # The teacher reads neither runs of whitespace nor accents: its vector stays.
            letter, space = pick.choice(list(ACCENTS)), pick.choice(["\n", "\t", " \t"])
            untidy = [string.replace(" ", "  "), f"  {string}\n", string.replace(letter, ACCENTS[letter], 1),
                      string.replace(" ", space, pick.choice([1, 2, 4, -1]))]  # fmt: skip
            string = pick.choice(untidy)
        instruction = ""
        if pick.random() < 0.1:
            instruction = STANDARD if pick.random() < 0.5 else TEMPLATE.format(pick.choice(TASKS))
        strings.append(instruction + string)
        masked.append(vocabulary.num_masked(instruction))
        vectors.append(vector)
    return vocabulary.encode(strings), masked, vectors


def chunks(num_texts: int, samples: int, seed: int) -> Iterator[Tensor]:
    """Every text once per pass, in a new order each pass, until `samples` are drawn."""
    for passes in range(-(-samples // num_texts)):
        order = torch.randperm(num_texts, generator=torch.Generator().manual_seed(seed + passes))
        yield from order[: samples - passes * num_texts].split(CHUNK)


def rounds(samples: int) -> tuple[int, int]:
    """Training goes from a high rate to near zero twice: over two thirds of the samples, and over the rest."""
    return 2 * samples // 3, samples - 2 * samples // 3


def rate(seen: int, samples: int) -> float:
    """Share of the peak rate. In each round a warm-up of 4,000 texts, flat for three tenths, a line to near zero."""
    first, second = rounds(samples)
    peak, done, total = (1.0, seen, first) if seen < first else (SECOND_PEAK, seen - first, second)
    return peak * min(1.0, 0.05 + done / 4000, (total - done) / (0.7 * total) + 1e-3)


def loss_to(out: Tensor, targets: Tensor) -> Tensor:
    """One minus the cosine to the teacher, and four times the mean squared difference of the similarity matrices.

    Both [texts, C], of unit vectors.
    """
    difference = out @ out.T - targets @ targets.T
    return 1 - (out * targets).sum(1).mean() + 4 * difference.square().mean()


def average_gradients(sparse: Tensor, dense: list[Tensor]) -> None:
    """Put the mean over the processes in the place of each: first the dense ones, as one message, then the sparse one.

    DistributedDataParallel overlaps them, and so crashed twice in two hours, in gloo's own thread (torch 2.13).
    """
    flat = torch.cat([grad.flatten() for grad in dense])
    for grad in (flat, sparse):
        dist.all_reduce(grad)
        grad /= dist.get_world_size()
    for grad, mean in zip(dense, flat.split([grad.numel() for grad in dense]), strict=True):
        grad.copy_(mean.view_as(grad))


def train(job: Job) -> nn.Module:
    """The job's model, trained."""
    (job.folder / "rendezvous").unlink(missing_ok=True)
    torch.multiprocessing.spawn(train_process, (job,), job.world)
    job.model.load_state_dict(torch.load(job.folder / f"{job.name}.pt", map_location="cpu")["model"])
    return job.model


def train_process(rank: int, job: Job) -> None:
    """One of `job.world` processes, each with its share of every batch; rank 0 reports and saves."""
    if job.device == "cpu":
        torch.set_num_threads(1)
        os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] = "16384"  # compiled products: 1,024 are fewer than there are
    if job.world > 1:
        dist.init_process_group("gloo", f"file://{job.folder}/rendezvous", rank=rank, world_size=job.world)
    vocabulary = Vocabulary(job.tokenizer)
    model = deepcopy(job.model).to(job.device)  # the job's own is shared
    for part in model.modules():
        if isinstance(part, (MistralDecoderLayer, LatentPooling)):
            # What is between the matrix products is a third of a step as it stands, and little when compiled.
            part.compile(dynamic=True)
    # Sparse gradients: only the vectors of a batch's tokens are updated; all would be most of the work of a small step.
    model.token_vectors.sparse = True
    rest = [p for p in model.parameters() if p is not model.token_vectors.weight]
    optimizers = [
        torch.optim.SparseAdam([model.token_vectors.weight], lr=TOKEN_LR, betas=BETAS),
        torch.optim.Adam(rest, lr=OTHER_LR, betas=BETAS, fused=True),
    ]
    path, curve = job.folder / f"{job.name}.pt", []
    first, seen, tokens, seconds = 0, 0, 0, 0.0
    if path.exists():
        state = torch.load(path, map_location=job.device)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        first, curve = state["chunk"], state["curve"]
        seen, tokens, seconds = (curve[-1][key] for key in ("texts", "tokens", "seconds"))
    started = time.time() - seconds
    bar = tqdm(total=job.samples, initial=seen, desc=job.name, unit="text", mininterval=10, disable=rank > 0)
    once, again = rounds(job.samples)
    plan = [*chunks(len(job.texts), once, job.seed), *chunks(len(job.texts), again, job.seed + 100)]
    for number, picked in enumerate(plan[first:], first):
        rows, masked, vectors = examples(job, vocabulary, picked.tolist(), job.seed + number)
        batches = [batch for batch in by_length(rows, BATCH_TOKENS) if len(batch) >= job.world]
        random.Random(job.seed + number).shuffle(batches)
        for batch in batches:
            mine = batch[rank :: job.world]
            with torch.autocast(job.device.split(":")[0], torch.bfloat16):
                out = model([rows[i] for i in mine], [masked[i] for i in mine])
            loss = loss_to(out.float(), torch.stack([vectors[i] for i in mine]).to(job.device))
            model.zero_grad()
            loss.backward()
            if job.world > 1:
                average_gradients(model.token_vectors.weight.grad, [p.grad for p in rest])
            torch.nn.utils.clip_grad_norm_(rest, 1.0)
            for optimizer, peak in zip(optimizers, (TOKEN_LR, OTHER_LR), strict=True):
                optimizer.param_groups[0]["lr"] = peak * rate(seen, job.samples)
                optimizer.step()
            seen += len(batch)
            tokens += sum(len(rows[i]) for i in batch)
            bar.update(len(batch))
            bar.set_postfix(loss=f"{loss.item():.3f}", tok_s=int(tokens / (time.time() - started)), refresh=False)
        if rank == 0 and (number % REPORT_CHUNKS == REPORT_CHUNKS - 1 or number == len(plan) - 1):
            point = {"texts": seen, "tokens": tokens, "seconds": time.time() - started}
            curve.append(point | {"cosine": held_out_cosine(model, vocabulary, job)})
            tqdm.write(json.dumps(curve[-1]))
            state = {"model": model.state_dict(), "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                     "chunk": number + 1, "curve": curve}  # fmt: skip
            torch.save(state, path.with_suffix(".new"))
            path.with_suffix(".new").rename(path)


@torch.no_grad()
def held_out_cosine(model: nn.Module, vocabulary: Vocabulary, job: Job) -> float:
    """The mean cosine of held-out texts to the teacher."""
    rows, out = vocabulary.encode(job.held, max_length=128), torch.empty_like(job.held_targets)
    for picked in by_length(rows, BATCH_TOKENS):
        out[picked] = model([rows[i] for i in picked], [0] * len(picked)).cpu()
    return (out * job.held_targets).sum(1).mean().item()


def stage_folder(work: Path, settings: dict[str, object]) -> Path:
    """Where a run keeps its stages: one of other settings, code or phrases has a folder of its own."""
    paths = [path for path in sorted(HERE.glob("*.py")) if path.stem not in ("card", "evaluate")]
    code = b"".join(path.read_bytes() for path in [*paths, HERE / "phrases.json"])
    folder = work / hashlib.sha256(json.dumps(settings).encode() + code).hexdigest()[:8]
    folder.mkdir(exist_ok=True)
    return folder.resolve()


def machine() -> str:
    """The processor's name, if it says one."""
    name = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return f"{os.cpu_count()} cores, {name[1] if name else platform.machine()}, {platform.system()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / ".cache/nv-embed-mini", help="downloads and stages")
    parser.add_argument("--out", type=Path, default=ROOT / "checkpoints/nv-embed-mini", help="the checkpoint's folder")
    parser.add_argument("--share", type=float, default=1.0, help="part of the text: below 1 for trials")
    parser.add_argument("--samples", type=int, default=18_000_000, help="texts to train the student on")
    parser.add_argument("--judged", type=Path, nargs="*", default=[], metavar="TSV",
                        help="sets of sentence pairs to measure with: lines of score, sentence, sentence")  # fmt: skip
    parser.add_argument("--seed", type=int, default=2026)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)

    train_items, test = text.collect(args.work / "text", args.share)
    texts, held = [item.text for item in train_items], [item.text for item in test[:1000]]
    trained = {plain(string) for string in texts}
    check_unseen(trained)
    judged = {path.stem: read_judged(path, trained) for path in args.judged}
    # On a CPU two processes of one thread: threads of one process wait for each other at every layer, and far longer
    # when anything else runs on the machine. Two whatever the number of cores, for batches are split by it.
    world = 2 if args.device == "cpu" else 1
    run = asdict(CONFIG) | {
        "token_lr": TOKEN_LR, "other_lr": OTHER_LR, "second_peak": SECOND_PEAK, "betas": BETAS,
        "batch_tokens": BATCH_TOKENS, "samples": args.samples, "seed": args.seed, "processes": world,
        "data_hash": text.data_hash(train_items, test),
    }  # fmt: skip
    stages = stage_folder(args.work, run)
    print(f"{len(texts)} training texts, {len(test)} held out, stages in {stages}", flush=True)
    teacher = Teacher(args.device)

    student_path, bag_path = stages / "tokenizer.json", stages / "words.json"
    student_vocabulary = trained_vocabulary(texts, teacher, CONFIG.vocab_size, student_path)
    bag_vocabulary = trained_vocabulary(texts, teacher, BASELINE_VOCAB, bag_path)
    targets = embed_cached(texts, stages / "teacher-train", args.device, world)

    model = copy_teacher(Student(CONFIG), student_vocabulary, teacher)
    job = Job("student", model, student_path, texts, targets, held, teacher.embed(held),
              args.samples, args.seed, args.device, world, stages)  # fmt: skip
    student = train(job)
    student.save(args.out)
    for path in (student_path, HERE / "config.json"):
        shutil.copy(path, args.out)
    bag = train(replace(job, name="static", model=Bag(bag_vocabulary, teacher), tokenizer=bag_path,
                        samples=BASELINE_PASSES * len(texts)))  # fmt: skip

    def mean_vector(some: list[str], instruction: str = "") -> Tensor:
        masked = bag_vocabulary.num_masked(instruction)
        return bag(bag_vocabulary.encode([instruction + string for string in some], 8192), [masked] * len(some))

    models = {"student": served(args.out), "teacher": teacher.embed, "static": mean_vector}
    unseen = [item for item in test if plain(item.text) not in trained]
    figures = evaluate(models, unseen, judged)
    run |= {
        "parameters": sum(p.numel() for p in student.parameters()), "num_texts": len(texts),
        "num_held": len(test), "num_unseen": len(unseen),
        "texts": Counter(item.source for item in train_items),
        "packages": {path.parent.name: path.read_text() for path in (args.work / "text").glob("*/version")},
        "baseline_vocab": BASELINE_VOCAB, "baseline_passes": BASELINE_PASSES, "share": args.share, "machine": machine(),
        "python": platform.python_version(), "date": time.strftime("%Y-%m-%d"),
        "versions": {name: version(name) for name in ("torch", "transformers", "sentence-transformers", "tokenizers")},
    }  # fmt: skip
    curve = torch.load(stages / "student.pt", map_location="cpu")["curve"]
    card.write(args.out, {"run": run, "figures": figures, "curve": curve})
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()

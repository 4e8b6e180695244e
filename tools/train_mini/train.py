"""Train nv-embed-mini: `python tools/train_mini/train.py`, from nothing to a checkpoint with its model card.

It fetches text, makes the tokenizers, embeds the text with the teacher, trains the student, exports it, trains the
static baseline, evaluates and writes the model card. Packages, tokenizers, the teacher's vectors and the state of
training are kept in the work folder: stop it at any time and run the same command again. Needs Debian's tools for
packages and, to compile the layers, a C++ compiler and Python's headers.
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
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import card
import text
import torch
import torch.distributed as dist
import torch.nn.functional as F
from batching import by_length, padded
from evaluate import definitions, evaluate, own_pairs, own_texts, plain, read_judged
from graft import graft
from product import CONFIG, HERE, ROOT
from static import loss_to, train_bag
from student import Student
from teacher import Teacher, embed_cached
from torch import Tensor
from tqdm import tqdm
from vocabulary import STANDARD, TASKS, TEMPLATE, Vocabulary, train_tokenizer

CHUNK = 16_384  # texts drawn, sorted by length and cut into batches together
REPORT_CHUNKS = 8  # from one point of the learning curve, and one saved state, to the next
BATCH_TOKENS = 3072  # small batches: steps are what a short training has too few of
EMBED_LR, OTHER_LR, BETAS = 0.01, 0.001, (0.9, 0.98)
SAMPLE_TEXTS = 1000  # to fit the first weights on
BASELINE_VOCAB = 30_000  # as many parameters in token vectors alone as the student has in all
ACCENTS = {"e": "é", "a": "à", "o": "ö", "u": "ü", "i": "î", "n": "ñ", "c": "ç"}

Example = tuple[list[int], int, Tensor]  # input ids, where pooling starts, the teacher's vector


def examples(texts: list[str], targets: Tensor, picked: list[int], vocabulary: Vocabulary, seed: int) -> list[Example]:
    """The chunk's texts as the student sees them: some joined, some made untidy, some behind an instruction."""
    pick = random.Random(seed)
    strings, masked, vectors = [], [], []
    for i in picked:
        string, vector = texts[i], targets[i].float()
        fate = pick.random()
        if fate < 0.036:
            # A text too long for the teacher is taught as the mean of its parts.
            several = pick.randint(5, 40) if fate < 0.006 else pick.randint(2, 3)
            parts = [i] + [pick.randrange(len(texts)) for _ in range(several - 1)]
            string = pick.choice([" ", "\n", " "]).join(texts[j] for j in parts)
            vector = F.normalize(targets[parts].float().mean(0), dim=0)
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
    return list(zip(vocabulary.encode(strings), masked, vectors, strict=True))


def batches(chunk: list[Example], world: int, seed: int) -> list[list[Example]]:
    """The chunk in batches of like length, in random order."""
    made = [[chunk[i] for i in picked] for picked in by_length([row for row, _, _ in chunk], BATCH_TOKENS, padded)]
    random.Random(seed).shuffle(made)
    return [batch for batch in made if len(batch) >= world]


def rate(seen: int, samples: int) -> float:
    """Share of the peak rate: a warm-up of 4,000 texts, flat for three tenths of `samples`, then a line to zero."""
    return min(1.0, 0.05 + seen / 4000, (samples - seen) / (0.7 * samples) + 1e-3)


def chunks(num_texts: int, samples: int, seed: int) -> Iterator[list[int]]:
    """Every text once per pass, in a new order each pass, until `samples` are drawn."""
    for passes in range(-(-samples // num_texts)):
        order = list(range(num_texts))
        random.Random(seed + passes).shuffle(order)
        order = order[: samples - passes * num_texts]
        yield from (order[start : start + CHUNK] for start in range(0, len(order), CHUNK))


def average_gradients(model: Student, world: int) -> None:
    """Mean of every gradient over the processes: the token vectors' as one message, all others as another."""
    if world == 1:
        return
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    dense = [g for g in grads if not g.is_sparse]
    flat = torch.cat([g.flatten() for g in dense])
    dist.all_reduce(flat)
    for grad, mean in zip(dense, (flat / world).split([g.numel() for g in dense]), strict=True):
        grad.copy_(mean.view_as(grad))
    for grad in grads:
        if grad.is_sparse:
            dist.all_reduce(grad)
            grad.div_(world)


@dataclass(frozen=True, slots=True)
class Job:
    """All that a training process needs; tensors are shared between processes, not copied."""

    texts: list[str]
    targets: Tensor
    held: list[str]  # for the learning curve
    held_targets: Tensor
    start: dict[str, Tensor]  # the student's weights before training
    samples: int
    seed: int
    device: str
    world: int
    work: Path


def train_student(rank: int, job: Job) -> None:
    """One of `job.world` processes, each with its share of every batch; rank 0 reports and saves."""
    if job.device == "cpu":
        torch.set_num_threads(1)
        os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] = "16384"  # compiled products: 1,024 are fewer than there are
    if job.world > 1:
        dist.init_process_group("gloo", f"file://{job.work}/rendezvous", rank=rank, world_size=job.world)
    vocabulary = Vocabulary(job.work / "tokenizer.json")
    model = Student(CONFIG)
    model.load_state_dict(job.start)
    model.to(job.device)
    # What is between the matrix products is a third of a step as it stands, and little when compiled.
    for part in (*model.embedding_model.layers, model.latent_attention_model):
        part.compile(dynamic=True)
    # Only the token vectors of a batch are touched: updating all would be most of the work of a small step.
    embedding = model.embedding_model.embed_tokens
    embedding.sparse = True  # gradients
    rest = [p for p in model.parameters() if p is not embedding.weight]
    optimizers = [
        torch.optim.SparseAdam([embedding.weight], lr=EMBED_LR, betas=BETAS),
        torch.optim.Adam(rest, lr=OTHER_LR, betas=BETAS, fused=True),
    ]
    state_path, curve_path = job.work / "training.pt", job.work / "curve.jsonl"
    first, seen, seconds, tokens = 0, 0, 0.0, 0
    if state_path.exists():
        state = torch.load(state_path, map_location=job.device)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        first, seen, seconds, tokens = state["chunk"], state["seen"], state["seconds"], state["tokens"]
    elif rank == 0:
        record(curve_path, {"texts": 0, "tokens": 0, "seconds": 0}, model, vocabulary, job)
    started = time.time() - seconds
    bar = tqdm(total=job.samples, initial=seen, desc="student", unit="text", mininterval=10, disable=rank > 0)
    plan = list(chunks(len(job.texts), job.samples, job.seed))
    for number, picked in enumerate(plan):
        if number < first:
            continue
        seed = job.seed + number
        drawn = examples(job.texts, job.targets, picked, vocabulary, seed)
        for batch in batches(drawn, job.world, seed):
            rows, masked, vectors = (list(column) for column in zip(*batch[rank :: job.world], strict=True))
            with torch.autocast(job.device.split(":")[0], torch.bfloat16):
                out = model(rows, masked)
            loss = loss_to(out.float(), torch.stack(vectors).to(job.device))
            model.zero_grad()
            loss.backward()
            average_gradients(model, job.world)
            torch.nn.utils.clip_grad_norm_(rest, 1.0)
            for optimizer, peak in zip(optimizers, (EMBED_LR, OTHER_LR), strict=True):
                optimizer.param_groups[0]["lr"] = peak * rate(seen, job.samples)
                optimizer.step()
            seen += len(batch)
            tokens += sum(len(row) for row, _, _ in batch)
            bar.update(len(batch))
            bar.set_postfix(loss=f"{loss.item():.3f}", tok_s=int(tokens / (time.time() - started)), refresh=False)
        if rank == 0 and (number % REPORT_CHUNKS == REPORT_CHUNKS - 1 or number == len(plan) - 1):
            seconds = time.time() - started
            point = {"texts": seen, "tokens": tokens, "seconds": round(seconds)}
            record(curve_path, point, model, vocabulary, job)
            state = {
                "model": model.state_dict(), "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                "chunk": number + 1, "seen": seen, "seconds": seconds, "tokens": tokens,
            }  # fmt: skip
            torch.save(state, state_path.with_suffix(".new"))
            state_path.with_suffix(".new").rename(state_path)


@torch.no_grad()
def record(path: Path, point: dict[str, float], model: Student, vocabulary: Vocabulary, job: Job) -> None:
    """Append a point to the learning curve: held-out texts' cosine to the teacher, and how similarities agree."""
    targets = job.held_targets
    rows, out = vocabulary.encode(job.held, max_length=128), torch.empty_like(targets)
    for picked in by_length(rows, BATCH_TOKENS):
        out[picked] = model([rows[i] for i in picked], [0] * len(picked)).cpu()
    pairs = torch.triu_indices(len(rows), len(rows), 1)
    both = torch.stack([(out @ out.T)[pairs[0], pairs[1]], (targets @ targets.T)[pairs[0], pairs[1]]])
    point |= {"cosine": (out * targets).sum(1).mean().item(), "similarity_r": torch.corrcoef(both)[0, 1].item()}
    with path.open("a" if point["texts"] else "w") as file:
        file.write(json.dumps(point) + "\n")
    tqdm.write(json.dumps(point))


def stage_folder(work: Path, settings: dict[str, object]) -> Path:
    """Where a run keeps its stages: one of other settings, code or phrases has a folder of its own."""
    code = b"".join(path.read_bytes() for path in [*sorted(HERE.glob("*.py")), HERE / "phrases.json"])
    folder = work / hashlib.sha256(json.dumps(settings).encode() + code).hexdigest()[:8]
    folder.mkdir(exist_ok=True)
    return folder.resolve()


def tokenizer(texts: list[str], teacher: Teacher, size: int, path: Path) -> Vocabulary:
    if not path.exists():
        train_tokenizer(texts, teacher, size, path)
    return Vocabulary(path)


def machine() -> str:
    name = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return f"{os.cpu_count()} cores, {name[1] if name else platform.machine()}, {platform.system()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / ".cache/nv-embed-mini", help="downloads and stages")
    parser.add_argument("--out", type=Path, default=ROOT / "checkpoints/nv-embed-mini", help="the checkpoint's folder")
    parser.add_argument("--share", type=float, default=1.0, help="part of the text to use; below 1 for trials")
    parser.add_argument("--samples", type=int, default=12_000_000, help="texts to train the student on")
    parser.add_argument("--static-epochs", type=float, default=2.0)
    parser.add_argument("--judged", type=Path, nargs="*", default=[], metavar="TSV",
                        help="sets of sentence pairs to measure with: lines of score, sentence, sentence")  # fmt: skip
    parser.add_argument("--seed", type=int, default=2026)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    work: Path = args.work
    work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)

    train, test = text.collect(work / "text", args.share)
    texts = [item.text for item in train]
    trained = {plain(string) for string in texts}
    if leaked := own_texts() & trained:
        raise SystemExit(f"expected no text of pairs.json in the training text; got {sorted(leaked)}; replace those")
    public = {path.stem: read_judged(path, trained) for path in args.judged}
    # On a CPU one process of one thread per core, for the same reason as the teacher's.
    world = (os.cpu_count() or 1) if args.device == "cpu" else 1
    settings = asdict(CONFIG) | {
        "embed_lr": EMBED_LR,
        "other_lr": OTHER_LR,
        "betas": BETAS,
        "batch_tokens": BATCH_TOKENS,
        "samples": args.samples,
        "seed": args.seed,
        "processes": world,
        "data_hash": text.data_hash(train, test),
    }
    stages = stage_folder(work, settings)
    counts = f"{len(train)} training texts, {len(test)} held out"
    print(f"{counts}, data hash {settings['data_hash']}; stages in {stages}", flush=True)
    teacher = Teacher(work / "text", args.device)
    vocabulary = tokenizer(texts, teacher, CONFIG.vocab_size, stages / "tokenizer.json")
    wide = tokenizer(texts, teacher, BASELINE_VOCAB, stages / "tokenizer-baseline.json")
    held = [item.text for item in test]
    test_targets = embed_cached(held, stages / "teacher-test", work / "text", args.device)
    targets = embed_cached(texts, stages / "teacher-train", work / "text", args.device)

    model = graft(CONFIG, teacher, vocabulary, texts[:SAMPLE_TEXTS])
    (stages / "rendezvous").unlink(missing_ok=True)
    job = Job(texts, targets, held[:1000], test_targets[:1000].float(), model.state_dict(), args.samples, args.seed,
              args.device, world, stages)  # fmt: skip
    torch.multiprocessing.spawn(train_student, (job,), world)
    model.load_state_dict(torch.load(stages / "training.pt", map_location="cpu")["model"])
    model.save(args.out)
    for path in (stages / "tokenizer.json", HERE / "config.json"):
        shutil.copy(path, args.out)

    bag = train_bag(wide, teacher, texts, targets, args.static_epochs)
    figures = evaluate(args.out, bag, teacher, test, test_targets, public)
    run = settings | {
        "parameters": sum(p.numel() for p in model.parameters()),
        "texts": len(train),
        "held_out": len(test),
        "texts_by_source": Counter(item.source for item in train),
        "package_versions": text.versions(work / "text"),
        "public_sets": {name: len(pairs) for name, pairs in public.items()},
        "question_sets": len(own_pairs()["questions"]),
        "set_size": len(own_pairs()["questions"][0]),
        "own_pairs": len(own_pairs()["similar"]),
        "num_nearest": min(10_000, len(test)),
        "num_words": len(definitions(test, 1000)[0]),
        "static_epochs": args.static_epochs,
        "share": args.share,
        "baseline_vocab": wide.size,
        "machine": machine(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "transformers", "tokenizers", "numpy", "scipy")},
        "date": time.strftime("%Y-%m-%d"),
    }
    curve = [json.loads(line) for line in (stages / "curve.jsonl").read_text().splitlines()]
    card.write(args.out, {"run": run, "figures": figures, "curve": curve})
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()

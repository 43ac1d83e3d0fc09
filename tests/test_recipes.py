"""Recipes, each YAML file as it stands, on tiny stand-ins: only model, data, reward and sizes are replaced."""

from __future__ import annotations

import importlib
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import trl
from conftest import CHAT_TEMPLATE, LETTERS, make_model, make_tokenizer
from datasets import Dataset
from safetensors.torch import load_file
from transformers import DebertaV2Config, DebertaV2ForSequenceClassification, LlamaForSequenceClassification

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import recipes
from ppo_plus.cli import launch
from ppo_plus.cli.arguments import FieldParser

RECIPES = Path(__file__).parents[1] / "recipes"
WITH_ADAPTERS = ("reward_model_7b_qlora", "ppo_7b_qlora", "ppo_qwen_deberta")
SUBJECTS = ["rain", "bread", "a train", "the sea", "my cat", "chess", "snow", "a violin"]
SMALL = ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "1", "--eval_rows", "4"]
PPO = [*SMALL, "--total_episodes", "8", "--response_length", "6", "--max_prompt_length", "40", "--use_cpu", "True",
       "--dataloader_pin_memory", "False", "--disable_tqdm", "True", "--num_sample_generations", "0",
       "--eval_steps", "2", "--save_steps", "2"]  # fmt: skip

COUNT_E = "def count_e(completions, **kwargs):\n    return [c.count('e') for c in completions]\n"


def run(command, *arguments):
    launch.run(command, [*map(str, arguments)])


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory with a base model, prompts and pairs under the names that hubs use."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)  # each test has its own file of this name
    make_model(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base")
    make_tokenizer(CHAT_TEMPLATE).save_pretrained(tmp_path / "base")
    chats = [[{"role": "user", "content": f"tell me of {s}"}] for s in SUBJECTS]
    for name, rows in {
        "chats": {"prompt": chats},
        "texts": {"prompt": [f"tell me of {s}" for s in SUBJECTS]},
        "pairs": {"prompt": chats, "chosen": [[{"role": "assistant", "content": "he sees the sea"}]] * 8,
                  "rejected": [[{"role": "assistant", "content": "no"}]] * 8},
    }.items():  # fmt: skip
        for split in ("train", "test", "validation"):
            (tmp_path / name).mkdir(exist_ok=True)
            Dataset.from_dict(rows).to_json(tmp_path / name / f"{split}.jsonl")
    return tmp_path


def check_ppo(folder, adapter=True):
    """What a run must leave: plain weights, a value head that learned, evaluations, a checkpoint to resume from."""
    state = json.loads((folder / "trainer_state.json").read_text())
    assert state["global_step"] == state["max_steps"] > 0
    evaluated = [row["step"] for row in state["log_history"] if "eval_reward" in row]
    assert evaluated.count(state["max_steps"]) == 1  # the last step, and once
    saved = {f.name for f in folder.iterdir()}
    assert ("adapter_model.safetensors" in saved) == adapter and ("model.safetensors" in saved) == (not adapter)
    assert any(t.abs().sum() > 0 for t in load_file(folder / "value_head.safetensors").values())
    assert any(f.name.startswith("checkpoint-") for f in folder.iterdir())


@pytest.mark.slow
def test_7b_qlora_reward_model_then_ppo(here, capsys):
    yaml = RECIPES / "qwen_7b_qlora" / "reward.yaml"
    run("reward", "--config", yaml, *SMALL, "--model_name_or_path", "base", "--dataset_name", "pairs",
        "--output_dir", "rm", "--max_steps", "2", "--use_cpu", "True", "--dataloader_pin_memory", "False")  # fmt: skip
    assert "Accuracy on 4 held-out pairs: " in capsys.readouterr().out
    info = json.loads((here / "rm" / "reward_model.json").read_text())
    assert info["quantization"]["load_in_4bit"] and info["pairs"] == 4
    yaml = RECIPES / "qwen_7b_qlora" / "ppo.yaml"
    run("ppo", "--config", yaml, *PPO, "--model_name_or_path", "base", "--dataset_name", "chats",
        "--reward_funcs", "rm", "--output_dir", "ppo")  # fmt: skip
    check_ppo(here / "ppo")
    history = json.loads((here / "ppo" / "trainer_state.json").read_text())["log_history"]
    last = [row for row in history if "eval_reward" in row][-1]
    shown = f"-> {last['eval_reward']:.2f}, KL {last['eval_kl']:.1f} nats"
    assert capsys.readouterr().out.strip().endswith(shown)


@pytest.mark.parametrize("rows", ["texts", "chats"])
def test_qwen_against_a_deberta_reward_model(here, rows):
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    DebertaV2ForSequenceClassification(
        DebertaV2Config(
            vocab_size=4 + len(LETTERS), hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=48, max_position_embeddings=256, num_labels=1, relative_attention=True,
            pos_att_type=["p2c", "c2p"], type_vocab_size=0, pad_token_id=0,
        )
    ).save_pretrained(here / "deberta")  # fmt: skip
    tokenizer.save_pretrained(here / "deberta")
    run("ppo", "--config", RECIPES / "qwen_deberta" / "ppo.yaml", *PPO, "--model_name_or_path", "base",
        "--dataset_name", rows, "--reward_funcs", "deberta", "--output_dir", "ppo")  # fmt: skip
    check_ppo(here / "ppo")


def test_tldr_trains_the_whole_policy(here):
    config = make_model(hidden_size=64, intermediate_size=128).config
    config.num_labels = 1
    torch.manual_seed(1)
    LlamaForSequenceClassification(config).save_pretrained(here / "reward")
    make_tokenizer().save_pretrained(here / "reward")
    run("ppo", "--config", RECIPES / "tldr" / "ppo.yaml", *PPO, "--model_name_or_path", "base",
        "--dataset_name", "texts", "--reward_funcs", "reward", "--output_dir", "ppo")  # fmt: skip
    assert " of `texts` |" in (here / "ppo" / "README.md").read_text()
    check_ppo(here / "ppo", adapter=False)


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_a_file_and_a_function_of_ones_own(here, ending):
    (here / "my_rewards.py").write_text(COUNT_E)
    rows = Dataset.from_dict({"prompt": [f"tell me of {s}" for s in SUBJECTS]})
    getattr(rows, {"jsonl": "to_json"}.get(ending, f"to_{ending}"))(here / f"prompts.{ending}")
    run("ppo", *PPO, "--model_name_or_path", "base", "--dataset_name", f"prompts.{ending}", "--use_peft",
        "--lora_target_modules", "all-linear", "--num_mini_batches", "1", "--eval_strategy", "steps",
        "--save_strategy", "steps", "--reward_funcs", "my_rewards:count_e", "--output_dir", "ppo",
        "--report_to", "none")  # fmt: skip
    check_ppo(here / "ppo")
    config = json.loads((here / "ppo" / "adapter_config.json").read_text())
    assert config["r"] == 16 and config["base_model_name_or_path"] == "base"


def test_a_second_round_goes_on_from_the_adapter_of_the_first(here):
    (here / "my_rewards.py").write_text(COUNT_E)
    common = [*PPO, "--dataset_name", "texts/train.jsonl", "--num_mini_batches", "1", "--eval_strategy", "steps",
              "--save_strategy", "steps", "--reward_funcs", "my_rewards:count_e", "--report_to", "none"]  # fmt: skip
    run("ppo", *common, "--model_name_or_path", "base", "--use_peft", "--lora_target_modules", "all-linear",
        "--output_dir", "first", "--seed", "1")  # fmt: skip
    run("ppo", *common, "--model_name_or_path", "first", "--output_dir", "second")
    check_ppo(here / "second")
    first, second = (load_file(here / folder / "adapter_model.safetensors") for folder in ("first", "second"))
    assert first.keys() == second.keys() and not all(torch.equal(first[name], second[name]) for name in first)
    drawn = [name for name in first if "lora_A" in name]
    assert all(torch.allclose(first[name], second[name], atol=1e-3) for name in drawn)  # and not drawn anew
    assert json.loads((here / "second" / "adapter_config.json").read_text())["base_model_name_or_path"] == "base"


@pytest.mark.parametrize("name", recipes.RUNS)
def test_the_benchmark_asks_the_scripts_for_what_they_take(tmp_path, monkeypatch, name):
    """Each change is an argument that the script has, and its value arrives; what the file says beside it stays."""
    monkeypatch.chdir(RECIPES.parent)
    run_here = recipes.RUNS[name]
    words = recipes.command(name, {"smollm2": "base", "encoder": "other"}, tmp_path, 7, bf16=False)
    assert words[:3] == ["-m", "ppo_plus.cli.main", "ppo" if run_here.reward else "reward"]
    types = importlib.import_module(f"ppo_plus.cli.{words[2]}").ARGUMENTS
    parsed, rest = FieldParser(types, "test").parse(words[3:])
    assert not rest
    found = {key: value for part in parsed for key, value in vars(part).items()}
    wanted = recipes.ALWAYS | run_here.changes | {"seed": 7, "output_dir": str(tmp_path / name)}
    assert {key: found[key] for key in wanted} == wanted | {"report_to": []}
    assert found["model_name_or_path"] == ("other" if name == "encoder" else "base")
    assert found["load_in_4bit"] == ("7b_qlora" in name) and found["use_peft"] == (name in WITH_ADAPTERS)
    if run_here.reward:
        assert found["reward_funcs"] == [str(tmp_path / run_here.reward)]
        assert found["kl_target"] == (None if name == "ppo_tldr" else 6.0) and found["temperature"] == 0.7


def test_the_benchmark_runs_what_another_run_needs_first():
    assert recipes.needed(["ppo_tldr"]) == ["classifier", "ppo_tldr"]
    assert recipes.needed(list(recipes.RUNS)) == list(recipes.RUNS)
    for name in recipes.RUNS:
        order = recipes.needed([name])
        assert order[-1] == name and order[:-1] == [r for r in [recipes.RUNS[name].reward] if r]


def launch_two(folder, command, *arguments, profile="multi_gpu"):
    """Run `ppo-plus` by a profile of `accelerate launch` in two processes that talk through gloo."""
    command = [sys.executable, "-m", "ppo_plus.cli.main", command, "--accelerate_config", profile,
               "--main_process_port", "0", *map(str, arguments)]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(RECIPES.parent)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-12000:]
    return done.stdout


@pytest.mark.support("R", "`ppo-plus ppo` by a profile, from a checkpoint of whole copies", columns=["DDP", "sharded"])
@pytest.mark.slow
def test_both_recipes_in_two_processes_save_once_and_resume_to_the_same_bits(here):
    cpu = ["--use_cpu", "True", "--ddp_backend", "gloo", "--dataloader_pin_memory", "False", "--report_to", "none",
           "--model_name_or_path", "base", "--use_peft", "--lora_target_modules", "all-linear"]  # fmt: skip
    said = launch_two(here, "reward", *cpu, *SMALL, "--dataset_name", "pairs", "--max_steps", 2,
                  "--dataset_test_split", "test", "--output_dir", "rm")  # fmt: skip
    assert said.count("Accuracy on 4 held-out pairs: ") == 1
    assert (here / "rm" / "reward_model.json").is_file()
    ppo = [*cpu, *PPO, "--dataset_name", "chats", "--dataset_test_split", "test", "--reward_funcs", "rm",
           "--num_mini_batches", 2, "--max_steps", 4,
           "--save_strategy", "steps", "--save_steps", 1, "--learning_rate", 1e-3]  # fmt: skip
    launch_two(here, "ppo", *ppo, "--output_dir", "whole")
    checkpoint = here / "whole" / "checkpoint-3"  # inside the only rollout
    assert {"rollout_0.safetensors", "rollout_1.safetensors"} <= {f.name for f in checkpoint.iterdir()}
    launch_two(here, "ppo", *ppo, "--output_dir", "resumed", "--resume_from_checkpoint", checkpoint)
    sharded = ["--output_dir", "sharded", "--resume_from_checkpoint", checkpoint]
    launch_two(here, "ppo", *ppo, *sharded, profile="fsdp2")
    found, shards, expected, before = (
        load_file(here / folder / "adapter_model.safetensors")
        for folder in ("resumed", "sharded", "whole", "whole/checkpoint-3")
    )
    for resumed in (found, shards):
        assert resumed.keys() == expected.keys() and all(torch.equal(resumed[n], expected[n]) for n in resumed)
    assert json.loads((here / "sharded" / "training_args.json").read_text())["fsdp"] is True
    assert any(not torch.equal(before[n], expected[n]) for n in before)


@pytest.mark.support("runs", "`ppo-plus reward` by a profile, by TRL's launch file", columns=["DDP", "sharded"])
@pytest.mark.slow
@pytest.mark.parametrize("name", ["fsdp2", "multi_gpu"])
def test_launch_files_of_trl_train_as_those_of_ours(here, name):
    """Theirs ask for bf16, in which the passes then compute, and for eight processes."""
    file = Path(trl.__file__).parent / "accelerate_configs" / f"{name}.yaml"
    cpu = ["--num_processes", 2, "--use_cpu", "True", "--ddp_backend", "gloo", "--dataloader_pin_memory", "False",
           "--report_to", "none", "--model_name_or_path", "base", "--use_peft", "--lora_target_modules", "all-linear",
           *SMALL, "--dataset_name", "pairs", "--max_steps", 2, "--save_strategy", "no"]  # fmt: skip
    launch_two(here, "reward", *cpu, "--output_dir", "theirs", profile=str(file))
    launch_two(here, "reward", *cpu, "--output_dir", "ours", "--mixed_precision", "bf16", profile=name)
    theirs, ours = (load_file(here / folder / "adapter_model.safetensors") for folder in ("theirs", "ours"))
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[n], ours[n]) for n in ours)
    assert json.loads((here / "theirs" / "training_args.json").read_text())["fsdp"] is (name == "fsdp2")


# --- GSM8K, and the presets on it ---


RIGHT = """
def right(completions, solution, **kwargs):
    assert all("{100" in s for s in solution)
    return [float(any(v in c[0]["content"] for v in "aeiou")) for c in completions]
"""


@pytest.fixture
def questions(here):
    """Sums in GSM8K's form, and a reward that needs no math-verify: whether a vowel occurs."""
    (here / "my_rewards.py").write_text(RIGHT)
    (here / "questions").mkdir()
    for split in ("train", "test"):
        rows = [{"question": f"how many are {a} and 3?", "answer": f"a sum.\n#### 1,00{a + 3}"} for a in range(6)] * 2
        Dataset.from_list(rows).to_json(here / "questions" / f"{split}.jsonl")
    return here


GSM8K = [*PPO, "--model_name_or_path", "base", "--dataset_name", "data", "--max_prompt_length", "100",
         "--num_mini_batches", "1", "--output_dir", "run", "--questions", "questions"]  # fmt: skip


@pytest.mark.parametrize("recipe", ["gsm8k", "sao", "vapo"])
def test_gsm8k_and_its_presets(questions, recipe, monkeypatch, capsys):
    more = ["--num_generations", "2"] if recipe == "vapo" else []
    words = ["--config", RECIPES / recipe / "ppo.yaml", *GSM8K, *more, "--reward_funcs", "my_rewards:right"]
    monkeypatch.setattr(sys, "argv", ["gsm8k.py", *map(str, words)])
    runpy.run_path(str(RECIPES / "gsm8k" / "gsm8k.py"), run_name="__main__")
    check_ppo(questions / "run")
    row = json.loads((questions / "data" / "train.jsonl").read_text().splitlines()[1])
    assert row["prompt"][0]["content"].startswith("how many are 1 and 3? ") and row["solution"] == "\\boxed{1004}"
    result = json.loads((questions / "run" / "result.json").read_text())
    assert result == json.loads(capsys.readouterr().out.splitlines()[-1])
    state = json.loads((questions / "run" / "trainer_state.json").read_text())
    assert result["at_step"][0] == 0 and result["at_step"][-1] == state["max_steps"]
    assert all(0 <= accuracy <= 1 for accuracy in result["accuracy"]) and result["seconds_per_step"] > 0
    critic = {name.split(".")[-3] for name in load_file(questions / "run" / "critic" / "adapter_model.safetensors")}
    assert ("q_proj" in critic) == (recipe != "sao") and "gate_proj" in critic


def test_gsm8k_is_scored_by_math_verify():
    pytest.importorskip("math_verify", reason="pip install math-verify==0.9.0")
    from ppo_plus.cli.data import load_reward

    prompt = runpy.run_path(str(RECIPES / "gsm8k" / "gsm8k.py"))["to_prompt"](
        {"question": "how many are 1,001 and 3?", "answer": "a sum.\n#### 1,004"}
    )["prompt"][0]["content"]
    worth = {
        "So it is \\boxed{1004}.": 1.0, "So it is \\boxed{1,004}.": 1.0, "So it is \\boxed{1005}.": 0.0, "1004": 0.0,
        "": 0.0, ".": 0.0, prompt: 0.0, f"{prompt} {prompt}": 0.0, "\\boxed{}": 0.0,
        "\\boxed{1005} or \\boxed{1004}": 0.0, "\\boxed{1004 or 1005}": 0.0,
        "so " * 400 + "\\boxed{1004}": 1.0, "\\boxed{1004}" * 3: 1.0,
    }  # fmt: skip
    completions = [[{"role": "assistant", "content": answer}] for answer in worth]
    reward = load_reward("trl.rewards:accuracy_reward")
    found = reward(completions, solution=["\\boxed{1004}"] * len(worth))
    assert dict(zip(worth, found, strict=True)) == worth


def test_the_tools_recipe_warms_up_and_trains(here, monkeypatch, capsys):
    from agents import tool_tokenizer
    from trl.chat_template_utils import qwen2_5_chat_template

    tokenizer = tool_tokenizer(qwen2_5_chat_template, response_template=None)
    tokenizer.save_pretrained(here / "tool_base")
    make_model(max_position_embeddings=2048, vocab_size=len(tokenizer)).save_pretrained(here / "tool_base")
    monkeypatch.syspath_prepend(str(RECIPES / "tools"))
    words = ["--base", "tool_base", "--warm_up_steps", 1, *PPO, "--response_length", 8, "--num_mini_batches", 1]
    monkeypatch.setattr(sys, "argv", ["calculator.py", *map(str, words)])
    runpy.run_path(str(RECIPES / "tools" / "calculator.py"), run_name="__main__")
    check_ppo(here / "out" / "tools")
    assert capsys.readouterr().out.splitlines()[-1].startswith("Held-out reward")


def test_the_calculator_calculates_and_its_reward_reads_the_last_message():
    module = runpy.run_path(str(RECIPES / "tools" / "calculator.py"))
    assert module["calculate"]("12 * 3 - 40") == -4
    with pytest.raises(Exception, match="Call"):
        module["calculate"]("print(1)")
    question = {"role": "user", "content": "What is 20 - 10 + 10?"}
    worth = {
        "It is 20": 1.0, "It is 200": 0.0, "": 0.0, "20 20": 1.0, "so " * 40 + "20": 1.0, question["content"]: 0.0,
        "20 or 21": 0.0, "19 20 21 22": 0.0,
    }  # fmt: skip
    say = [[{"role": "assistant", "content": text}] for text in worth]
    assert module["right_answer"](say, answer=[20] * len(say)) == list(worth.values())
    assert module["right_answer"]([[*say[0], {"role": "tool", "content": "20"}]], answer=[20]) == [0.0]

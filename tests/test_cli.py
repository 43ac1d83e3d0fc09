"""The command `ppo-plus`: its help, its arguments, its first errors, and what it copies from a recipe."""

from __future__ import annotations

import dataclasses
import itertools
import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import trl
from click.testing import CliRunner
from conftest import lora, make_model, make_tokenizer
from datasets import Dataset
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from ppo_plus.cli import data, launch, ppo, recipes, reward
from ppo_plus.cli.arguments import FieldParser, group_fields
from ppo_plus.cli.completion import field_names
from ppo_plus.cli.env import describe
from ppo_plus.cli.main import main
from ppo_plus.config import PPOConfig
from ppo_plus.utils.versions import SUPPORTED_VERSIONS

ROOT = Path(__file__).parents[1]
REQUIRED = ["--model_name_or_path", "base", "--dataset_name", "few.jsonl", "--reward_funcs", "cli_rewards:one",
            "--output_dir", "new/out"]  # fmt: skip

NEEDED = {"ppo": REQUIRED, "reward": ["--model_name_or_path", "base", "--output_dir", "new/out"]}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory with two prompts and a reward function."""
    monkeypatch.chdir(tmp_path)
    Dataset.from_dict({"prompt": ["one", "two"]}).to_json(tmp_path / "few.jsonl")
    (tmp_path / "cli_rewards.py").write_text("def one(completions, **kwargs):\n    return [1.0] * len(completions)\n")
    return tmp_path


@pytest.fixture
def base(here):
    make_model().save_pretrained(here / "base")
    make_tokenizer().save_pretrained(here / "base")


def error_of(capsys, command, *arguments):
    """The only line of a command that ends with exit status 2; other libraries may log theirs before."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        launch.run(command, [*map(str, arguments)])
    assert stop.value.code == 2
    shown = capsys.readouterr()
    line = shown.err.splitlines()[-1]
    assert line.startswith(f"ppo-plus {command}: error: ") and "Traceback" not in shown.err and not shown.out
    assert shown.err.count("ppo-plus") == 1
    return line


# Help


@pytest.mark.parametrize("arguments", [["--help"], ["init"], ["--version"]])
def test_quick_commands_import_no_library(arguments):
    code = (
        "import sys; from ppo_plus.cli.main import main; main(sys.argv[1:], standalone_mode=False); "
        "print([name for name in ('torch', 'transformers', 'trl', 'datasets', 'accelerate') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_training_command_imports_them():
    """Negative control of the above."""
    assert {"torch", "transformers", "trl"} <= set(sys.modules) and FieldParser.__module__ in sys.modules


def test_every_command_is_listed():
    shown = CliRunner().invoke(main, ["--help"]).output
    assert {line.split()[0] for line in shown.split("Commands:")[1].splitlines() if line} == {
        "demo", "env", "init", "memory", "merge", "ppo", "report", "reward",
    }  # fmt: skip


@pytest.mark.parametrize("module", [ppo, reward])
def test_help_shows_every_field_once_with_its_default(module):
    shown = FieldParser(module.ARGUMENTS, "test").format_help()
    options = [line.split()[0] for line in shown.splitlines() if line.startswith("  --")]
    fields = [f.name for config in module.ARGUMENTS for f in dataclasses.fields(config) if f.init]
    assert sorted(options) == sorted(f"--{name}" for name in fields)
    assert " ".join(shown.split()).count("(default: ") + shown.count("(required)") == len(fields)


def test_fields_are_grouped_by_the_sections_of_the_sources():
    groups = group_fields(PPOConfig)
    titles = [*groups]
    assert titles[:3] == ["Length of training", "Sampling", "Reward"]
    assert titles.index("Critic") < titles.index("Learning Rate & Scheduler")  # ours first
    assert groups["Objective"][0] == "objective" and "kl_coef" in groups["Reward"]
    assert "learning_rate" in groups["Learning Rate & Scheduler"]  # Trainer's, with another default
    assert sorted(itertools.chain(*groups.values())) == sorted(f.name for f in dataclasses.fields(PPOConfig) if f.init)


def test_a_source_without_sections_is_one_group():
    assert group_fields(data.DataArguments) == {
        "Data and evaluation": [
            "dataset_name",
            "dataset_config",
            "dataset_train_split",
            "dataset_test_split",
            "eval_rows",
        ]
    }


# Arguments


def test_flags_override_the_file_and_other_arguments_are_the_launchers(here):
    (here / "run.yaml").write_text("learning_rate: 1.0e-3\nlam: 0.5\nnum_processes: 3\noutput_dir: x\n")
    words = ["--config", "run.yaml", "--lam", "0.25", "--main_process_port", "0", *REQUIRED]
    (prompts, model, args), rest = FieldParser(ppo.ARGUMENTS, "test").parse(words)
    assert (args.learning_rate, args.lam, args.output_dir) == (1e-3, 0.25, "new/out")
    assert (prompts.reward_funcs, model.model_name_or_path) == (["cli_rewards:one"], "base")
    assert rest == ["--num_processes", "3", "--main_process_port", "0"]
    assert FieldParser(ppo.ARGUMENTS, "test").parse(["--config=run.yaml", *words[2:]])[0][2].lam == 0.25


def test_profiles_are_files_that_accelerate_reads():
    from accelerate.commands.config.config_args import load_config_from_file

    for name in recipes.profiles():
        words = launch.resolve_profile(["--num_machines", "1", "--accelerate_config", name])
        assert words[0] == "--config_file" and words[2:] == ["--num_machines", "1"]
        config = load_config_from_file(words[1])
        assert config.distributed_type == {"fsdp2": "FSDP", "multi_gpu": "MULTI_GPU", "single_gpu": "NO"}[name]
        assert config.mixed_precision == "no"  # PPOConfig decides
    with pytest.raises(ValueError, match="'nothing'"):
        launch.resolve_profile(["--accelerate_config", "nothing"])


TRL_PROFILES = Path(trl.__file__).parent / "accelerate_configs"


@pytest.mark.parametrize("name", sorted(file.stem for file in TRL_PROFILES.glob("*.yaml")))
def test_launch_files_of_trl_are_read_or_refused_by_the_name_of_ours(name):
    """test_recipes.py trains by those that are read."""
    file = str(TRL_PROFILES / f"{name}.yaml")
    if name.startswith("zero") or name == "fsdp1":
        kind = "FSDP1" if name == "fsdp1" else "DEEPSPEED"
        with pytest.raises(ValueError, match=f"{name}.yaml requests {kind}, .*--accelerate_config fsdp2"):
            launch.resolve_profile(["--accelerate_config", file])
    else:
        assert launch.resolve_profile(["--accelerate_config", file]) == ["--config_file", file]


def test_the_script_for_launchers_is_the_command(here, monkeypatch, capsys):
    for script, command in (("ppo.py", "ppo"), ("reward_model.py", "reward")):
        monkeypatch.setattr(sys, "argv", [script, "--nothing"])
        with pytest.raises(SystemExit):
            runpy.run_path(str(ROOT / "recipes" / script), run_name="__main__")
        assert capsys.readouterr().err.startswith(f"ppo-plus {command}: error: ")


# First errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--temperatur", "1"], "--temperatur; did you mean --temperature?"),
        (["--temperature", "warm"], "--temperature: invalid float value: 'warm'"),
        (["--temperature", "0"], "temperature must be above 0"),
        (["--config", "misspelled.yaml"], "--lambda"),
        (["--config", "broken.yaml"], "broken.yaml"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--config"], "--config needs a file"),
        (["--num_processes", "2", "stray"], "'stray'"),
        (["--accelerate_config", "nothing"], "'nothing'"),
        (["--dataset_name", "nowhere.jsonl"], "nowhere.jsonl does not exist"),
        (["--dataset_name", "damaged.jsonl"], "damaged.jsonl"),
        (["--eval_rows", "2"], "--eval_rows 2 leaves no"),
        (["--dataset_test_split", "test"], "use --eval_rows"),
        (["--reward_funcs", "nowhere:y"], "'nowhere:y' cannot be imported"),
        (["--reward_funcs", "json:y"], "'json:y' cannot be imported"),
    ],
)
def test_a_first_error_is_one_line_and_writes_nothing(here, capsys, arguments, message):
    (here / "misspelled.yaml").write_text("lambda: 1\n")
    (here / "broken.yaml").write_text("lam: [1\n")
    (here / "damaged.jsonl").write_text("{no json\n")
    before = sorted(here.rglob("*"))
    assert message in error_of(capsys, "ppo", *REQUIRED, *arguments)
    assert sorted(path for path in here.rglob("*") if "__pycache__" not in path.parts) == before


@pytest.mark.parametrize(("command", "column"), [("ppo", "prompt"), ("reward", "chosen")])
def test_a_dataset_without_the_column_is_one_line(here, base, capsys, command, column):
    (here / "questions.jsonl").write_text('{"question": "why"}\n')
    line = error_of(capsys, command, *NEEDED[command], "--dataset_name", "questions.jsonl", "--use_cpu", "True")
    assert f"'{column}'" in line and "question" in line
    assert not (here / "new").exists()


@pytest.mark.parametrize("command", ["ppo", "reward"])
@pytest.mark.parametrize("exists", [False, True])
def test_a_full_disk_is_noticed_before_training(here, base, capsys, monkeypatch, exists, command):
    """Trainer has created the folder by then; one that was there before stays."""
    if exists:
        (here / "new" / "out").mkdir(parents=True)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    (here / "pairs.jsonl").write_text('{"chosen": "one", "rejected": "two"}\n')
    small = ["--per_device_train_batch_size", "1", "--use_cpu", "True"]
    small += ["--num_mini_batches", "1"] if command == "ppo" else ["--dataset_name", "pairs.jsonl"]
    assert "MiB are free" in error_of(capsys, command, *NEEDED[command], *small)
    assert (here / "new").exists() == exists


# Merging


def test_an_adapter_is_merged_and_a_folder_without_one_is_refused(here, base, capsys):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained("base"), lora())
    model.peft_config["default"].base_model_name_or_path = "base"
    model.save_pretrained("adapter")
    (here / "adapter" / "value_head.safetensors").touch()
    main(["merge", "adapter", "merged", "--dtype", "float32"], standalone_mode=False)
    lines = capsys.readouterr().out.splitlines()[-3:]
    assert lines[0] == "LlamaForCausalLM: merged" and "value_head.safetensors" in lines[2] and "adapter" in lines[2]
    assert (here / "merged" / "model.safetensors").is_file()
    done = CliRunner().invoke(main, ["merge", "base", "other"])
    assert done.exit_code == 2 and done.output.startswith("ppo-plus merge: error: ") and "'base'" in done.output
    assert not (here / "other").exists()


def test_a_merge_into_a_quantized_base_is_refused_with_what_to_do(here, base):
    get_peft_model(AutoModelForCausalLM.from_pretrained("base"), lora()).save_pretrained("adapter")
    config = json.loads((here / "base" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (here / "quantized").mkdir()
    (here / "quantized" / "config.json").write_text(json.dumps(config))
    done = CliRunner().invoke(main, ["merge", "adapter", "other", "--base", "quantized"])
    assert done.exit_code == 2 and done.output.startswith("ppo-plus merge: error: base='quantized' ")
    assert "--base" in done.output and len(done.output.splitlines()) == 1 and not (here / "other").exists()


# Recipes, and what to paste into a report of a bug


@pytest.mark.parametrize("name", ["demo", "qwen_7b_qlora", "qwen_deberta", "tldr"])
def test_init_copies_the_files_of_a_recipe(here, name):
    done = CliRunner().invoke(main, ["init", name, "--output", "mine"])
    assert done.exit_code == 0, done.output
    files = {file.name for file in (ROOT / "recipes" / name).glob("*.yaml")}
    assert files and {file.name for file in (here / "mine").iterdir()} == files
    assert [*map(Path, done.output.split())] == [Path("mine") / file for file in sorted(files)]
    for file in files:
        assert (here / "mine" / file).read_bytes() == (ROOT / "recipes" / name / file).read_bytes()


@pytest.mark.parametrize(("arguments", "message"), [(["nothing"], "tldr"), (["tldr"], "--output")])
def test_init_refuses_what_it_does_not_have_and_what_it_would_overwrite(here, arguments, message):
    (here / "tldr").mkdir()
    done = CliRunner().invoke(main, ["init", *arguments])
    assert done.exit_code == 2 and message in done.output
    assert not [*(here / "tldr").iterdir()]


def test_init_alone_lists_the_recipes():
    shown = CliRunner().invoke(main, ["init"]).output.splitlines()
    assert [line.split()[0] for line in shown] == recipes.names()


def test_completion_knows_commands_recipes_and_profiles():
    for words, expected in (("ppo-plus r", "reward"), ("ppo-plus init tl", "tldr"),
                            ("ppo-plus ppo --accelerate_config m", "multi_gpu"),
                            ("ppo-plus ppo --lam 1 --kl_co", "--kl_coef")):  # fmt: skip
        environment = {"_PPO_PLUS_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
        done = CliRunner(env=environment).invoke(main, [], prog_name="ppo-plus")
        assert f"plain,{expected}" in done.output.splitlines()


@pytest.mark.parametrize("module", [ppo, reward])
def test_completion_knows_every_field(module):
    fields = {f.name for config in module.ARGUMENTS for f in dataclasses.fields(config) if f.init}
    assert set(field_names(module.__name__.rpartition(".")[2])) == fields


def test_the_demo_names_what_is_not_installed(monkeypatch):
    assert recipes.missing_requirements("demo") == []
    monkeypatch.setattr(
        recipes, "requires", lambda name: ['nowhere>=1; extra == "demo"', 'other; extra == "test"', "torch"]
    )
    done = CliRunner().invoke(main, ["demo"])
    assert done.exit_code == 2 and done.output.startswith("ppo-plus demo: error: nowhere not found.")
    assert "ppo-plus[demo]" in done.output


def test_what_to_paste_into_a_report_names_versions_and_devices():
    shown = describe()
    assert all(f"- {name}: " in shown and limit.newest_tested in shown for name, limit in SUPPORTED_VERSIONS.items())
    assert "CPU cores" in shown and "- Python: 3." in shown


@pytest.mark.parametrize("option", [{"kl_horizon": 100}, {"kl_gains": [1.0, 0.2]}], ids=str)
def test_options_of_a_controller_need_its_target(option):
    given = {"dataset_name": "some/prompts", "reward_funcs": "rewards:letters", "tools": "tools:add"}
    with pytest.raises(ValueError, match=f"--{next(iter(option))} .*--kl_target"):
        ppo.PromptArguments(**given, **option)
    assert ppo.PromptArguments(**given, **option, kl_target=6.0).tools == ["tools:add"]  # one name, not its letters

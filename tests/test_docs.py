"""The documentation: each block of code runs, links and names lead somewhere, parameters and metrics are complete."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.util
import pkgutil
import re
import shlex
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from agents import add, make_tool_model, questions, tool_tokenizer
from click.testing import CliRunner
from conftest import CHAT_TEMPLATE, lora, make_model, make_prompts, make_tokenizer, make_trainer
from datasets import Dataset
from markdown_it import MarkdownIt
from trl.chat_template_utils import qwen3_chat_template
from vllm_server import FakeVLLM

from ppo_plus import PPOConfig, RewardConfig, RewardTrainer
from ppo_plus.cli import recipes
from ppo_plus.cli.arguments import FieldParser
from ppo_plus.cli.main import main
from ppo_plus.config.trl_fields import DERIVED_SIZE_FIELDS, TRLFields

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("recipes/**/README.md")), *sorted(ROOT.glob("docs/**/*.md"))]
MODEL = "Qwen/Qwen2.5-0.5B-Instruct"
TOOL_MODEL = "Qwen/Qwen3-0.6B"
# Models by their names on the Hub, which are folders here.
MODEL_NAMES = re.compile(r"\b(?:Qwen|HuggingFaceTB|meta-llama|google|mistralai|microsoft|EleutherAI)/[\w.-]*\w")


def import_file(file: Path):
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


hooks = import_file(ROOT / "docs" / "hooks.py")


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def tokens(page: Path) -> list:
    return MarkdownIt("commonmark").enable("table").parse(page.read_text(encoding="utf-8"))


def blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """First line and text of the blocks of code in a language."""
    return [(t.map[0] + 1, t.content) for t in tokens(page) if t.type == "fence" and t.info == language]


# Blocks of code


@pytest.fixture(scope="module")
def user_folder(tmp_path_factory):
    """What the pages name: models by their names on the Hub, a reward model, and two runs with a report."""
    folder = tmp_path_factory.mktemp("user")
    make_model(max_position_embeddings=1024).save_pretrained(folder / MODEL)
    make_tokenizer(CHAT_TEMPLATE).save_pretrained(folder / MODEL)
    codes = [code for page in PAGES for language in ("python", "bash") for _, code in blocks(page, language)]
    make_model(max_position_embeddings=4096, vocab_size=len(tool_tokenizer())).save_pretrained(folder / TOOL_MODEL)
    tool_tokenizer(qwen3_chat_template).save_pretrained(folder / TOOL_MODEL)
    for name in {name for code in codes for name in MODEL_NAMES.findall(code)} - {MODEL, TOOL_MODEL}:
        shutil.copytree(folder / MODEL, folder / name)
    pairs = Dataset.from_dict({"chosen": ["warm", "funny"], "rejected": ["cold", "dull"]})
    args = RewardConfig(output_dir=str(folder / "reward_model"), max_steps=1, report_to="none", save_strategy="no")
    reward = RewardTrainer(str(folder / MODEL), args, peft_config=lora(task_type="SEQ_CLS"), train_dataset=pairs)
    reward.train()
    reward.save_model()
    trainer = make_trainer(folder / "out" / "run1", config={"html_report": True, "max_steps": 4})
    trainer.train()
    shutil.copytree(folder / "out" / "run1", folder / "out" / "run2")
    return folder


@pytest.fixture
def in_user_folder(user_folder, tmp_path, monkeypatch):
    shutil.copytree(user_folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)


@contextlib.contextmanager
def served(code: str):
    """The code with the address of a server in place of that of vLLM, if it uses one."""
    address = "http://localhost:8000"
    if address not in code:
        yield code
        return
    with FakeVLLM(make_model(max_position_embeddings=1024), max_model_len=1024) as server:
        yield code.replace(address, server.url)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=name_of)
def test_the_blocks_of_a_page_run_one_after_the_other(page, in_user_folder):
    namespace: dict = {"__name__": "__main__"}
    for line, code in blocks(page, "python"):
        with served(code) as code:
            exec(compile("\n" * line + code, str(page), "exec"), namespace)  # errors name the line of the page
        trainer = namespace.get("trainer")
        if ".train()" in code and trainer is not None:
            assert trainer.state.global_step > 0
        if ".save_model()" in code:
            assert (Path(trainer.args.output_dir) / "adapter_model.safetensors").is_file()


def test_no_page_has_a_block_that_no_test_sees():
    for page in PAGES:
        assert not [t.content for t in tokens(page) if t.type == "code_block"], page
        assert {t.info for t in tokens(page) if t.type == "fence"} <= {"python", "bash", "diff", "text"}, page


def check_command(words: list[str]) -> None:
    """Refuse a command of the pages that names a file, a target of make or an option that does not exist."""
    if words[0] == "make":
        assert re.search(rf"^([\w-]+ )*{words[1]}( [\w-]+)*:", (ROOT / "Makefile").read_text(), re.MULTILINE), words
        return
    if words[0] == "ppo-plus":
        return check_ppo_plus(words[1], words[2:])
    if words[:2] == ["accelerate", "launch"]:
        words = ["python", *words[next(i for i, word in enumerate(words) if word.endswith(".py")) :]]
    if words[1] == "-m":
        status = importlib.import_module(f"{words[2]}.__main__").main(words[3:])
        assert status in (None, 0, 1)
        return
    source = (ROOT / words[1]).read_text(encoding="utf-8")
    known = {field.name for config in (PPOConfig, RewardConfig) for field in dataclasses.fields(config)}
    for word in words[2:]:
        if word.startswith("--"):
            name = word[2:].partition("=")[0]
            in_source = re.search(rf"[\"']--{name}[\"']|\b{name.replace('-', '_')}\s*[:=]", source)
            assert in_source or name in known or name == "config", word
        elif "/" in word:
            assert (ROOT / word).exists(), word


def check_ppo_plus(command: str, words: list[str]) -> None:
    """Run a quick command of `ppo-plus`; check recipe and options of one that trains."""
    if command in ("memory", "report", "init", "env"):
        assert CliRunner().invoke(main, [command, *words]).exit_code in (0, 1), words
        return
    if command == "merge":
        return main.commands["merge"].make_context("merge", list(words)).close()  # parses and does not merge
    if command == "demo":
        types = [import_demo().DemoArguments]
    else:
        types = importlib.import_module(f"ppo_plus.cli.{command}").ARGUMENTS
    parser = FieldParser(types, "test", build=False)
    recipe = words.index("--config") + 1 if "--config" in words else None
    if recipe is not None and not Path(words[recipe]).is_file():  # a copy by `ppo-plus init`, or a clone's
        words = [*words[:recipe], str(recipes.folder() / words[recipe].removeprefix("recipes/")), *words[recipe + 1 :]]
    try:
        parser.parse(words)
    except SystemExit as error:  # the page leaves out what is required
        raise AssertionError(words) from error


def import_demo():
    folder = str(ROOT / "recipes" / "demo")
    sys.path.insert(0, folder)
    try:
        return importlib.import_module("rm_then_ppo")
    finally:
        sys.path.remove(folder)


def commands(page: Path) -> list[list[str]]:
    text = "\n".join(code for _, code in blocks(page, "bash")).replace("\\\n", " ")
    return [words for line in text.splitlines() if (words := shlex.split(line, comments=True))]


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "bash")], ids=name_of)
def test_the_commands_of_a_page_exist(page, in_user_folder, monkeypatch):
    # The planner's figures are a matter of its own tests; here it must take the options.
    monkeypatch.setattr("ppo_plus.memory.__main__.plan", lambda config, setup, *args: SimpleNamespace(fits=True))
    monkeypatch.setattr("ppo_plus.memory.__main__.table", str)
    for words in commands(page):
        if words[0] in ("make", "python", "accelerate", "ppo-plus"):
            check_command(words)


@pytest.mark.parametrize(
    "command",
    ["make nothing", "python benchmarks/nothing.py", "python benchmarks/crash_recovery.py --nothing 1",
     "python recipes/ppo.py --config recipes/nothing.yaml", "python -m ppo_plus.nothing", "ppo-plus nothing",
     "ppo-plus init nothing", "ppo-plus ppo --config nothing/ppo.yaml", "ppo-plus demo --nothing 1"],
)  # fmt: skip
def test_a_command_that_does_not_exist_is_found(command):
    with pytest.raises((AssertionError, FileNotFoundError, ModuleNotFoundError, ValueError)):
        check_command(command.split())


# Links and names


def slug(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def anchors(page: Path) -> set[str]:
    found = tokens(page)
    return {slug(found[i + 1].content.replace("`", "")) for i, t in enumerate(found) if t.type == "heading_open"}


def broken_links(page: Path) -> list[str]:
    inline = [child for token in tokens(page) for child in token.children or []]
    links = [t.attrs.get("href") or t.attrs.get("src") for t in inline if t.type in ("link_open", "image")]
    broken = []
    for link in links:
        target, _, anchor = link.partition("#")
        if re.match(r"https?:", link):
            continue
        file = (page.parent / target).resolve() if target else page
        if not file.exists() or (anchor and file.suffix == ".md" and anchor not in anchors(file)):
            broken.append(link)
    return broken


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    assert broken_links(page) == []


def test_broken_links_are_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# One two\n[a](#one-two) [b](#three) [c](gone.md) [d](page.md#one-two) ![e](page.md#four)\n")
    assert broken_links(page) == ["#three", "gone.md", "page.md#four"]


def test_every_finding_is_linked_from_a_page():
    linked = {
        Path(child.attrs["href"]).name
        for page in (ROOT / "docs").glob("*.md")
        for token in tokens(page)
        for child in token.children or []
        if child.type == "link_open" and "/findings/" in child.attrs["href"]
    }
    assert linked == {file.name for file in (ROOT / "findings").glob("*.sh")}


def test_every_page_of_docs_is_in_the_navigation_and_the_reverse():
    nav = re.findall(r": ([\w/]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    pages = {file.relative_to(ROOT / "docs").as_posix() for file in (ROOT / "docs").rglob("*.md")}
    assert sorted(nav) == sorted(pages)


def test_what_the_api_pages_name_is_there():
    named = [n for p in (ROOT / "docs" / "api").glob("*.md") for n in re.findall(r"^::: ([\w.]+)", p.read_text(), re.M)]
    assert len(named) > 20
    for name in named:
        assert pkgutil.resolve_name(name) is not None
    with pytest.raises(AttributeError):
        pkgutil.resolve_name("ppo_plus.algo.gone")


def test_the_tree_of_contributing_shows_every_room_and_no_file_that_is_gone():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    tree = re.search(r"```text\nppo_plus/\n(.*?)\n\n", text, re.DOTALL)[1]
    room, shown = Path("."), set()
    for line in tree.splitlines():
        indent, name = re.match(r"([│├└─ ]*)([\w./]+)", line).groups()
        path = Path(name) if len(indent) < 5 else room / name
        room = path if len(indent) < 5 else room
        shown |= {path} if name != "..." else set()
    package = ROOT / "ppo_plus"
    assert all((package / path).exists() for path in shown), shown
    top = {path.relative_to(package) for path in package.iterdir() if path.name not in ("__pycache__", "py.typed")}
    assert {path for path in shown if len(path.parts) == 1} == top


def test_what_the_algorithm_page_names_is_there():
    text = (ROOT / "docs" / "algorithm.md").read_text()
    named = re.findall(r"`([A-Za-z_]+)\.(\w+)", text)
    modules = {
        "algo": "algo", "buffer": "rollout.buffer", "batching": "data.batching", "seeding": "data.seeding",
        "padding": "data.padding", "value_head": "models.value_head", "PPOTrainer": "trainer",
        "ActorCritic": "models.actor_critic", "RolloutPhase": "training.rollouts", "advantages": "rollout.advantages",
        "NonfiniteGradientGuard": "training.gradients", "BackboneRunner": "models.backbone_runner",
        "logprobs": "models.logprobs", "prefix_reward_baseline": "algo.prefix_reward_baseline",
    }  # fmt: skip
    named = [(owner, name) for owner, name in named if owner in modules and name != "safetensors"]
    assert len(named) > 25
    for owner, name in named:
        found = importlib.import_module(f"ppo_plus.{modules[owner]}")
        assert hasattr(getattr(found, owner, found), name), f"{owner}.{name}"


def test_the_migration_page_names_every_field_that_trls_config_had():
    text = (ROOT / "docs" / "coming_from_trl.md").read_text()
    for field in (*DERIVED_SIZE_FIELDS, *(f.name for f in dataclasses.fields(TRLFields))):
        assert field in text, field


def test_the_quickstart_is_short():
    for page in ("README.md", "docs/index.md"):
        _, code = blocks(ROOT / page, "python")[0]
        assert len([line for line in code.splitlines() if line.strip()]) <= 25


# Parameters


def test_every_field_of_the_configuration_is_explained_beside_what_it_is_for():
    pages = [page for page in (ROOT / "docs").glob("*.md")]
    shown = {name for page in pages for name in hooks.parameter_names(page.read_text(), PPOConfig)}
    assert shown == set(hooks.own_fields(PPOConfig))


def test_own_fields_are_those_with_a_help_text_of_ours():
    own = hooks.own_fields(PPOConfig)
    assert {"total_episodes", "learning_rate", "sft_model_path"} <= set(own)
    assert not {"weight_decay", "output_dir"} & set(own)  # Trainer's
    assert all(PPOConfig.__dataclass_fields__[name].metadata["help"] for name in own)


@dataclasses.dataclass
class Options:
    rate: float = dataclasses.field(default=0.5, metadata={"help": "One of <a> | snake_case."})
    name: str = dataclasses.field(default="x", metadata={"help": "A name."})


def test_a_parameter_table_shows_default_and_help():
    table = hooks.parameter_table(["name", "rate"], Options).splitlines()
    assert table[2:] == ["| `name` | `'x'` | A name. |", r"| `rate` | `0.5` | One of &lt;a> \| snake\_case. |"]
    with pytest.raises(KeyError):
        hooks.parameter_table(["gone"], Options)


# The site's copies of files outside of docs/


def test_links_that_leave_docs_lead_to_copies():
    text = "[a](../README.md#x) [b](metrics.md) [c](../gone.json) [d](https://a.b/c) [e](#f)"
    assert hooks.rewrite_links(text, "docs/index.md") == (
        "[a](repository/README.md#x) [b](metrics.md) [c](../gone.json) [d](https://a.b/c) [e](#f)"
    )
    assert hooks.rewrite_links("[a](../README.md)", "docs/api/config.md") == "[a](../README.md)"  # docs/README.md: none
    assert hooks.rewrite_links("[a](docs/index.md)", "README.md") == "[a](../index.md)"
    assert hooks.rewrite_links("[a](../recipes/)", "docs/index.md") == "[a](repository/recipes/README.md)"
    assert hooks.rewrite_links("[a](../docs/index.md)", "recipes/README.md") == "[a](../../index.md)"


def test_files_that_copies_link_to_are_copied_too():
    found = hooks.linked_files(["docs/index.md"])
    assert {"recipes/README.md", "constraints.txt"} <= set(found)
    assert any(file.startswith("recipes/") and file.endswith(".yaml") for file in found)  # by recipes/README.md
    assert not any(file.startswith("docs/") for file in found)


@pytest.mark.parametrize(
    ("html", "loads"),
    [
        ('<script src="https://a.b/c.js"></script>', True),
        ('<link rel="stylesheet" href="//a.b/c.css">', True),
        ('<img alt="x" src="http://a.b/c.png">', True),
        ('<a href="https://a.b/c">a link</a><script src="assets/c.js"></script>', False),
    ],
)
def test_a_page_that_loads_from_another_host_is_refused(tmp_path, html, loads):
    pytest.importorskip("mkdocs")
    from mkdocs.exceptions import PluginError

    (tmp_path / "index.html").write_text(html)
    config = SimpleNamespace(site_dir=str(tmp_path))
    if not loads:
        return hooks.on_post_build(config)
    with pytest.raises(PluginError):
        hooks.on_post_build(config)


# Metrics


def metrics_of(page: str) -> set[str]:
    return {name for row in re.findall(r"^\| (`.*?) \|", page, re.MULTILINE) for name in re.findall(r"`([^`]+)`", row)}


def undocumented(logged: set[str], page: str) -> set[str]:
    """The names that a table of metrics lacks, with evaluations' prefixes and rewards' names taken off."""
    names = {re.sub(r"^(eval|test)_", "", name) for name in logged}
    names = {re.sub(r"^rewards/[^/]+/", "rewards/<name>/", name) for name in names}
    return names - metrics_of(page) - {"step", "win_rate"}


def test_every_metric_that_is_logged_is_in_the_table(tmp_path):
    page = (ROOT / "docs" / "metrics.md").read_text()
    trainer = make_trainer(
        tmp_path,
        config={"eval_strategy": "steps", "eval_steps": 4, "eval_win_rate": True, "entropy_coef": 0.01},
        eval_dataset=make_prompts(4),
    )
    trainer.train()
    logged = {name for logs in trainer.state.log_history for name in logs}
    assert len(logged) > 40 and "`eval_win_rate`" in page
    assert undocumented(logged, page) == set()
    assert undocumented(logged, page.replace("`entropy`", "")) == {"entropy"}
    assert undocumented({"eval_new/metric"}, page) == {"new/metric"}


def test_metrics_in_the_table_are_metrics(tmp_path):
    tools = {"model": make_tool_model(trained=False), "processing_class": tool_tokenizer(), "tools": [add]}
    tools |= {"train_dataset": questions(), "reward_funcs": lambda completions, **kwargs: [1.0] * len(completions)}
    options = {"critic_gate": True, "positive_example_nll_weight": 0.1, "missing_eos_penalty": None}
    trainer = make_trainer(tmp_path, config={"max_steps": 4, **options}, **tools)
    trainer.train()
    logged = {name for logs in trainer.state.log_history for name in logs}
    logged = {re.sub(r"^rewards/[^/]+/", "rewards/<name>/", name) for name in logged} | {"ppo/skipped_steps"}
    assert metrics_of((ROOT / "docs" / "metrics.md").read_text()) <= logged

"""Every Python block of the documentation runs as it stands there."""

from __future__ import annotations

import dataclasses
import importlib
import re
from pathlib import Path

import pytest
from conftest import CHAT_TEMPLATE, make_model, make_tokenizer

from ppo_plus.config.trl_fields import DERIVED, TRLFields

ROOT = Path(__file__).parents[1]
BLOCKS = [
    pytest.param(code, id=f"{file.name}-{index}")
    for file in [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
    for index, code in enumerate(re.findall(r"```python\n(.*?)```", file.read_text(), flags=re.DOTALL))
]


@pytest.mark.parametrize("code", BLOCKS)
def test_the_block_runs_as_shown(code, tmp_path, monkeypatch):
    # The name of the model in the text is a folder here, with a tiny model in it.
    folder = tmp_path / "Qwen" / "Qwen2.5-0.5B-Instruct"
    make_model().save_pretrained(folder)
    make_tokenizer(CHAT_TEMPLATE).save_pretrained(folder)
    monkeypatch.chdir(tmp_path)
    namespace: dict = {"__name__": "__main__"}
    exec(compile(code, "README", "exec"), namespace)
    trainer = namespace.get("trainer")
    if trainer is not None:
        assert trainer.state.global_step > 0
        assert (Path(trainer.args.output_dir) / "adapter_model.safetensors").is_file()


PAGES = [ROOT / "README.md", ROOT / "recipes" / "README.md", *sorted(ROOT.glob("docs/*.md"))]


def test_there_are_blocks_and_links_lead_somewhere():
    assert len(BLOCKS) >= 3
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), (page, target)


def test_what_the_algorithm_page_names_is_there():
    text = (ROOT / "docs" / "algorithm.md").read_text()
    named = re.findall(r"`([A-Za-z_]+)\.(\w+)", text)
    modules = {
        "algo": "algo", "buffer": "rollout.buffer", "batching": "data.batching", "seeding": "data.seeding",
        "padding": "data.padding", "value_head": "models.value_head", "PPOTrainer": "trainer",
        "ActorCritic": "models.actor_critic", "RolloutCollector": "rollout.collector",
    }  # fmt: skip
    named = [(owner, name) for owner, name in named if owner in modules]
    assert len(named) > 25
    for owner, name in named:
        found = importlib.import_module(f"ppo_plus.{modules[owner]}")
        assert hasattr(getattr(found, owner, found), name), f"{owner}.{name}"


def test_the_migration_page_names_every_field_that_trls_config_had():
    text = (ROOT / "docs" / "migration.md").read_text()
    for field in (*DERIVED, *(f.name for f in dataclasses.fields(TRLFields))):
        assert field in text, field


def test_the_quickstart_is_short():
    code = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)[0]
    assert len([line for line in code.splitlines() if line.strip()]) <= 20

"""The configuration: sizes that are derived, help for every field, and the same values from code, flags and YAML."""

from __future__ import annotations

import dataclasses
from typing import get_args, get_type_hints

import numpy as np
import pytest
from transformers import HfArgumentParser, TrainingArguments
from trl import TrlParser

from ppo_plus import PPOConfig, RewardConfig
from ppo_plus.config.checks import above, at_least, at_most, below, field_checks, one_of
from ppo_plus.config.critic_fields import CriticFields
from ppo_plus.config.trl_fields import TRLFields
from ppo_plus.config.vllm_fields import VLLMFields

OWN = [
    field
    for config in (PPOConfig, CriticFields, TRLFields, RewardConfig)
    for field in dataclasses.fields(config)
    if field.name in config.__annotations__
]
BASE = ["--output_dir", "out", "--use_cpu", "--report_to", "none"]


def config(**overrides) -> PPOConfig:
    return PPOConfig(output_dir="out", use_cpu=True, report_to="none", **overrides)


@pytest.mark.parametrize(
    ("micro_batch", "accumulation", "minibatches", "epochs", "rollout", "steps"),
    [(1, 1, 1, 1, 1, 1), (2, 2, 2, 2, 8, 4), (4, 8, 3, 1, 96, 3), (8, 1, 1, 4, 8, 4), (1, 16, 2, 3, 32, 6)],
)
def test_derived_sizes_by_hand(micro_batch, accumulation, minibatches, epochs, rollout, steps):
    args = config(
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=accumulation,
        num_mini_batches=minibatches,
        num_ppo_epochs=epochs,
    )
    assert (args.rollout_batch_size, args.steps_per_rollout) == (rollout, steps)
    assert args.logging_steps == steps  # once per rollout, unless it is set


@pytest.mark.parametrize(
    ("critic", "vf_coef", "used"),
    [
        ("shared", None, 0.1),
        ("detached", None, 1.0),
        ("shared", 0.7, 0.7),
        ("detached", 0.7, 0.7),
        ("shared", 0.0, 0.0),
    ],
)
def test_the_weight_of_the_value_loss_follows_the_critic_unless_it_is_set(critic, vf_coef, used):
    assert config(critic=critic, vf_coef=vf_coef).resolved_vf_coef == used


def test_the_defaults_are_those_that_are_documented():
    args = config()
    expected = {
        "num_ppo_epochs": 2, "num_mini_batches": 2, "learning_rate": 1e-5, "value_head_learning_rate": 1e-4,
        "adam_epsilon": 1e-5, "weight_decay": 0.0, "max_grad_norm": 1.0, "kl_coef": 0.05, "kl_estimator": "k1",
        "kl_penalty_in": "reward", "gamma": 1.0, "lam": 0.95, "cliprange": 0.2, "cliprange_value": 0.2,
        "objective": "clip", "missing_eos_penalty": 1.0, "whiten_rewards": False, "logging_nan_inf_filter": False,
        "remove_unused_columns": False, "restore_callback_states_from_checkpoint": True,
    }  # fmt: skip
    assert {name: getattr(args, name) for name in expected} == expected


@pytest.mark.parametrize("kind", [PPOConfig, RewardConfig])
def test_a_half_precision_that_a_cpu_has_not_is_named(kind, recwarn):
    given = {"output_dir": "out", "use_cpu": True, "report_to": "none"}
    with pytest.warns(UserWarning, match="fp16=True has no effect on a CPU"):
        kind(**given, fp16=True, bf16=False)
    recwarn.clear()
    kind(**given, bf16=True)
    assert not [w for w in recwarn if "fp16" in str(w.message)]


def test_a_log_interval_that_is_set_stays():
    assert config(logging_steps=3).logging_steps == 3


@pytest.mark.parametrize("field", OWN, ids=lambda field: field.name)
def test_every_field_has_a_sentence_of_help(field):
    text = field.metadata["help"]
    assert text[0].isupper() or text[0] in "'" or text.startswith("bf16")
    assert text.endswith(".")
    assert len(text.partition(" Allowed: ")[0]) < 120


NO_RANGE = {"reward_weights": "a reward may be subtracted"}


@pytest.mark.parametrize("kind", [PPOConfig, RewardConfig])
def test_every_field_has_a_check_of_its_kind_and_every_number_a_range(kind):
    checks = field_checks(kind)
    own = {field.name for field in dataclasses.fields(kind) if field in OWN}
    assert own <= set(checks)
    numeric = {name for name, (of_kind, *_) in checks.items() if "number" in of_kind.expected}
    assert {name for name in numeric if len(checks[name]) == 1} == set(NO_RANGE) & set(checks)


@pytest.mark.parametrize("name", field_checks(PPOConfig))
def test_a_value_of_another_kind_is_refused_and_none_only_where_the_annotation_has_none(name):
    with pytest.raises(ValueError, match=rf"^PPOConfig: {name} must be .*; got \(3\+4j\)\.$"):
        config(**{name: 3 + 4j})
    if type(None) in get_args(get_type_hints(PPOConfig)[name]):
        config(**{name: None})
    else:
        with pytest.raises(ValueError, match=rf"^PPOConfig: {name} must be .*; got None\.$"):
            config(**{name: None})


@pytest.mark.parametrize(
    ("check", "expected", "inside", "outside"),
    [
        (above(0), "above 0", [1e-9, 5], [0, -1]),
        (at_least(1), "at least 1", [1, 2], [0.99]),
        (above(0) & at_most(1), "above 0 and at most 1", [0.5, 1], [0, 1.01]),
        (at_least(0) & below(1), "at least 0 and below 1", [0, 0.99], [-0.01, 1]),
        (one_of("a", None), "one of 'a', None", ["a", None], ["b"]),
        (below(0).or_none(), "below 0, or None", [-1, None], [0]),
    ],
)
def test_checks_by_hand(check, expected, inside, outside):
    assert check.expected == expected
    assert [check.accepts(value) for value in inside + outside] == [True] * len(inside) + [False] * len(outside)


def test_a_range_is_in_the_help_and_holds_in_a_subclass_that_redefines_its_field():
    assert "above 0 and below 1" in " ".join(HfArgumentParser(PPOConfig).format_help().split())

    class Subclass(PPOConfig):
        pass

    @dataclasses.dataclass
    class Redefined(Subclass):
        cliprange: float = 0.3

    assert Redefined("out", use_cpu=True, report_to="none").cliprange == 0.3
    with pytest.raises(ValueError, match="Redefined: cliprange must be above 0 and below 1; got 1.5"):
        Redefined("out", use_cpu=True, report_to="none", cliprange=1.5)


def test_integers_of_numpy_become_int():
    given = {"stop_token_id": np.int64(3), "num_mini_batches": np.int32(4), "max_steps": np.int64(5),
             "per_device_train_batch_size": np.uint8(2), "top_k": np.int64(7)}  # fmt: skip
    made = config(**given)
    assert made.to_json_string() == config(**{name: int(value) for name, value in given.items()}).to_json_string()
    assert config(stop_token_id=[np.int64(3), 5]).extra_stop_ids == [3, 5]
    for wrong in (np.float64(3), np.bool_(True), "3"):
        with pytest.raises(ValueError, match="num_mini_batches must be a whole number"):
            config(num_mini_batches=wrong)


def test_no_field_of_trainer_is_redefined_by_accident():
    """A new field of ours must not take the name of one of transformers with another meaning."""
    ours = {*PPOConfig.__annotations__, *CriticFields.__annotations__, *VLLMFields.__annotations__} & {
        f.name for f in dataclasses.fields(TrainingArguments)
    }
    assert ours == {
        "learning_rate", "adam_epsilon", "bf16", "logging_steps", "logging_nan_inf_filter", "remove_unused_columns",
        "restore_callback_states_from_checkpoint",
    }  # fmt: skip


FLAGS = {
    "total_episodes": ("100", 100),
    "num_mini_batches": ("3", 3),
    "num_generations": ("2", 2),
    "generation_batch_size": ("16", 16),
    "kl_coef": ("1e-1", 0.1),
    "kl_estimator": ("k3", "k3"),
    "kl_penalty_in": ("loss", "loss"),
    "cliprange_value": ("0.3", 0.3),
    "cliprange_high": ("0.28", 0.28),
    "missing_eos_penalty": ("2", 2.0),
    "stop_token": ("eos", "eos"),
    "critic": ("detached", "detached"),
    "lam_value": ("1", 1.0),
    "length_adaptive_alpha": ("0.05", 0.05),
    "positive_example_nll_weight": ("0.1", 0.1),
    "critic_gate": ("true", True),
    "advantage_baseline": ("rloo", "rloo"),
    "value_head": ("mlp", "mlp"),
    "value_head_activation": ("gelu", "gelu"),
    "value_head_learning_rate": ("3e-4", 3e-4),
    "learning_rate": ("3e-5", 3e-5),
    "shuffle_dataset": ("false", False),
    "log_completions": ("true", True),
    "model_init_kwargs": ('{"dtype": "float32"}', {"dtype": "float32"}),
    "chat_template_kwargs": ('{"enable_thinking": false}', {"enable_thinking": False}),
}


@pytest.mark.parametrize("parser", [HfArgumentParser, TrlParser])
def test_flags_give_values_of_the_right_type(parser):
    flags = [part for name, (text, _) in FLAGS.items() for part in (f"--{name}", text)]
    (args,) = parser(PPOConfig).parse_args_into_dataclasses([*BASE, *flags, "--reward_weights", "1", "0.5"])
    for name, (_, value) in FLAGS.items():
        found = getattr(args, name)
        assert found == value, name
        assert type(found) is type(value), name
    assert args.reward_weights == [1.0, 0.5]


def test_without_flags_the_parser_gives_the_defaults():
    (args,) = HfArgumentParser(PPOConfig).parse_args_into_dataclasses(BASE)
    expected = config()
    for field in dataclasses.fields(PPOConfig):
        if field.name in {*PPOConfig.__annotations__, *CriticFields.__annotations__}:
            assert getattr(args, field.name) == getattr(expected, field.name), field.name


@pytest.mark.parametrize(
    "flags",
    [["--kl_penalty_in", "both"], ["--critic", "twin"], ["--response_length", "many"], ["--no_such_option", "1"]],
)
def test_flags_that_mean_nothing_are_refused(flags, capsys):
    with pytest.raises((SystemExit, ValueError)):
        HfArgumentParser(PPOConfig).parse_args_into_dataclasses([*BASE, *flags])
    capsys.readouterr()


YAML = """
output_dir: out
use_cpu: true
report_to: none
learning_rate: 3.0e-5
value_head_learning_rate: 1.0e-4
num_mini_batches: 4
reward_weights: [1, 0.5]
model_init_kwargs: {dtype: float32}
cliprange_value: null
missing_eos_penalty: null
stop_token: eos
shuffle_dataset: false
"""
FROM_YAML = {
    "learning_rate": 3e-5, "value_head_learning_rate": 1e-4, "num_mini_batches": 4, "reward_weights": [1, 0.5],
    "model_init_kwargs": {"dtype": "float32"}, "cliprange_value": None, "missing_eos_penalty": None,
    "stop_token": "eos", "shuffle_dataset": False,
}  # fmt: skip


def test_a_yaml_file_gives_the_same_through_both_parsers(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(YAML)
    (by_transformers,) = HfArgumentParser(PPOConfig).parse_yaml_file(str(file))
    (by_trl,) = TrlParser(PPOConfig).parse_args_and_config(["--config", str(file)])
    for args in (by_transformers, by_trl):
        assert {name: getattr(args, name) for name in FROM_YAML} == FROM_YAML


def test_a_flag_wins_over_the_yaml_file(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(YAML)
    (args,) = TrlParser(PPOConfig).parse_args_and_config(["--config", str(file), "--num_mini_batches", "8"])
    assert (args.num_mini_batches, args.stop_token) == (8, "eos")


def test_a_name_that_does_not_exist_in_yaml_is_refused(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(YAML + "kl_coeff: 0.1\n")
    with pytest.raises(ValueError, match="kl_coeff"):
        HfArgumentParser(PPOConfig).parse_yaml_file(str(file))
    with pytest.raises(ValueError, match="kl_coeff"):
        TrlParser(PPOConfig).parse_args_and_config(["--config", str(file)])


def test_a_number_that_yaml_takes_for_text_is_named(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(YAML.replace("3.0e-5", "3e-5"))
    with pytest.raises(ValueError, match=r"learning_rate must be a number \(.*write 3.0e-5\); got '3e-5'"):
        HfArgumentParser(PPOConfig).parse_yaml_file(str(file))


def test_a_config_survives_a_round_trip_through_its_dict():
    args = config(kl_coef=0.3, reward_weights=[1.0, 2.0], total_episodes=64)
    again = PPOConfig(**{f.name: getattr(args, f.name) for f in dataclasses.fields(PPOConfig) if f.init})
    assert again.to_dict() == args.to_dict()
    assert dataclasses.replace(args, num_mini_batches=4).rollout_batch_size == 2 * args.rollout_batch_size


def test_reward_config_does_not_warn_about_names_that_are_deprecated(recwarn):
    RewardConfig(output_dir="out", use_cpu=True, report_to="none")
    assert not [w for w in recwarn if "deprecated" in str(w.message)]


@pytest.mark.parametrize(
    ("make", "kind", "fix"),
    [
        (make, kind, "--accelerate_config fsdp2")
        for make in (PPOConfig, RewardConfig)
        for kind in ("DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG")
    ],
)
def test_what_would_split_the_weights_is_refused_however_it_is_asked_for(make, kind, fix, monkeypatch):
    monkeypatch.setenv(f"ACCELERATE_USE_{kind}", "false")  # as `accelerate launch` may leave it
    make(output_dir="out", use_cpu=True, report_to="none", fsdp="", deepspeed=None)
    monkeypatch.setenv(f"ACCELERATE_USE_{kind}", "true")
    with pytest.raises(ValueError, match=f"ACCELERATE_USE_{kind} in the environment .*{fix}"):
        make(output_dir="out", use_cpu=True, report_to="none")


def test_the_weights_of_a_reward_model_are_not_split_either():
    with pytest.raises(ValueError, match=r"RewardConfig\(deepspeed=...\) .*--accelerate_config fsdp2"):
        RewardConfig(output_dir="out", use_cpu=True, report_to="none", deepspeed="zero3.json")

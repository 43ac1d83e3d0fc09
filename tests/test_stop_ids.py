"""`stop_token_id`: one id or several end a response; anything else is refused when the configuration is made."""

from __future__ import annotations

import pytest
from conftest import make_config, make_model, make_prompts, make_tokenizer, make_trainer
from datasets import Dataset
from trl import TrlParser

from ppo_plus import PPOCallback, PPOConfig


@pytest.mark.parametrize(
    ("given", "expected"),
    [(None, [2]), (0, [0, 2]), (7, [2, 7]), ([7], [2, 7]), ([9, 7, 2], [2, 7, 9]), ((8,), [2, 8]), ([], [2])],
)
def test_ids_are_taken_beside_eos(tmp_path, given, expected):
    trainer = make_trainer(tmp_path, config={"stop_token_id": given})
    assert trainer.stop_ids == expected and trainer.args.stop_token_id == given


@pytest.mark.parametrize("wrong", [True, [True], 7.5, 7.0, [7.5], "<eos>", "7", ["7"], -1, [2, -1], {7}, [[7]], [None]])
def test_whatever_is_no_id_is_named_with_its_value(tmp_path, wrong):
    with pytest.raises(ValueError) as caught:
        make_config(tmp_path, stop_token_id=wrong)
    assert "stop_token_id" in str(caught.value) and repr(wrong) in str(caught.value)


def test_an_id_beyond_the_vocabulary_is_named_among_others(tmp_path):
    with pytest.raises(ValueError, match="stop_token_id=5000"):
        make_trainer(tmp_path, config={"stop_token_id": [7, 5000]})


@pytest.mark.parametrize("declared", [[7, 5000], 5000, [-1]])
def test_an_eos_of_the_generation_config_without_an_embedding_is_named(tmp_path, declared):
    model = make_model()
    model.generation_config.eos_token_id = declared
    with pytest.warns(
        UserWarning, match=rf"generation_config.eos_token_id has the id ({'-1' if declared == [-1] else 5000}),"
    ):
        trainer = make_trainer(tmp_path, model=model)
    assert trainer.stop_ids == ([2, 7] if isinstance(declared, list) and 7 in declared else [2])


def test_a_stop_id_that_only_the_tokenizer_knows_is_named(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<end of turn>"])
    unembedded = len(tokenizer) - 1
    with pytest.raises(ValueError, match=f"stop_token_id={unembedded}"):
        make_trainer(tmp_path, processing_class=tokenizer, config={"stop_token_id": unembedded})


def test_responses_end_at_any_of_the_ids(tmp_path):
    class Keep(PPOCallback):
        def on_rollout_end(self, args, state, control, rollout, samples, **kwargs):
            self.ids, self.stopped = samples.completions.completion_ids, samples.stopped

    keep, stops = Keep(), [14, 20, 24]
    trainer = make_trainer(
        tmp_path, callbacks=[keep], train_dataset=make_prompts(64),
        config={"stop_token_id": stops, "temperature": 3.0, "response_length": 16, "max_steps": 1,
                "per_device_train_batch_size": 16},
    )  # fmt: skip
    trainer.train()
    ended = {ids[-1] for ids in keep.ids if ids[-1] in stops}
    assert len(ended) > 1
    assert not any(token in [*stops, 2] for ids in keep.ids for token in ids[:-1])
    assert keep.stopped.tolist() == [ids[-1] in [*stops, 2] for ids in keep.ids]


@pytest.mark.parametrize(("arguments", "expected"), [(["7"], [7]), (["7", "9"], [7, 9])])
def test_the_command_line_takes_one_id_or_several(tmp_path, arguments, expected):
    (config,) = TrlParser(PPOConfig).parse_args_and_config(
        ["--output_dir", str(tmp_path), "--use_cpu", "--stop_token_id", *arguments]
    )
    assert config.extra_stop_ids == expected


def test_a_yaml_file_takes_one_id_or_several(tmp_path):
    for text, expected in (("7", [7]), ("[7, 9]", [7, 9])):
        (tmp_path / "config.yaml").write_text(f"output_dir: {tmp_path}\nuse_cpu: true\nstop_token_id: {text}\n")
        (config,) = TrlParser(PPOConfig).parse_args_and_config(["--config", str(tmp_path / "config.yaml")])
        assert config.extra_stop_ids == expected


def test_a_prompt_may_hold_a_stop_id(tmp_path):
    """Control: stop ids end responses alone."""
    dataset = Dataset.from_dict({"prompt": ["a bee"] * 8})
    trainer = make_trainer(tmp_path, train_dataset=dataset, config={"stop_token_id": [8, 5], "max_steps": 1})
    assert {8, 5} & {*make_tokenizer()("a bee")["input_ids"]}
    assert trainer.train().global_step == 1

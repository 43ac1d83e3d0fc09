"""Prompts from a stream: in its own order, from anywhere again, and the same as from a dataset in that order."""

from __future__ import annotations

import pytest
import torch
from conftest import count_e, make_prompts, make_trainer
from datasets import Dataset, IterableDataset

from ppo_plus import PPOCallback
from ppo_plus.data.prompt_loader import PromptStream

STEPS = 12  # three rollouts of 8 prompts in 4 steps each


class Seen(PPOCallback):
    """Keeps the prompts of each rollout."""

    def __init__(self):
        self.prompts = []

    def on_rollout_end(self, args, state, control, rollout, samples, metrics, **kwargs):
        self.prompts.append(samples.completions.prompts)


def stream(n: int = 20, shuffle: bool = False) -> IterableDataset:
    """Twenty prompts: two rollouts and four left over, so the third rollout is the stream's second epoch."""
    rows = make_prompts(n).to_list()
    dataset = IterableDataset.from_generator(lambda: iter(rows))
    return dataset.shuffle(seed=3, buffer_size=5) if shuffle else dataset


def run(folder, dataset, *, resume=None, **config):
    """Train, and return (weights, prompts by rollout)."""
    seen = Seen()
    config = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": 1, **config}
    trainer = make_trainer(folder, config=config, train_dataset=dataset, callbacks=[seen])
    trainer.train(resume_from_checkpoint=resume)
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}, seen.prompts


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module", params=[False, True], ids=["as it is", "shuffled"])
def whole_run(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return request.param, folder, *run(folder, stream(shuffle=request.param))


@pytest.mark.parametrize("step", [3, 4, 9])  # inside and between rollouts, first and second epoch of the stream
def test_a_run_on_a_stream_resumes_to_the_same_bits(whole_run, tmp_path, step):
    shuffle, folder, weights, prompts = whole_run
    resumed, later = run(tmp_path, stream(shuffle=shuffle), resume=str(folder / f"checkpoint-{step}"))
    assert same(weights, resumed)
    assert later == prompts[-(-step // 4) :]


def test_another_place_in_the_stream_is_another_run(whole_run, tmp_path):
    """Negative control: a resumed run that began the stream again would not end in the same bits."""
    shuffle, folder, weights, _ = whole_run
    rows = list(stream(shuffle=shuffle))
    begun_again = IterableDataset.from_generator(lambda: iter(rows[8:] + rows[:8]))
    assert not same(weights, run(tmp_path, begun_again, resume=str(folder / "checkpoint-4"))[0])


def test_a_stream_that_ends_begins_again_and_shuffles_anew(whole_run):
    shuffle, _, _, prompts = whole_run
    assert len(prompts) == 3 and (prompts[2] == prompts[0]) == (not shuffle)


def test_a_stream_trains_as_a_dataset_in_its_order_does(tmp_path):
    weights, prompts = run(tmp_path, make_prompts(20), shuffle_dataset=False, save_strategy="no")
    streamed, same_prompts = run(tmp_path, stream(), save_strategy="no")
    assert same(weights, streamed) and prompts == same_prompts


def test_the_seed_of_the_data_orders_prompts_and_nothing_else(tmp_path):
    seeded = {
        name: run(tmp_path / name, make_prompts(20), save_strategy="no", **seeds)
        for name, seeds in {"data": {"data_seed": 7}, "both": {"seed": 7}, "neither": {}}.items()
    }
    assert seeded["data"][1] == seeded["both"][1] != seeded["neither"][1]
    assert not same(seeded["data"][0], seeded["both"][0])


def test_a_sequential_order_is_the_datasets_own(tmp_path):
    _, prompts = run(tmp_path, make_prompts(20), train_sampling_strategy="sequential", save_strategy="no")
    assert prompts == run(tmp_path, make_prompts(20), shuffle_dataset=False, save_strategy="no")[1]
    assert prompts != run(tmp_path, make_prompts(20), save_strategy="no")[1]


def test_episodes_say_how_long_to_read(tmp_path):
    trainer = make_trainer(tmp_path, config={"max_steps": -1, "total_episodes": 20}, train_dataset=stream())
    trainer.train()
    assert trainer.state.global_step == trainer.state.max_steps == STEPS  # three rollouts of 8


def test_a_stream_without_an_end_is_read_no_further_than_it_is_used(tmp_path):
    read = []

    def forever():
        while True:
            read.append(len(read))
            yield {"prompt": f"the film was {'very ' * (len(read) % 3)}", "wanted": "e"}

    endless = IterableDataset.from_generator(forever)
    _, prompts = run(tmp_path, endless, max_steps=4, save_strategy="no")
    assert len(prompts) == 1 and len(read) < 40


def test_processes_share_a_rollout():
    dataset = stream(20)
    shares = [PromptStream(dataset, 4, process_index=i, num_processes=2) for i in range(2)]
    alone = PromptStream(dataset, 8)
    for rollout in (0, 1, 2, 1):  # forwards, into the next epoch, and back
        assert shares[0][rollout] + shares[1][rollout] == alone[rollout]
    assert [row["prompt"] for row in alone[1]] == make_prompts(20)["prompt"][8:16]


def test_a_prompt_of_a_stream_that_the_model_cannot_answer_is_named_when_it_is_read(tmp_path):
    rows = [*make_prompts(9).to_list(), {"prompt": "e" * 125, "wanted": "e"}, *make_prompts(9).to_list()]
    with pytest.raises(ValueError, match=r"train_dataset\[9\] has 125 tokens.*max_prompt_length=120"):
        run(tmp_path, IterableDataset.from_generator(lambda: iter(rows)))


def test_a_stream_that_ran_dry_says_so():
    epochs = iter([8, 3])
    dataset = IterableDataset.from_generator(lambda: ({"prompt": "e"} for _ in range(next(epochs))))
    prompts = PromptStream(dataset, 8)
    assert len(prompts[0]) == 8
    with pytest.raises(ValueError, match="fewer than the 8 prompts of one rollout in epoch 1"):
        prompts[1]


def test_the_report_and_the_card_of_a_run_on_a_stream(tmp_path):
    """They show the first prompts of the stream, and do not ask for its length."""
    trainer = make_trainer(tmp_path, config={"max_steps": 4, "html_report": True}, train_dataset=stream())
    trainer.train()
    trainer.create_model_card()
    assert make_prompts(1)["prompt"][0] in (tmp_path / "report.html").read_text()
    assert "| prompts | a stream |" in (tmp_path / "README.md").read_text()


# Other ways in which prompts come


def test_ids_that_were_made_elsewhere_train_as_their_text_does(tmp_path, tokenizer):
    """As TRL 1.12 took them; the reward function reads the prompt that they decode to."""
    prompts = make_prompts()
    ids = Dataset.from_dict({"input_ids": [tokenizer(text)["input_ids"] for text in prompts["prompt"]]})
    from_ids, decoded = run(tmp_path, ids, save_strategy="no")
    from_text, texts = run(tmp_path, prompts, save_strategy="no")
    assert same(from_ids, from_text) and decoded == texts


def test_tools_of_a_conversation_are_in_its_prompt(tmp_path):
    from conftest import make_tokenizer

    template = "{% for tool in tools or [] %}{{ tool.function.name }}:{% endfor %}{{ messages[0].content }}?"
    call = {"type": "function", "function": {"name": "add", "description": "", "parameters": {"type": "object"}}}
    rows = [{"prompt": [{"role": "user", "content": f"what is {i % 3}"}], "tools": [call]} for i in range(16)]
    seen = []

    def keep(prompts, completions, tools, **kwargs):
        seen.extend(tools)
        return count_e(prompts, completions)

    tokenizer = make_tokenizer(template)
    trainer = make_trainer(tmp_path, train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
                           reward_funcs=keep, config={"max_steps": 4})  # fmt: skip
    trainer.train()
    assert tokenizer.decode(trainer.train_dataset[0]["input_ids"]).startswith("add:what is")
    assert seen[0][0]["function"]["name"] == "add"

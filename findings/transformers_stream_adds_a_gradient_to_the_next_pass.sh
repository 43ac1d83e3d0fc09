#!/usr/bin/env bash
# transformers 5.24.0: gradient accumulation at the end of a pass over a stream (`IterableDataset`).
#
# Guess: five batches with two per step are three steps per pass, the last of one batch, as for a data set with a length;
# or the last batch is dropped.
# Seen: for a stream the last batch is run without a step, and its gradient is not reset: it is added, undivided, to the
# first step of the next pass, which then learns from three batches. The loss below has the gradient x, and the steps
# are of size 1, so each step moves the weight by the mean of its batches: 5 + (1 + 2) / 2 = 6.5.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 accelerate==1.15.0 datasets==5.2.0
cd "$work"
env/bin/python - <<'PYTHON'
import torch
from datasets import Dataset
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments


class Line(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return {"loss": (self.weight * x.float()).mean()}


class InOrder(Trainer):
    def _get_train_sampler(self, dataset=None):
        return SequentialSampler(self.train_dataset)


class Moves(TrainerCallback):
    def __init__(self):
        self.weights = [0.0]

    def on_step_end(self, args, state, control, model, **kwargs):
        self.weights.append(model.weight.item())


def moves(dataset):
    args = TrainingArguments(
        "out", per_device_train_batch_size=1, gradient_accumulation_steps=2, max_steps=4, learning_rate=1.0,
        lr_scheduler_type="constant", optim="sgd", max_grad_norm=0, report_to=[], use_cpu=True, save_strategy="no",
        disable_tqdm=True,
    )
    seen = Moves()
    InOrder(Line(), args, train_dataset=dataset, callbacks=[seen]).train()
    return [a - b for a, b in zip(seen.weights, seen.weights[1:])]


rows = Dataset.from_dict({"x": [1, 2, 3, 4, 5]})
with_length, stream = moves(rows), moves(rows.to_iterable_dataset())
print(f"with a length {with_length}, as a stream {stream}")
assert with_length == [1.5, 3.5, 5.0, 1.5] and stream == [1.5, 3.5, 6.5, 3.5]
PYTHON

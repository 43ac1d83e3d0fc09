#!/usr/bin/env bash
# datasets 5.2.0: a stream after `load_state_dict`, iterated more than once.
#
# Guess: the loaded position is used up by the first iteration; the next one begins at the first example, as it does for
# a stream that nothing was loaded into.
# Seen: every further iteration begins at the loaded position again, so all later passes lack the examples before it. Only
# `set_epoch` with another number makes the next pass whole.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet datasets==5.2.0
cd "$work"
env/bin/python - <<'PYTHON'
from datasets import Dataset


def stream():
    return Dataset.from_dict({"x": list(range(8))}).to_iterable_dataset()


first = stream()
for example in first:
    if example["x"] == 4:
        state = first.state_dict()
        break

resumed = stream()
resumed.load_state_dict(state)
passes = [[example["x"] for example in resumed] for _ in range(3)]
print("without set_epoch", passes)
assert passes == [[5, 6, 7]] * 3

resumed = stream()
resumed.load_state_dict(state)
passes = []
for epoch in range(3):
    resumed.set_epoch(epoch)
    passes.append([example["x"] for example in resumed])
print("with set_epoch", passes)
assert passes == [[5, 6, 7], list(range(8)), list(range(8))]
PYTHON

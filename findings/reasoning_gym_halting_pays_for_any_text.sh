#!/usr/bin/env bash
# reasoning-gym 0.1.25: what `game_of_life_halting` pays for an answer other than the right one.
#
# Guess: 0; the answer is "True" or "False", and the question asks for one of the two.
# Seen: 1.0 for every answer that is not empty, the opposite of the right one among them: the scorer compares
# `bool(answer)` with `bool(entry["answer"])`, and both are strings. An empty answer earns 0.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet reasoning-gym==0.1.25
cd "$work"
env/bin/python - <<'PYTHON'
from reasoning_gym import create_dataset

dataset = create_dataset("game_of_life_halting", size=20, seed=3)
opposite = {"True": "False", "False": "True"}


def paid(answer):
    return sum(dataset.score_answer(answer(item), item) for item in dataset) / 20


print("right answers:", sorted({item["answer"] for item in dataset}))
seen = {
    "right": paid(lambda item: item["answer"]), "opposite": paid(lambda item: opposite[item["answer"]]),
    "full stop": paid(lambda item: "."), "empty": paid(lambda item: ""),
}
print(seen)
assert seen == {"right": 1.0, "opposite": 1.0, "full stop": 1.0, "empty": 0.0}
PYTHON

#!/usr/bin/env bash
# reasoning-gym 0.1.25: what a policy earns in `rotate_matrix` by repeating the question.
#
# Guess: 0, or the 0.01 of a wrong answer.
# Seen: the scorer takes the first matrix it finds and pays by the share of equal entries, so the question itself (which
# holds the unrotated matrix) earns a tenth on average and up to a half; a sentence without a matrix earns 0.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet reasoning-gym==0.1.25
cd "$work"
env/bin/python - <<'PYTHON'
from reasoning_gym import create_dataset

dataset = create_dataset("rotate_matrix", size=40, seed=3)
paid = [dataset.score_answer(item["question"], item) for item in dataset]
wrong = [dataset.score_answer("I do not know", item) for item in dataset]
print(f"the question: mean {sum(paid) / 40:.3f}, highest {max(paid):.3f}; a sentence: {sum(wrong) / 40:.3f}")
assert sum(paid) / 40 > 0.1 and max(paid) > 0.3 and sum(wrong) / 40 < 0.02
PYTHON

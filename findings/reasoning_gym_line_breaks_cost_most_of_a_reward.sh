#!/usr/bin/env bash
# reasoning-gym 0.1.25: a right answer with a line break before and after it.
#
# Guess: whitespace around an answer is ignored, by all data sets or by none.
# Seen: it depends on the data set. Those without a scorer of their own pay the share of characters that are the answer:
# 0.33 for a number of one digit, 0.5 for two, so the same slip costs most where answers are short.
# `chain_sum` and many others ignore it, and `binary_matrix` pays nothing. `extract_answer` of the same package, which the
# scorers do not call, removes it.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet reasoning-gym==0.1.25
cd "$work"
env/bin/python - <<'PYTHON'
from reasoning_gym import create_dataset
from reasoning_gym.utils import extract_answer

for name, least, most in (
    ("letter_counting", 0.3, 0.6), ("gcd", 0.3, 0.6), ("chain_sum", 1.0, 1.0), ("binary_matrix", 0.0, 0.0),
):
    dataset = create_dataset(name, size=20, seed=3)
    answers = [f"\n{item['answer']}\n" for item in dataset]
    paid = sum(map(dataset.score_answer, answers, dataset)) / 20
    extracted = (extract_answer(f"<answer>{answer}</answer>") for answer in answers)
    cured = sum(map(dataset.score_answer, extracted, dataset)) / 20
    print(f"{name}: {paid:.3f} as it is, {cured:.3f} extracted")
    assert least <= paid <= most and cured == 1.0
PYTHON

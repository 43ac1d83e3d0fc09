#!/usr/bin/env bash
# math-verify 0.9.0: an expression in place of its value.
#
# Guess: a sum that was not worked out is no answer to "What is $17 + 25$?".
# Seen: the two are compared after simplification, so the problem itself is right: a policy that repeats the question
# earns everything wherever a problem contains its own formula. In plain text the same holds for the formula alone; within
# a sentence the last number is read. Equations to be solved are not taken.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet math-verify==0.9.0
cd "$work"
env/bin/python - <<'PYTHON'
from math_verify import parse, verify


def right(gold, answer):
    gold, answer = (parse(text, parsing_timeout=None) for text in (gold, answer))  # no limits in wall-clock seconds
    return verify(gold, answer, timeout_seconds=None)


seen = {
    answer: right(gold, answer)
    for gold, answer in (
        ("$42$", "Question: what is $17 + 25$ ?"), ("42", "17 + 25"), ("12", "$\\int_0^{2} 6 dx$"),
        ("42", "What is 17 + 25?"), ("3", "$2x+1=7$"),
    )
}
print(seen)
assert list(seen.values()) == [True, True, True, False, False]
PYTHON

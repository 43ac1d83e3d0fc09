#!/usr/bin/env bash
# math-verify 0.9.0: answers that are percentages, lists or intervals.
#
# Guess: 50 is not 50 %; the open interval from 1 to 2 is not the set of 1 and 2; "1,2" is two numbers; (1, 2) is a pair.
# Seen: "50%" is equal to both 50 and 0.5. The interval $(1,2)$ is equal to the set {1, 2}. In plain text "1,2" is read as
# 1.2 (a decimal comma) and "(1,2)" as nothing at all, so a right answer without dollar signs is scored 0.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet math-verify==0.9.0
cd "$work"
env/bin/python - <<'PYTHON'
import math_verify


def parse(text):
    return math_verify.parse(text, parsing_timeout=None)  # its limits are wall-clock seconds, which a busy machine exceeds


def equal(gold, answer):
    return math_verify.verify(parse(gold), parse(answer), timeout_seconds=None)


percent = [equal("50%", answer) for answer in ("50", "0.5", "5")]
interval = equal("$(1,2)$", "$\\{1,2\\}$")
print(percent, interval, parse("1,2"), parse("(1,2)"))
assert percent == [True, True, False] and interval
assert float(parse("1,2")[0]) == 1.2 and parse("(1,2)") == []
PYTHON

#!/usr/bin/env bash
# if-verifiable 0.1.2, a port of IFEval's checkers: the prompt in place of an answer, through its own evaluation.
#
# Guess: no instruction is followed, but for those about what must not be there (commas, forbidden words).
# Seen: an instruction that names its format contains it, and the checkers look for the format alone. A policy that
# repeats the prompt gets 1.0 for a title in double angular brackets, for two responses with ****** between them, for a
# postscript, for keywords, and for "answer with one of these". An ordinary sentence gets 0 for each.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet if-verifiable==0.1.2
cd "$work"
env/bin/python - <<'PYTHON'
import random

from if_verifiable.common import evaluate_instructions
from if_verifiable.ifeval.instructions_registry import INSTRUCTION_DICT

seen = {}
for name in (
    "detectable_format:title", "combination:two_responses", "detectable_content:postscript", "keywords:existence",
    "detectable_format:constrained_response",
):
    random.seed(0)
    checker = INSTRUCTION_DICT[name](name)
    prompt = f"Write about a walk. {checker.build_description()}"
    options = checker.get_instruction_args() or {}
    seen[name] = [
        evaluate_instructions(answer, [name], [options], prompt, INSTRUCTION_DICT)[1].binary_strict
        for answer in (prompt, "A good walk begins early in the morning.")
    ]
    print(name, *seen[name], "|", prompt)
assert all(found == [1.0, 0.0] for found in seen.values())
PYTHON

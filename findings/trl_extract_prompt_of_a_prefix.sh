#!/usr/bin/env bash
# trl 1.16.0: the implicit prompt of a preference pair whose chosen text is the beginning of its rejected one.
#
# Guess: `extract_prompt` splits where the two texts differ, so the chosen completion is empty (or the pair is refused).
# Seen: the last character of the chosen text becomes the chosen completion, and the prompt ends inside a word:
#   prompt "The sky is blu", chosen "e", rejected "e and green".
# Two texts that differ within a word are split within it too: "Ber" | "lin" and "n". Tokens of the parts are then not
# the tokens of the text.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 trl==1.16.0
cd "$work"
env/bin/python - <<'PYTHON'
from trl import extract_prompt

pair = extract_prompt({"chosen": "The sky is blue", "rejected": "The sky is blue and green"})
print(pair)
assert pair == {"prompt": "The sky is blu", "chosen": "e", "rejected": "e and green"}

pair = extract_prompt({"chosen": "Q: capital? Berlin", "rejected": "Q: capital? Bern"})
print(pair)
assert pair == {"prompt": "Q: capital? Ber", "chosen": "lin", "rejected": "n"}
PYTHON

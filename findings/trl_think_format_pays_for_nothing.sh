#!/usr/bin/env bash
# trl 1.16.0: what `think_format_reward` pays.
#
# Guess: 1.0 for reasoning in <think> tags that is followed by an answer.
# Seen: 1.0 for a pair of empty tags with nothing after it, and 0.0 for a good answer that begins with one space or line
# break, which is what many models write first. The cheapest response that earns all of it has two tokens.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 trl==1.16.0
cd "$work"
env/bin/python - <<'PYTHON'
from trl.rewards import think_format_reward


def pays(text):
    return think_format_reward([[{"role": "assistant", "content": text}]])[0]


seen = {text: pays(text) for text in ("<think></think>", "<think>2 + 2</think>", " <think>2 + 2</think>4", "\n<think>2 + 2</think>4")}
print(seen)
assert list(seen.values()) == [1.0, 1.0, 0.0, 0.0]
PYTHON

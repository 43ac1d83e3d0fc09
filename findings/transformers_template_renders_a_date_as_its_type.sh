#!/usr/bin/env bash
# transformers 5.24.0: a date, or another value that JSON lacks, in the arguments of a tool call that a chat template renders.
#
# Guess: an error, as from `json.dumps`, or the date in ISO format.
# Seen: the template gets the name of the type as text. The model reads `{"when": "<datetime>"}` for every date, without a
# word. `datasets` returns dates as `datetime` objects when it stored them as such.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet transformers==5.24.0 datasets==5.2.0 jinja2==3.1.6
cd "$work"
env/bin/python - <<'PYTHON'
from datetime import datetime

from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]")))
tokenizer.chat_template = "{% for m in messages %}{{ m.tool_calls[0].function.arguments | tojson }}{% endfor %}"
call = {"type": "function", "function": {"name": "book", "arguments": {"when": datetime(2026, 1, 2), "seats": 2}}}
row = Dataset.from_list([{"messages": [{"role": "assistant", "tool_calls": [call]}]}])[0]
text = tokenizer.apply_chat_template(row["messages"], tokenize=False)
print(text)
assert text == '{"when": "<datetime>", "seats": 2}'
PYTHON

#!/usr/bin/env bash
# datasets 5.2.0: rows with different keys in `Dataset.from_list`, and messages with different keys inside a row.
#
# Guess: both are treated alike: the union of the keys, with None where a row has none.
# Seen: inside a row keys are united and filled with None; between rows only the keys of the first row exist, and what the
# others have more is gone without a word. A column that reward functions need (`answer`, `tools`) is lost if the first
# row happens to lack it; put first, the same row keeps it.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet datasets==5.2.0
cd "$work"
env/bin/python - <<'PYTHON'
from datasets import Dataset

rows = [{"prompt": "a"}, {"prompt": "b", "answer": "42"}]
print(Dataset.from_list(rows).column_names, Dataset.from_list(rows[::-1]).column_names)
assert Dataset.from_list(rows).column_names == ["prompt"]
assert Dataset.from_list(rows[::-1]).column_names == ["prompt", "answer"]

nested = Dataset.from_list([{"message": {"role": "user"}}, {"message": {"role": "user", "name": "x"}}])
print(nested[0])
assert nested[0] == {"message": {"role": "user", "name": None}}
PYTHON

"""Names of configuration fields for shell completion, from source files that are not imported."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

_FIELD = re.compile(r"^    (\w+): [^=\n]+ = _?field\(", re.MULTILINE)
_TRAINER = ("transformers/training_args.py", "trl/trainer/model_config.py", "ppo_plus/cli/data.py")
# A test compares their fields with those of the configurations.
_SOURCES = {
    "ppo": ("ppo_plus/cli/ppo.py", "ppo_plus/config/*.py", *_TRAINER),
    "reward": (
        "ppo_plus/config/reward_config.py",
        "trl/trainer/reward_config.py",
        "trl/trainer/base_config.py",
        *_TRAINER,
    ),
}


def field_names(command: str) -> list[str]:
    """Return the fields that a training command accepts, in the order of their sources."""
    names: dict[str, None] = {}
    for source in _SOURCES[command]:
        package, _, path = source.partition("/")
        spec = find_spec(package)  # of a package at the top: finds its folder and imports nothing
        if spec is not None and spec.submodule_search_locations:
            for file in sorted(Path(spec.submodule_search_locations[0]).glob(path)):
                names |= dict.fromkeys(_FIELD.findall(file.read_text(encoding="utf-8")))
    return list(names)

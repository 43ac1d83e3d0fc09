"""`ppo-plus memory`, or `python -m ppo_plus.memory`: predict the memory of a run on a card."""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import get_args, get_type_hints

from transformers import AutoConfig

from .planning import as_dict, plan, table
from .prediction import PlannerConfig

_HINTS = get_type_hints(PlannerConfig)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return 0 if the plan fits, else 1."""
    parser = argparse.ArgumentParser(prog="ppo-plus memory", description="Predict the memory of a PPO run.")
    parser.add_argument("--model", required=True, help="a name on the Hub, a folder, or a config.json")
    parser.add_argument("--vram", type=float, required=True, help="memory of the card, GiB")
    parser.add_argument("--value-model", help="the critic's model, with --critic separate; as --model")
    parser.add_argument("--json", action="store_true", help="print JSON (bytes) instead of the table")
    for field in dataclasses.fields(PlannerConfig):
        name, choices = "--" + field.name.replace("_", "-"), get_args(_HINTS[field.name])
        if field.type == "bool":
            parser.add_argument(name, action="store_true", help=field.metadata["help"])
        else:
            shown = f"{field.metadata['help']} (default: %(default)s)"
            kind = str if choices else int
            parser.add_argument(name, type=kind, choices=choices or None, default=field.default, help=shown)
    options = vars(parser.parse_args(arguments))
    names, vram, as_json = (options.pop("model"), options.pop("value_model")), options.pop("vram"), options.pop("json")
    try:
        config, value_config = (name and AutoConfig.from_pretrained(name) for name in names)
        result = plan(config, PlannerConfig(**options), vram, value_config)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(json.dumps(as_dict(result)) if as_json else table(result))
    return 0 if result.fits else 1


if __name__ == "__main__":
    raise SystemExit(main())

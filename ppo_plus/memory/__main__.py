"""`python -m ppo_plus.memory`: what a run will need on a card."""

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
    """The command; returns 0 where the plan fits, else 1."""
    parser = argparse.ArgumentParser(prog="python -m ppo_plus.memory", description="Predict the memory of a PPO run.")
    parser.add_argument("--model", required=True, help="a name on the Hub, a folder, or a config.json")
    parser.add_argument("--vram", type=float, required=True, help="memory of the card, GiB")
    parser.add_argument("--value-model", help="of the critic, with --critic separate; given as --model is")
    parser.add_argument("--json", action="store_true", help="print JSON, bytes, in place of the table")
    for field in dataclasses.fields(PlannerConfig):
        name, choices = "--" + field.name.replace("_", "-"), get_args(_HINTS[field.name])
        if field.type == "bool":
            parser.add_argument(name, action="store_true")
        else:
            kind = str if choices else int
            parser.add_argument(name, type=kind, choices=choices or None, default=field.default, help="%(default)s")
    given = vars(parser.parse_args(arguments))
    names, vram, as_json = (given.pop("model"), given.pop("value_model")), given.pop("vram"), given.pop("json")
    try:
        config, value_config = (name and AutoConfig.from_pretrained(name) for name in names)
        found = plan(config, PlannerConfig(**given), vram, value_config)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(json.dumps(as_dict(found)) if as_json else table(found))
    return 0 if found.fits else 1


if __name__ == "__main__":
    raise SystemExit(main())

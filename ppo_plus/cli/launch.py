"""Run a training command in this process, or in several through `accelerate launch`, as TRL's command does."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

import yaml

from .arguments import FieldParser, errors_in_one_line
from .recipes import PROFILES, profiles


def run(name: str, arguments: list[str], launched: bool = False) -> None:
    """Parse the arguments of a training command and train.

    Args:
        name: module of this room with `ARGUMENTS`, the configuration classes, and `train`.
        arguments: fields of these; others are `accelerate launch`'s, and start it.
        launched: whether `accelerate launch` has started this process.
    """
    module, prog = importlib.import_module(f"{__package__}.{name}"), f"ppo-plus {name}"
    with errors_in_one_line(prog):
        _, launch_arguments = FieldParser(module.ARGUMENTS, prog, build=False).parse(arguments)
        if launch_arguments and not launched and "LOCAL_RANK" not in os.environ:
            return _launch(name, arguments, launch_arguments)
        configs, _ = FieldParser(module.ARGUMENTS, prog).parse(arguments)
    from ..callbacks.progress import disable_bars_in_logs  # late: --help needs no trainer

    disable_bars_in_logs()
    module.train(prog, *configs)


def resolve_profile(launch_arguments: list[str]) -> list[str]:
    """Replace `--accelerate_config NAME` by `--config_file` and the path of that profile, or of a file NAME.

    Raises:
        ValueError: NAME is neither, or shards trained weights.
    """
    if "--accelerate_config" not in launch_arguments:
        return launch_arguments
    index = launch_arguments.index("--accelerate_config")
    name = (launch_arguments[index + 1 : index + 2] or [""])[0]
    path = Path(name) if Path(name).is_file() else PROFILES / f"{name}.yaml"
    if not path.is_file():
        raise ValueError(f"--accelerate_config {name!r} is no file. Pass one, or one of {', '.join(profiles())}.")
    _check_sharding(path)
    return ["--config_file", str(path), *launch_arguments[:index], *launch_arguments[index + 2 :]]


def _check_sharding(path: Path) -> None:
    """Refuse a launch file that shards trained weights, before processes start or its engine is looked for."""
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    kind = str(config.get("distributed_type")) if isinstance(config, dict) else ""
    if kind == "FSDP" and str((config.get("fsdp_config") or {}).get("fsdp_version", 1)) != "2":
        kind = "FSDP1"
    if kind in ("DEEPSPEED", "MEGATRON_LM", "FSDP1"):
        raise ValueError(
            f"--accelerate_config {path} requests {kind}, which shards trained weights too. Use --accelerate_config "
            "fsdp2, which shards the frozen base of an adapter, or multi_gpu (DDP)."
        )


def _launch(name: str, arguments: list[str], launch_arguments: list[str]) -> None:
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    words = [*resolve_profile(launch_arguments), "--module", __name__, name, *arguments]
    args = launch_command_parser().parse_args(words)
    if args.training_script != __name__:
        raise ValueError(f"unexpected argument {args.training_script!r}.")
    try:
        launch_command(args)
    except ChildFailedError as error:  # the process has printed its error
        raise SystemExit(error.get_first_failure()[1].exitcode) from error


if __name__ == "__main__":
    run(sys.argv[1], sys.argv[2:], launched=True)

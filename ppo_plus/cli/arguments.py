"""Command-line arguments from configuration classes: flags over YAML, help by theme, and errors in one line."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import inspect
import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

import yaml
from trl import TrlParser

# A comment between blank line and field starts a section; transformers and TRL write them too.
_OF_OTHERS = re.compile(
    "(Configuration class for|Parameters that control) the "
)  # how transformers and TRL begin titles
_SECTION_OR_FIELD = re.compile(r"\n\n    # (?:--- )?([A-Z][\w ,&]+?)(?: ---)?(?=\n)|^    (\w+):", re.MULTILINE)


def _title(text: str) -> str:
    short = _OF_OTHERS.sub("", text)
    return short if short == text else short.capitalize()


def group_fields(config: type) -> dict[str, list[str]]:
    """Group the fields of a configuration by the sections of its source, those of derived classes first.

    A field that a derived class redefines stays in the section of its base class.

    Args:
        config: a dataclass.

    Returns:
        names of fields by title; fields before the first section are under the class's summary.
    """
    fields = {field.name for field in dataclasses.fields(config) if field.init}
    titles: dict[str, str] = {}
    order: dict[str, None] = {}
    for cls in reversed([cls for cls in config.__mro__ if dataclasses.is_dataclass(cls)]):
        title = _title((inspect.getdoc(cls) or cls.__name__).splitlines()[0].rstrip("."))
        names = []
        for section, name in _SECTION_OR_FIELD.findall(inspect.getsource(cls)):
            title = _title(section) or title
            if name in fields and name not in titles:
                titles[name] = title
                names.append(name)
        order = dict.fromkeys([*names, *order])
    groups: dict[str, list[str]] = {}
    for name in order:
        groups.setdefault(titles[name], []).append(name)
    return groups


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Show one spelling of each option; `--kl-coef` and `--no_train_on_eos` are accepted too."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return f"{action.help} (required)" if action.required else super()._get_help_string(action)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        values = self._format_args(action, self._get_default_metavar_for_optional(action)) if action.nargs != 0 else ""
        return f"{action.option_strings[0]} {values}".strip()


def _launch_options() -> set[str]:
    from accelerate.commands.launch import launch_command_parser

    return {"--accelerate_config", *launch_command_parser()._option_string_actions}


class FieldParser(TrlParser):
    """TRL's parser with help grouped by theme and errors in one line.

    Args:
        types: configuration classes.
        prog: the command, as in `ppo-plus ppo`.
        build: create the configurations. A process that only launches others does not, because a `TrainingArguments`
            sets up the device and the process group of its process.
    """

    def __init__(self, types: Iterable[type], prog: str, build: bool = True) -> None:
        self._types, self._build = tuple(types), build
        super().__init__(self._types, prog=prog, allow_abbrev=False, formatter_class=_HelpFormatter)

    def format_help(self) -> str:
        """Return the help of all fields, a section for each theme."""
        actions = {action.dest: action for action in reversed(self._actions)}
        formatter = self._get_formatter()
        formatter.add_text(
            f"{self.prog} [--config FILE] [--FIELD VALUE ...]: fields on the command line override FILE."
        )
        for config in self._types:
            for title, names in group_fields(config).items():
                formatter.start_section(title)
                formatter.add_arguments([actions[name] for name in names])
                formatter.end_section()
        return formatter.format_help()

    def error(self, message: str) -> NoReturn:
        """Exit with status 2 and one line, without the usage of some hundred options."""
        print(f"{self.prog}: error: {message}", file=sys.stderr)
        raise SystemExit(2)

    def parse(self, arguments: list[str]) -> tuple[list[Any], list[str]]:
        """Parse arguments of the command line and of the YAML file that `--config` names.

        Returns:
            the configurations in the order of their classes, and the arguments that are `accelerate launch`'s.

        Raises:
            ValueError: an argument is a field of no configuration; or a configuration refuses its values.
            OSError: the YAML file cannot be read.
        """
        # TRL's parser accepts `--config FILE` alone.
        pairs = (word.split("=", 1) if word.startswith("--config=") else [word] for word in arguments)
        arguments = [part for pair in pairs for part in pair]
        if arguments and arguments[-1] == "--config":
            raise ValueError("--config needs a file.")
        self._check_names(arguments)
        *configs, rest = self.parse_args_and_config(arguments, return_remaining_strings=True)
        return list(configs), rest

    def parse_args_into_dataclasses(self, args: Any = None, **kwargs: Any) -> tuple[Any, ...]:
        """Create the configurations, or only find the arguments that are fields of none of them."""
        if self._build:
            return super().parse_args_into_dataclasses(args=args, **kwargs)
        return (self.parse_known_args(args)[1],)

    def set_defaults_with_config(self, **kwargs: Any) -> list[str]:
        """Set the defaults from a YAML file; checks its names before a required field is missed."""
        rest = super().set_defaults_with_config(**kwargs)
        self._check_names(rest)
        return rest

    def _check_names(self, words: list[str]) -> None:
        names = {word.partition("=")[0] for word in words if re.match("--?[a-z]", word)}
        unknown = names - {"--config", *self._option_string_actions}
        unknown -= _launch_options() if unknown else set()
        for name in sorted(unknown):
            close = difflib.get_close_matches(name, self._option_string_actions, 1)
            raise ValueError(f"unknown argument {name}{f'; did you mean {close[0]}?' if close else '.'}")


@contextmanager
def errors_in_one_line(prog: str, output_dir: str | None = None) -> Iterator[None]:
    """Turn an error of the user into one line and exit status 2.

    Folders that were created and are still empty are removed. `PYTHONDEVMODE=1` shows the traceback.

    Args:
        prog: the command, as in `ppo-plus ppo`.
        output_dir: folder that Trainer creates.
    """
    folder = Path(output_dir).absolute() if output_dir is not None else None
    created = [path for path in (folder, *folder.parents) if not path.exists()] if folder is not None else []
    try:
        yield
    except (ValueError, OSError, ImportError, yaml.YAMLError) as error:
        for path in created:
            with suppress(OSError):  # it contains files
                os.rmdir(path)
        if sys.flags.dev_mode:
            raise
        print(f"{prog}: error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from error

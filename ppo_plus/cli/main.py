"""The command line `ppo-plus`.

Each command imports what it needs when it runs, so that `--help` and shell completion load neither torch nor
transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import click
from click.shell_completion import CompletionItem

from .. import __version__
from . import recipes
from .completion import field_names

UNPARSED = {"ignore_unknown_options": True, "help_option_names": []}  # the command's own parser reads them, --help too


def _matching(names: Callable[[], list[str]]) -> Callable[..., list[str]]:
    return lambda context, parameter, incomplete: [name for name in names() if name.startswith(incomplete)]


def _fail(command: str, message: str) -> NoReturn:
    click.echo(f"ppo-plus {command}: error: {message}", err=True)
    raise SystemExit(2)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, package_name="ppo-plus")
def main() -> None:
    """PPO for language models: reward model, then PPO, on one backbone.

    Every command has its own --help.
    """


class _TrainingCommand(click.Command):
    """A command whose options are fields of configurations; completes them without importing these."""

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        names = [f"--{name}" for name in field_names(str(self.name))]
        fields = [CompletionItem(name) for name in names if name.startswith(incomplete)]
        return [*super().shell_complete(ctx, incomplete), *fields]


def _training_command(name: str, text: str) -> None:
    @main.command(name, cls=_TrainingCommand, help=text, context_settings=UNPARSED)
    @click.option("--config", type=click.Path())
    @click.option("--accelerate_config", shell_complete=_matching(recipes.profiles))
    @click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
    def command(arguments: tuple[str, ...], **options: str | None) -> None:
        from .launch import run

        words = [word for option, value in options.items() if value is not None for word in (f"--{option}", value)]
        run(name, [*words, *arguments])


_training_command("ppo", "Train a language model with PPO: --config FILE, and flags that override it.")
_training_command("reward", "Train a reward model: --config FILE, and flags that override it.")


@main.command(context_settings=UNPARSED)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def demo(arguments: tuple[str, ...]) -> None:
    """Train a reward model, then PPO, on a small model, in three minutes on two CPU cores; --full for longer."""
    if missing := recipes.missing_requirements("demo"):
        _fail("demo", f"{', '.join(missing)} not found. Run: pip install 'ppo-plus[demo]'")
    recipes.run_demo(list(arguments))


@main.command(context_settings=UNPARSED)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def memory(arguments: tuple[str, ...]) -> None:
    """Predict the memory of a PPO run on a card: --model NAME --vram GIB."""
    from ..memory.__main__ import main as plan

    raise SystemExit(plan(list(arguments)))


@main.command(context_settings=UNPARSED)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def report(arguments: tuple[str, ...]) -> None:
    """Compare the reports of runs in one page: DIR..."""
    from ..report.__main__ import main as compare

    compare(list(arguments))


@main.command()
@click.argument("adapter")
@click.argument("directory", type=click.Path())
@click.option("--base", help="Name of the base; by default the adapter's own. Needed if that one is quantized.")
@click.option("--dtype", type=click.Choice(["bfloat16", "float16", "float32"]), default="bfloat16", show_default=True)
@click.option("--trust_remote_code", is_flag=True, help="Run the code of a base that is not in transformers.")
def merge(adapter: str, directory: str, **options: Any) -> None:
    """Merge ADAPTER into its base: a folder of plain weights, for other libraries."""
    from ..callbacks.progress import disable_bars_in_logs
    from ..models.merging import describe_left_out, merge_adapter
    from .arguments import errors_in_one_line

    disable_bars_in_logs()
    with errors_in_one_line("ppo-plus merge", directory):
        merged = merge_adapter(adapter, directory, **options)
    click.echo(f"{merged.architecture}: {merged.directory}")
    click.echo(f"Distance of its outputs from base and adapter: {merged.error:.1%} of what the adapter changes.")
    if merged.left_out:
        click.echo(f"Not merged, and still in {adapter}: {describe_left_out(merged.left_out)}.")


@main.command()
def env() -> None:
    """Print versions and devices, to paste into a bug report."""
    from .env import describe

    click.echo(describe())


@main.command()
@click.argument("name", required=False, shell_complete=_matching(recipes.names))
@click.option("--output", type=click.Path(), help="Folder of the copies; NAME by default.")
def init(name: str | None, output: str | None) -> None:
    """Copy the YAML files of the recipe NAME to start from; without NAME, list the recipes."""
    if name is None:
        click.echo("\n".join(f"{recipe:<16} {recipes.title(recipe)}" for recipe in recipes.names()))
        return
    try:
        files = recipes.copy_files(name, output or name)
    except (ValueError, OSError) as error:
        _fail("init", str(error))
    click.echo("\n".join(map(str, files)))


if __name__ == "__main__":
    main(prog_name="ppo-plus")

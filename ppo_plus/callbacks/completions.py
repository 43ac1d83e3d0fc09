"""Tables of sampled completions, in the terminal and in trackers."""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerState

from .base import PPOCallback, is_logging_rollout
from .trackers import log_table

if TYPE_CHECKING:
    from ..rollout.buffer import Rollout
    from ..rollout.collector import Experience


class CompletionsTableCallback(PPOCallback):
    """Shows a table of sampled responses with their scores as training goes, and at each evaluation.

    Args:
        trackers: gives Trainer's callbacks, among them those of `report_to`: wandb and trackio get the table as
            `completions` and `eval/completions`, TensorBoard as text. By default it is printed only.
    """

    def __init__(self, trackers: Callable[[], Iterable[TrainerCallback]] = tuple) -> None:
        self.trackers = trackers

    def on_rollout_end(
        self, args: Any, state: TrainerState, control: Any, rollout: Rollout, samples: Experience, metrics: Any,
        **kwargs: Any,
    ) -> None:  # fmt: skip
        """Show at `num_sample_generations` rollouts spread over training, or at all with `log_completions`."""
        due = args.log_completions or is_logging_rollout(args, state, args.num_sample_generations)
        if state.is_world_process_zero and due:
            self._show("completions", f"Samples at step {state.global_step}", args, state, samples)

    def on_evaluate(
        self, args: Any, state: TrainerState, control: Any, samples: Experience | None = None, **kwargs: Any
    ) -> None:
        """Show the first answers of an evaluation: the same prompts each time."""
        if state.is_world_process_zero and samples is not None:
            self._show("eval/completions", f"Evaluation at step {state.global_step}", args, state, samples)

    def _show(self, name: str, title: str, args: Any, state: TrainerState, samples: Experience) -> None:
        columns = sample_table(samples, args.num_completions_to_print)
        print_samples(title, columns)
        log_table(self.trackers(), name, columns, state.global_step)


def sample_table(samples: Experience, rows: int) -> dict[str, list[Any]]:
    """The first rows of samples in columns: prompt, completion, reward, KL in nats, and what was logged, as text."""
    shown, completions = range(min(rows, len(samples))), samples.completions
    kl = ((samples.logprobs - samples.ref_logprobs) * samples.action_mask).sum(1)
    return {
        "prompt": [messages_to_text(completions.prompts[i]) for i in shown],
        "completion": [messages_to_text(completions.completions[i]) for i in shown],
        "reward": [float(samples.scores[i]) for i in shown],
        "kl": [float(kl[i]) for i in shown],
        **{name: [str(values[i]) for i in shown] for name, values in samples.extra.items()},
    }


def messages_to_text(prompt: Any) -> str:
    """A prompt or completion for people: messages become lines."""
    return prompt if isinstance(prompt, str) else "\n".join(f"{m['role']}: {m['content']}" for m in prompt)


def escape_terminal(text: str) -> str:
    """Text that a terminal shows and does not obey.

    Control characters, what turns the direction of writing, and what the encoding of stdout lacks become escapes.
    """
    # A log or pipe on Windows is in a code page, and a character that it lacks would end training.
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    text = text.encode(encoding, "backslashreplace").decode(encoding)
    bidi_controls = "\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
    return "".join(
        c.encode("unicode_escape").decode()
        if (unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t") or c in bidi_controls
        else c
        for c in text
    )


def print_samples(title: str, columns: dict[str, list[Any]]) -> None:
    """Print a table, fractions with two digits: with rich where it is installed, as plain lines otherwise."""
    title = escape_terminal(title)
    columns = {
        escape_terminal(name): [f"{v:.2f}" if isinstance(v, float) else escape_terminal(str(v)) for v in values]
        for name, values in columns.items()
    }
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        print(title)
        for row in zip(*columns.values(), strict=True):
            print(" | ".join(f"{name}: {value}" for name, value in zip(columns, row, strict=True)))
        return
    table = Table(title=Text(title), show_lines=True)  # Text: what people and models write is not markup
    for name in columns:
        table.add_column(Text(name), overflow="fold")
    for row in zip(*columns.values(), strict=True):
        table.add_row(*(Text(value) for value in row))
    Console().print(table)

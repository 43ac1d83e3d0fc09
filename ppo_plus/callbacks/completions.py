"""Tables of sampled completions in the terminal and in experiment trackers."""

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
    from ..rollout.experience import Experience


class CompletionsTableCallback(PPOCallback):
    """Print and log a table of sampled responses with their scores, during training and at each evaluation.

    Args:
        trackers: returns Trainer's callbacks, including those of `report_to`: wandb and trackio receive the table as
            `completions` and `eval/completions`, TensorBoard as text. By default the table is only printed.
    """

    def __init__(self, trackers: Callable[[], Iterable[TrainerCallback]] = tuple) -> None:
        self.trackers = trackers

    def on_rollout_end(
        self, args: Any, state: TrainerState, control: Any, rollout: Rollout, samples: Experience, metrics: Any,
        **kwargs: Any,
    ) -> None:  # fmt: skip
        """Print a table at `num_sample_generations` rollouts spread over training, or at all with `log_completions`."""
        due = args.log_completions or is_logging_rollout(args, state, args.num_sample_generations)
        if state.is_world_process_zero and due:
            self._show("completions", f"Samples at step {state.global_step}", args, state, samples)

    def on_evaluate(
        self, args: Any, state: TrainerState, control: Any, samples: Experience | None = None, **kwargs: Any
    ) -> None:
        """Print the first completions of an evaluation, for the same prompts each time."""
        if state.is_world_process_zero and samples is not None:
            self._show("eval/completions", f"Evaluation at step {state.global_step}", args, state, samples)

    def _show(self, name: str, title: str, args: Any, state: TrainerState, samples: Experience) -> None:
        columns = sample_table(samples, args.num_completions_to_print)
        print_samples(title, columns)
        log_table(self.trackers(), name, columns, state.global_step)


def sample_table(samples: Experience, rows: int) -> dict[str, list[Any]]:
    """Return the first rows as columns: prompt, completion, reward, KL (nats) and logged extra columns, as text."""
    indices, completions = range(min(rows, len(samples))), samples.completions
    kl = ((samples.logprobs - samples.ref_logprobs) * samples.action_mask).sum(1)
    return {
        "prompt": [messages_to_text(completions.prompts[i]) for i in indices],
        "completion": [messages_to_text(completions.completions[i]) for i in indices],
        "reward": [float(samples.scores[i]) for i in indices],
        "kl": [float(kl[i]) for i in indices],
        **{name: [str(values[i]) for i in indices] for name, values in samples.extra.items()},
    }


def messages_to_text(prompt: Any) -> str:
    """Format a prompt or completion as text; each message and each tool call of a conversation becomes a line."""
    return "\n".join(text for _, text in message_lines(prompt))


def message_lines(prompt: Any) -> list[tuple[str, str]]:
    """Return the lines of a prompt or completion with their kinds: a role, "call", or "" for text."""
    if isinstance(prompt, str):
        return [("", prompt)]
    lines = []
    for message in prompt:
        lines.append((message["role"], f"{message['role']}: {message['content']}"))
        calls = (call.get("function", call) for call in message.get("tool_calls") or ())
        lines += [("call", f"{message['role']} calls {call.get('name')}: {call.get('arguments')}") for call in calls]
    return lines


def escape_terminal(text: str) -> str:
    """Escape terminal control sequences in a text.

    Control characters, bidirectional controls, and characters that the encoding of stdout lacks become escapes.
    """
    # On Windows, logs and pipes use a code page; printing a character that it lacks raises an error.
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
    """Print a table with two decimals per float, with rich if installed and as plain lines otherwise."""
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
    table = Table(title=Text(title), show_lines=True)  # Text: prompts and completions are not rich markup
    for name in columns:
        table.add_column(Text(name), overflow="fold")
    for row in zip(*columns.values(), strict=True):
        table.add_row(*(Text(value) for value in row))
    Console().print(table)

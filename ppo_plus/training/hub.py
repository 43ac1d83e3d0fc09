"""Uploads to the Hub: as Trainer's, but with all files of the model and without secrets."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy
from transformers.utils import PushInProgress, hf_api

from .model_card import ModelCard

ARGUMENTS_FILE = "training_args.json"
REPORT_FILES = ("report.html", "report_comparison.html")  # of `report/`: they contain prompts and completions


class HubMixin(Trainer):
    """Overrides Trainer's push hooks and its model card; a mixin, because `PPOTrainer` and `RewardTrainer` share it.

    Attributes:
        card_class: writes the model card.
    """

    card_class: type[ModelCard]
    _card_arguments: dict[str, Any] | None = None

    def create_model_card(
        self, language: str | None = None, license: str | None = None, tags: str | list[str] | None = None,
        model_name: str | None = None, finetuned_from: str | None = None, tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None, dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None, dataset_name: str | list[str] | None = None,
    ) -> None:  # fmt: skip
        """Write `README.md` and the curves into `output_dir`; later saves use the same arguments.

        Arguments are Trainer's and TRL's. `tasks` and `dataset_args` are not used; `dataset_name`, `dataset_tags` and
        `dataset` are synonyms.
        """
        arguments = {
            "language": language, "license": license, "tags": tags, "model_name": model_name,
            "finetuned_from": finetuned_from, "dataset_tags": dataset_tags, "dataset": dataset,
            "dataset_name": dataset_name,
        }  # fmt: skip
        self._card_arguments = {**(self._card_arguments or {}), **{k: v for k, v in arguments.items() if v is not None}}
        self.write_model_card(str(self.args.output_dir))

    def write_model_card(self, directory: str | Path) -> None:
        """Write the model card into the folder of a saved model."""
        if not self.is_world_process_zero():
            return
        try:
            self.card_class(self, Path(directory), self._card_arguments or {}).write()
        except OSError as error:  # the weights are written
            warnings.warn(f"The model card in {directory} could not be written: {error}", stacklevel=2)

    def push_to_hub(
        self, commit_message: str | None = "End of training", blocking: bool = True, token: str | None = None,
        revision: str | None = None, private: bool | None = None, **kwargs: Any,
    ) -> Any:  # fmt: skip
        """Upload the model, its tokenizer and its card; the report only with `push_report`.

        Arguments are those of `Trainer.push_to_hub`, which uploads every file of `output_dir` and accepts no pattern of
        files to leave out.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        token = token if token is not None else self.args.hub_token
        if self.hub_model_id is None:  # push_to_hub=False in the arguments
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        name = self.args.hub_model_id or Path(self.args.output_dir).name
        kwargs.setdefault("model_name", name.split("/")[-1])
        tags = kwargs.get("tags") or []
        model_tags = getattr(self.model, "model_tags", None) or []
        kwargs["tags"] = list(dict.fromkeys([*([tags] if isinstance(tags, str) else tags), *model_tags]))
        self.create_model_card(**kwargs)
        self._finish_current_push()
        options = {"token": token, "run_as_future": not blocking, **self._ignored_files()}
        if revision is not None:
            options["revision"] = revision
        return self._upload(self.args.output_dir, commit_message, **options)

    def _ignored_files(self) -> dict[str, list[str]]:
        """Return the option of an upload that leaves out Trainer's patterns and the report's files."""
        report = () if getattr(self.args, "push_report", False) else REPORT_FILES
        return {"ignore_patterns": ["_*", f"{PREFIX_CHECKPOINT_DIR}-*", *report]}

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # Trainer would copy a fixed list of files (no value head), and pickle the arguments with the token.
        args = self.args
        self.accelerator.wait_for_everyone()  # every rank has written its part of the checkpoint
        if not self.accelerator.is_main_process or args.hub_strategy == HubStrategy.END:
            return
        if args.save_total_limit is not None:
            self._finish_current_push()  # its folder may be deleted next
        busy = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if busy and not args.hub_always_push:
            return
        self.callback_handler.on_push_begin(args, self.state, self.control)
        self._save(args.output_dir)
        self.create_model_card(model_name=str(self.hub_model_id).split("/")[-1])
        message = f"Training in progress, step {self.state.global_step}"
        jobs = [self._upload(args.output_dir, message, **self._ignored_files())]
        if args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            last = args.hub_strategy == HubStrategy.CHECKPOINT
            name = "last-checkpoint" if last else Path(checkpoint_folder).name
            jobs.append(self._upload(checkpoint_folder, f"{message}, checkpoint", path_in_repo=name))
        if busy and self.push_in_progress is not None:
            self.push_in_progress.jobs.extend(jobs)
        else:
            self.push_in_progress = PushInProgress(jobs)

    def _upload(self, folder: str, message: str | None, **options: Any) -> Any:
        options = {"token": self.args.hub_token, "revision": self.args.hub_revision, "run_as_future": True, **options}
        return hf_api().upload_folder(repo_id=self.hub_model_id, folder_path=folder, commit_message=message, **options)


def save_training_args_json(args: TrainingArguments, directory: str | Path) -> None:
    """Write the arguments as JSON without tokens."""
    values = args.to_sanitized_dict() | {k: v for k, v in args.to_dict().items() if isinstance(v, dict)}
    text = json.dumps(redact_tokens(values), indent=2, default=str)
    (Path(directory) / ARGUMENTS_FILE).write_text(text, encoding="utf-8")


def redact_tokens(values: Any) -> Any:
    """Return a copy without the values of keys that end in `token`; `stop_token` stays, because it is a word."""
    if not isinstance(values, dict):
        return values
    secret = {key for key in values if isinstance(key, str) and key.lower().endswith("token") and key != "stop_token"}
    return {key: f"<{key.upper()}>" if key in secret else redact_tokens(value) for key, value in values.items()}

"""Datasets and functions by name, and a trainer made from arguments, for both training commands."""

from __future__ import annotations

import errno
import importlib
import re
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl import ModelConfig

from ..config.checks import _field, at_least, check_fields
from .arguments import errors_in_one_line

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import Trainer

FORMAT_BY_SUFFIX = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
FUNCTION_PATTERN = re.compile(r"([A-Za-z_][\w.]*):([A-Za-z_]\w*)")


@dataclass
class DataArguments:
    """Data and evaluation."""

    dataset_name: str = field(metadata={"help": "A dataset on the Hub, or a json, jsonl, csv or parquet file."})
    dataset_config: str | None = _field(None, "Configuration of the dataset.")
    dataset_train_split: str = _field("train", "Split to train on.")
    dataset_test_split: str | None = _field(None, "Split to evaluate on.")
    eval_rows: int = _field(0, "Rows to evaluate on, from the test split or else the last training rows.", at_least(0))

    def __post_init__(self) -> None:
        check_fields(self, type(self))
        if not self._is_file:
            return
        if not Path(self.dataset_name).is_file():
            raise ValueError(
                f"The file {self.dataset_name} does not exist. Pass an existing file, or a dataset on the Hub."
            )
        if self.dataset_test_split is not None:
            raise ValueError(
                f"{self.dataset_name} is a file and has no split {self.dataset_test_split!r}: use --eval_rows to hold "
                "out rows."
            )

    def trainer_arguments(self) -> dict[str, Any]:
        """Return further arguments of the trainer."""
        return {}

    @property
    def _is_file(self) -> bool:
        return Path(self.dataset_name).suffix in FORMAT_BY_SUFFIX

    def load(self) -> tuple[Dataset, Dataset | None]:
        """Load training and evaluation rows; the latter from the test split, or the last training rows.

        Raises:
            ValueError: `eval_rows` leaves no row to train on, or a file is damaged.
        """
        rows = self._load_split(self.dataset_train_split)
        if self.dataset_test_split is not None:
            held_out = self._load_split(self.dataset_test_split)
            return rows, held_out.select(range(min(self.eval_rows or len(held_out), len(held_out))))
        if not self.eval_rows:
            return rows, None
        if self.eval_rows >= len(rows):
            raise ValueError(
                f"--eval_rows {self.eval_rows} leaves no training rows: {self.dataset_name} has {len(rows)} rows. "
                "Lower --eval_rows."
            )
        first = len(rows) - self.eval_rows
        return rows.select(range(first)), rows.select(range(first, len(rows)))

    def _load_split(self, split: str) -> Dataset:
        from datasets import load_dataset
        from datasets.exceptions import DatasetsError

        if not self._is_file:
            return load_dataset(self.dataset_name, self.dataset_config, split=split)
        kind = FORMAT_BY_SUFFIX[Path(self.dataset_name).suffix]
        try:
            return load_dataset(kind, data_files=self.dataset_name, split="train")
        except (DatasetsError, ValueError) as error:  # datasets 4 raises what the parser does
            raise ValueError(f"The file {self.dataset_name} is no valid {kind}: {error.__cause__ or error}.") from error


def load_reward(name: str) -> Any:
    """Import a function named `module:function`, also from the working directory; return other names unchanged.

    Raises:
        ValueError: there is no such module or function.
    """
    match = FUNCTION_PATTERN.fullmatch(name)
    if match is None:
        return name
    module, function = match.groups()
    sys.path.insert(0, str(Path.cwd()))
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"The reward {name!r} cannot be imported: {error}. Pass it as module:function.") from error
    finally:
        sys.path.remove(str(Path.cwd()))


def init_kwargs(model: ModelConfig, model_init_kwargs: Any) -> dict[str, Any]:
    """Merge the flags of `ModelConfig` and `model_init_kwargs` to arguments of `from_pretrained`.

    Raises:
        ValueError: no model is named.
    """
    if model.model_name_or_path is None:
        raise ValueError("--model_name_or_path is required: a model on the Hub, or a folder.")
    flags = {"revision": model.model_revision, "dtype": model.dtype, "attn_implementation": model.attn_implementation}
    return {name: value for name, value in flags.items() if value is not None} | (model_init_kwargs or {})


def check_free_space(trainer: Trainer) -> None:
    """Refuse to train if the disk of `output_dir` has no space for what is trained.

    A checkpoint also has the two moments of Adam for each trained weight; the saved model has the weights alone.

    Raises:
        OSError: fewer bytes are free than one checkpoint, or the saved model, takes.
    """
    trained = sum(p.numel() * p.element_size() for p in trainer.model.parameters() if p.requires_grad)
    needed = trained * (1 if trainer.args.save_strategy == "no" else 3)
    folder = Path(trainer.args.output_dir).absolute()
    free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free
    if free < needed:
        raise OSError(
            errno.ENOSPC,
            f"{needed / 2**20:,.0f} MiB are needed and {free / 2**20:,.0f} MiB are free. Choose another --output_dir",
            trainer.args.output_dir,
        )


def create_and_train(kind: type, prog: str, data: DataArguments, model: ModelConfig, args: Any) -> Any:
    """Create a trainer of this kind and train; an error before training is one line.

    Returns:
        the trainer; its `eval_dataset` is None without held-out rows.
    """
    from trl import get_peft_config, get_quantization_config  # late: they import what training needs

    with errors_in_one_line(prog, args.output_dir):
        train_rows, held_out = data.load()
        args.model_init_kwargs = init_kwargs(model, args.model_init_kwargs)
        trainer = kind(
            model.model_name_or_path, args=args, train_dataset=train_rows, eval_dataset=held_out,
            quantization_config=get_quantization_config(model), peft_config=get_peft_config(model),
            **data.trainer_arguments(),
        )  # fmt: skip
        check_free_space(trainer)
    resume = args.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=True if resume == "True" else resume)
    return trainer


def finish(trainer: Trainer, dataset_name: str) -> None:
    """Name the data in the model card, push the model if requested, and end all processes together."""
    if trainer.args.push_to_hub:
        trainer.push_to_hub(dataset_name=dataset_name)
    else:
        trainer.create_model_card(dataset_name=dataset_name)
    trainer.accelerator.wait_for_everyone()  # a rank that exits early may terminate ranks that are still writing
    trainer.accelerator.end_training()

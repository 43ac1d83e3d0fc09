"""A deep model from two or three layers of each kind: what one more of them adds is measured, and multiplied."""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from transformers import PretrainedConfig, PreTrainedModel

from .dry_run import DryRun, causal, classifier
from .prediction import MemoryEstimator, Parts, PlannerConfig


def predict(
    config: PretrainedConfig, setup: PlannerConfig, value_config: PretrainedConfig | None = None
) -> MemoryEstimator:
    """From a few layers of each kind where that is sure to be the same model, else from all of them."""
    short, longer = reduced_depth_configs(config, causal)
    critic, longer_critic = reduced_depth_configs(value_config, classifier) if value_config is not None else (None, [])
    more = [(DryRun(other, setup, critic), count) for other, count in longer]
    more += [(DryRun(short, setup, other), count) for other, count in longer_critic]
    first = DryRun(short, setup, critic)
    return ExtrapolatedEstimator(first, more) if more else first


class ExtrapolatedEstimator(MemoryEstimator):
    """The same predictions, of a model of which only a few layers are run.

    Args:
        first: few layers of each kind.
        more: for each kind, a run of one layer more, and how many such layers the whole model has beyond `first`.
    """

    def __init__(self, first: DryRun, more: list[tuple[DryRun, int]]) -> None:
        self.first, self.more = first, more
        self.parameters = self._whole(first.parameters, [run.parameters for run, _ in more])

    def segment_peaks(self, work: str, rows: int) -> list[Parts]:
        """See `MemoryEstimator`."""
        first, *more = (run.segment_peaks(work, rows) for run in (self.first, *(run for run, _ in self.more)))
        return [self._whole(parts, others) for parts, *others in zip(first, *more, strict=True)]

    def _whole(self, first: Parts, more: list[Parts]) -> Parts:
        missing = [count for _, count in self.more]
        return {
            part: size + sum((m[part] - size) * count for m, count in zip(more, missing, strict=True))
            for part, size in first.items()
        }


def reduced_depth_configs(
    config: PretrainedConfig, build: Callable[[PretrainedConfig], PreTrainedModel]
) -> tuple[PretrainedConfig, list[tuple[PretrainedConfig, int]]]:
    """The config with the last two layers of each kind; for each kind with one more, and how many are left out.

    What tells layers apart is what the config lists for each (`layer_types` and the like). That nothing else does is
    seen from the parameters: the kinds' must add up to those of the whole model. The config as it is, and none left
    out, where they do not, where layers borrow keys and values of others, or where there are few layers anyway.
    """
    if getattr(config.get_text_config(), "num_hidden_layers", None) is None:
        return config, []
    kinds = _layer_kinds(config)
    where = {kind: [i for i, other in enumerate(kinds) if other == kind] for kind in set(kinds)}
    last = sorted(i for layers in where.values() for i in layers[-2:])
    left_out = {kind: layers[:-2] for kind, layers in where.items() if layers[2:]}
    shares_kv = getattr(config.get_text_config(), "num_kv_shared_layers", 0)
    if shares_kv or len(last) + (len(last) + 1) * len(left_out) >= len(kinds):
        return config, []
    short = _with_layers(config, last)
    more = [(_with_layers(config, sorted([layers[-1], *last])), len(layers)) for layers in left_out.values()]
    found = _parameter_shapes(short, build)
    total = Counter(found)
    for longer, count in more:
        for shape, number in (_parameter_shapes(longer, build) - found).items():
            total[shape] += number * count
    return (short, more) if total == _parameter_shapes(config, build) else (config, [])


def _by_layer(text_config: PretrainedConfig) -> dict[str, Sequence]:
    """What a config lists by layer."""
    count = text_config.num_hidden_layers
    return {
        name: value
        for name, value in vars(text_config).items()
        if isinstance(value, list | tuple) and len(value) == count and not name.endswith("token_id")
    }


def _layer_kinds(config: PretrainedConfig) -> list[str]:
    text_config = config.get_text_config()
    lists = _by_layer(text_config).values()
    return [repr([values[i] for values in lists]) for i in range(text_config.num_hidden_layers)]


def _with_layers(config: PretrainedConfig, layers: list[int]) -> PretrainedConfig:
    config = copy.deepcopy(config)
    text_config = config.get_text_config()
    for name, values in _by_layer(text_config).items():
        setattr(text_config, name, [values[i] for i in layers])
    text_config.num_hidden_layers = len(layers)
    return config


def _parameter_shapes(config: PretrainedConfig, build: Callable[[PretrainedConfig], PreTrainedModel]) -> Counter:
    with torch.device("meta"):
        model = build(config)
    return Counter((re.sub(r"\.\d+\.", ".*.", name), p.shape) for name, p in model.named_parameters())

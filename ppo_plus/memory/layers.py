"""Extrapolate the memory of a deep model from two or three layers of each kind."""

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
    """Build an estimator from a few layers of each kind, or from all layers if these may differ otherwise."""
    short, longer = reduced_depth_configs(config, causal)
    critic, longer_critic = reduced_depth_configs(value_config, classifier) if value_config is not None else (None, [])
    extra = [(DryRun(other, setup, critic), count) for other, count in longer]
    extra += [(DryRun(short, setup, other), count) for other, count in longer_critic]
    base = DryRun(short, setup, critic)
    return ExtrapolatedEstimator(base, extra) if extra else base


class ExtrapolatedEstimator(MemoryEstimator):
    """Memory of a model, extrapolated from runs of a few layers.

    Args:
        base: a run with few layers of each kind.
        extra: for each kind, a run with one more layer, and the number of such layers that `base` lacks.
    """

    def __init__(self, base: DryRun, extra: list[tuple[DryRun, int]]) -> None:
        self.base, self.extra = base, extra
        self.parameters = self._extrapolate(base.parameters, [run.parameters for run, _ in extra])

    def segment_peaks(self, phase: str, rows: int) -> list[Parts]:
        """See `MemoryEstimator`."""
        base, *extra = (run.segment_peaks(phase, rows) for run in (self.base, *(run for run, _ in self.extra)))
        return [self._extrapolate(parts, others) for parts, *others in zip(base, *extra, strict=True)]

    def _extrapolate(self, base: Parts, extra: list[Parts]) -> Parts:
        counts = [count for _, count in self.extra]
        return {
            part: size + sum((other[part] - size) * count for other, count in zip(extra, counts, strict=True))
            for part, size in base.items()
        }


def reduced_depth_configs(
    config: PretrainedConfig, build: Callable[[PretrainedConfig], PreTrainedModel]
) -> tuple[PretrainedConfig, list[tuple[PretrainedConfig, int]]]:
    """Build a config with two layers of each kind, and for each kind one with another layer, with its count.

    Kinds of layers are those that the config lists by layer (`layer_types` and the like). To rule out other
    differences, the parameters of all kinds must add up to those of the whole model. The config unchanged and an empty
    list, if they do not, if layers share keys and values, or if there are few layers.
    """
    if getattr(config.get_text_config(), "num_hidden_layers", None) is None:
        return config, []
    kinds = _layer_kinds(config)
    layers_by_kind = [[i for i, other in enumerate(kinds) if other == kind] for kind in set(kinds)]
    last = sorted(i for layers in layers_by_kind for i in layers[-2:])
    left_out = [layers[:-2] for layers in layers_by_kind if layers[2:]]
    shares_kv = getattr(config.get_text_config(), "num_kv_shared_layers", 0)
    if shares_kv or len(last) + (len(last) + 1) * len(left_out) >= len(kinds):
        return config, []
    short = _with_layers(config, last)
    extra = [(_with_layers(config, sorted([layers[-1], *last])), len(layers)) for layers in left_out]
    short_shapes = _parameter_shapes(short, build)
    total = Counter(short_shapes)
    for longer, count in extra:
        for shape, number in (_parameter_shapes(longer, build) - short_shapes).items():
            total[shape] += number * count
    return (short, extra) if total == _parameter_shapes(config, build) else (config, [])


def _by_layer(text_config: PretrainedConfig) -> dict[str, Sequence]:
    """Return the values that a config lists by layer."""
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

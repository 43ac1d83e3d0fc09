"""Blocks that restore what they change."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from torch import nn

from ppo_plus.utils.contexts import evaluation_mode, set_attributes


@pytest.mark.parametrize("error", [None, KeyError])
def test_attributes_and_modes_are_as_before(error):
    target, model = SimpleNamespace(kept=1), nn.Sequential(nn.Dropout()).train()
    with pytest.raises(error) if error else evaluation_mode(model):  # noqa: SIM117
        with set_attributes(target, kept=2, new=3), evaluation_mode(model):
            assert vars(target) == {"kept": 2, "new": 3} and not model[0].training
            if error:
                raise error
    assert vars(target) == {"kept": 1} and model[0].training

"""A memory planner: predict the memory of a run from the model's config alone.

    ppo-plus memory --model Qwen/Qwen2.5-7B-Instruct --vram 12 --prompt-length 256 --response-length 512

Nothing is estimated by formula. The actor-critic that PPOTrainer would build runs its own code, forward and backward,
on tensors with a shape, a dtype and a storage size but without data (`FakeTensorMode`), and a tracker counts the bytes
of every storage from its creation until it is freed. So a prediction follows the code of the architecture. Only the
linear layers of a quantized base are replaced by models of them, because their kernels need a GPU.

A deep model is planned from two or three layers of each kind: the memory that one more layer adds is measured and
multiplied.
"""

from .dry_run import DryRun
from .planning import Plan, plan
from .prediction import Phase, PlannerConfig
from .tracker import MemoryTracker

__all__ = ["DryRun", "MemoryTracker", "Phase", "Plan", "PlannerConfig", "plan"]

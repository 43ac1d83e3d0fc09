"""A memory planner: what a run will need, from the model's config alone.

    python -m ppo_plus.memory --model Qwen/Qwen2.5-7B-Instruct --vram 12 --prompt-length 256 --response-length 512

Nothing is estimated by formula. The actor-critic that PPOTrainer would build runs its own code, forward and backward,
on tensors that have a shape, a dtype and a storage size but no data (`FakeTensorMode`), and a ledger books the bytes
of every storage from the moment it is made until it is freed. What the planner says of a new architecture is
therefore what that architecture does. Stand-ins are used in one place, for the linear layers of a quantized base,
whose kernels want a GPU.

Layers of one kind are alike, so a deep model is planned from two or three layers of each kind: what one more of them
adds is measured, and multiplied.
"""

from .dry_run import DryRun
from .ledger import MemoryTracker
from .planning import Plan, plan
from .prediction import Phase, PlannerConfig

__all__ = ["DryRun", "MemoryTracker", "Phase", "Plan", "PlannerConfig", "plan"]

"""Run report: a self-contained HTML page about a run, updated during training, and a PNG of its curves.

`RunReportCallback` writes `report.html` into the output folder: curves, the answers to fixed prompts over time, and
the tokens of the last rollouts colored by advantage, value, KL and reward. The page contains its data as JSON and loads
no other files. A resumed run continues the data in the page; its curves come from Trainer's log history.

    ppo-plus report out/run1 out/run2 --output comparison.html
"""

from .callback import RunReportCallback
from .curves import plot_curves
from .page import REPORT, read_run, write_page
from .samples import fixed_prompts

__all__ = ["REPORT", "RunReportCallback", "fixed_prompts", "plot_curves", "read_run", "write_page"]

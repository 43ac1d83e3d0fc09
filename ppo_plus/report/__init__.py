"""The run report: one self-contained page about a run, kept up to date as it goes, and the same curves as a picture.

`RunReportCallback` writes `report.html` into the output folder: curves, the answers to fixed prompts over time, and
the tokens of the last rollouts coloured by advantage, value, KL and reward. The page carries its data as JSON and needs
nothing else to be opened. A resumed run goes on from the data in the page, its curves from Trainer's log history.

    python -m ppo_plus.report out/run1 out/run2 --output comparison.html
"""

from .callback import RunReportCallback
from .curves import plot_curves
from .page import REPORT, read_run, write_page
from .samples import fixed_prompts

__all__ = ["REPORT", "RunReportCallback", "fixed_prompts", "plot_curves", "read_run", "write_page"]

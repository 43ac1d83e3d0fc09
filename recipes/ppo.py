"""The command `ppo-plus ppo` as a script, for launchers that need a file.

accelerate launch recipes/ppo.py --config recipes/tldr/ppo.yaml
"""

import sys

from ppo_plus.cli.launch import run

if __name__ == "__main__":
    run("ppo", sys.argv[1:])

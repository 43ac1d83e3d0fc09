"""The command `ppo-plus reward` as a script, for launchers that need a file.

accelerate launch recipes/reward_model.py --config recipes/qwen_7b_qlora/reward.yaml
"""

import sys

from ppo_plus.cli.launch import run

if __name__ == "__main__":
    run("reward", sys.argv[1:])

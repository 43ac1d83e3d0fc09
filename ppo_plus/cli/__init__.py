"""The command `ppo-plus`: train from YAML and flags, plan memory, compare runs, start from a recipe."""

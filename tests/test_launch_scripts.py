"""The scripts of docs/distributed.md for several machines, run with stand-ins for ssh, SLURM and the command."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from test_docs import blocks

from ppo_plus.cli import ppo
from ppo_plus.cli.arguments import FieldParser
from ppo_plus.cli.launch import resolve_profile

ROOT = Path(__file__).parents[1]
STAND_INS = {
    "ssh": 'shift 2; exec bash -c "$*"',
    "scontrol": "printf 'first\\nsecond\\n'",
    "srun": 'for node in 0 1; do SLURM_NODEID=$node SLURM_NNODES=2 "$@"; done',
    "ppo-plus": 'echo "$@" >> started',
}


@pytest.mark.parametrize("first", ["# on the first", "#!/bin/bash", "main="])
def test_a_script_starts_each_of_two_machines(tmp_path, first):
    (script,) = [code for _, code in blocks(ROOT / "docs" / "distributed.md", "bash") if code.startswith(first)]
    for name, text in STAND_INS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "hostfile").write_text("first\nsecond\n")
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "two"}
    subprocess.run(["bash", "-e", "-c", script], cwd=tmp_path, env=environment, check=True)
    started = []
    for line in (tmp_path / "started").read_text().splitlines():
        command, *words = line.split()
        assert command == "ppo" and "recipes/tldr/ppo.yaml" in words
        rest = resolve_profile(FieldParser(ppo.ARGUMENTS, "test", build=False).parse(words)[1])
        args = launch_command_parser().parse_args([*rest, "script.py"])
        started.append((args.machine_rank, args.num_machines, args.num_processes, args.main_process_port))
        assert args.main_process_ip in ("first", "10.0.0.1")
    assert sorted(started) == [(0, 2, 8, 29500), (1, 2, 8, 29500)]

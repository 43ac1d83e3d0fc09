"""Two nodes, as two network namespaces of this machine with a cable between them, train by `accelerate launch`."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support_table import SHARED
from test_distributed import SCRIPT, alone

ROOT = Path(__file__).parents[1]
TIMEOUT = 15  # ddp_timeout, in seconds


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


def can_make_namespaces() -> bool:
    if shutil.which("ip") is None:
        return False
    name = f"ppo-{os.getpid()}-trial"
    try:
        ip("netns", "add", name)
        subprocess.run(["ip", "netns", "exec", name, "true"], check=True, capture_output=True)
    except subprocess.CalledProcessError:
        return False
    finally:
        subprocess.run(["ip", "netns", "del", name], capture_output=True)
    return True


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not can_make_namespaces(), reason="network namespaces cannot be made here (root, iproute2)"),
]


@pytest.fixture
def nodes():
    """Two namespaces by name, 10.99.0.1 and 10.99.0.2, whose interfaces are called cable."""
    names = [f"ppo-{os.getpid()}-{i}" for i in range(2)]
    for name in names:
        ip("netns", "add", name)
    try:
        ip("link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1])
        for i, name in enumerate(names):
            ip("-n", name, "addr", "add", f"10.99.0.{i + 1}/24", "dev", "cable")
            for interface in ("lo", "cable"):
                ip("-n", name, "link", "set", interface, "up")
        yield names
    finally:
        for name in names:
            ip("netns", "del", name)


# Ends a node, or cuts its cable, in the second of two micro-batches of its step 4.
ACT_AT_STEP_4 = """
import os, signal, subprocess
from ppo_plus import PPOCallback

class Act(PPOCallback):
    def on_substep_end(self, args, state, control, **kwargs):
        if trainer.accelerator.process_index == 1 and state.global_step == 4:
            {action}

trainer.add_callback(Act())
"""
KILL = ACT_AT_STEP_4.format(action="os.kill(os.getppid(), signal.SIGKILL); os.kill(os.getpid(), signal.SIGKILL)")
CUT = ACT_AT_STEP_4.format(action='subprocess.run(["ip", "link", "set", "cable", "down"], check=True)')


def start(nodes, folders, *, config=None, prepare="", resume=None):
    """Train on both nodes, each with its folder as output_dir; return exit codes and what each wrote to stderr."""
    processes = []
    for rank, (node, folder) in enumerate(zip(nodes, folders, strict=True)):
        folder.mkdir(exist_ok=True, parents=True)
        script = folder / f"train_{rank}.py"
        text = {"tests": str(ROOT / "tests"), "folder": str(folder), "steps": 6, "resume": resume}
        options = {"gradient_accumulation_steps": 2, "ddp_timeout": TIMEOUT, "html_report": True, **(config or {})}
        script.write_text(SCRIPT.format(**text, config=options, prepare=prepare))
        command = [
            "ip", "netns", "exec", node, sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu",
            "--num_machines", "2", "--num_processes", "2", "--machine_rank", str(rank),
            "--main_process_ip", "10.99.0.1", "--main_process_port", "29511", "--mixed_precision", "no",
            "--dynamo_backend", "no", str(script),
        ]  # fmt: skip
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "cable"}
        processes.append(
            subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
                             start_new_session=True)
        )  # fmt: skip
    try:
        said = [process.communicate(timeout=400)[1] for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    return [process.returncode for process in processes], said


def finish(nodes, folders, **options):
    codes, said = start(nodes, folders, **options)
    assert codes == [0, 0], said[0][-3000:] + said[1][-3000:]
    return torch.load(folders[0] / "weights.pt")


@pytest.mark.support("1", SHARED, columns=["two nodes", "two nodes, sharded"])
@pytest.mark.parametrize("fsdp", [False, True], ids=["copies", "sharded"])
def test_two_nodes_train_what_one_process_trains_and_save_once(nodes, tmp_path, fsdp):
    two = finish(nodes, [tmp_path / "two"] * 2, config={"fsdp": fsdp})
    one, _ = alone(tmp_path / "one", seed=42)
    other, _ = alone(tmp_path / "other", seed=43)
    assert (two - one).abs().max() < 1e-4
    assert (two - other).abs().max() > 1e-2  # negative control
    saved = {f.name for f in (tmp_path / "two" / "checkpoint-3").iterdir()}
    assert {"adapter_model.safetensors", "manifest.json", "rollout_0.safetensors", "rollout_1.safetensors"} <= saved


@pytest.mark.support("R", SHARED, "a killed node", columns=["two nodes"])
def test_a_killed_node_is_named_by_the_other_and_both_resume_to_the_same_bits(nodes, tmp_path):
    whole = finish(nodes, [tmp_path / "whole"] * 2)
    folders = [tmp_path / "killed"] * 2
    codes, said = start(nodes, folders, prepare=KILL)
    assert codes[0] == 1 and codes[1] < 0
    assert "Rank 0 has lost rank 1 (node 1, host " in said[0]
    assert f"the last valid checkpoint is {tmp_path / 'killed' / 'checkpoint-3'}" in said[0]
    assert not (tmp_path / "killed" / "weights.pt").exists()  # negative control
    assert torch.equal(finish(nodes, folders, resume=True), whole)


@pytest.mark.support("runs", "a cut cable", columns=["two nodes"])
def test_a_cut_cable_ends_both_nodes_by_ddp_timeout(nodes, tmp_path):
    """Each names the other: a cable gives no sign, so only `ddp_timeout`, 30 minutes by default, ends the wait."""
    codes, said = start(nodes, [tmp_path / "cut"] * 2, prepare=CUT)
    assert codes == [1, 1]
    assert "Rank 0 has lost rank 1 (node 1, host " in said[0] and "Rank 1 has lost rank 0 (node 0, host " in said[1]


@pytest.mark.support("R", "a disk on each node", columns=["two nodes"])
def test_nodes_with_disks_of_their_own_resume_if_each_saves(nodes, tmp_path):
    """Else one would resume, and wait for another that begins anew."""
    folders = [tmp_path / "own" / str(rank) for rank in range(2)]
    shared, own = ({"save_on_each_node": each} for each in (False, True))
    whole = finish(nodes, folders, config=shared)
    codes, said = start(nodes, folders, config=shared, resume=True)
    assert codes == [1, 1]
    for text in said:
        assert "would resume from different checkpoints: checkpoint-6, none, by rank" in text
    folders = [tmp_path / "each" / str(rank) for rank in range(2)]
    start(nodes, folders, config=own, prepare=KILL)
    assert torch.equal(finish(nodes, folders, config=own, resume=True), whole)

"""Responses from our decoding, transformers' `generate_batch` and a vLLM server; and what a weight sync takes.

    python benchmarks/engines.py [--vllm .venv-vllm/bin/python] [--repeats 3] [--dtype bfloat16|float32]

All sample 32 responses with the same model (SmolLM2-135M) and adapter (LoRA of rank 16 on all linear layers), once of
48 tokens each (`equal`), and once 30 of 8 to 16 tokens and 2 of 256 (`uneven`). The server starts with the Python of an
environment that has vLLM, on as many threads as this process; `--url` takes a server that is up, and then its CPU time
is unknown. The adapter is on the server before time is taken. Sides run in turn.

The last line is JSON. By workload and side, `tokens_per_second` and `tokens_per_cpu_second` are of medians, the CPU
time being that of this process and of the server; `ratio` is the speed of vLLM over ours. `sync` has megabytes and
seconds of handing over the adapter (written, loaded by the server, unloaded), and of the same for all weights on disk
alone (written, and read again).
"""

from __future__ import annotations

import os
import socket
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from _utils import ROOT, answer_continuously, benchmark_parser, chosen_model, now, report, seconds
from accelerate import Accelerator
from ppo_runs import lora
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from variable_length import drawn_lengths

from ppo_plus import ActorCritic, PPOConfig, ValueHead
from ppo_plus.data.seeding import sampling_uniforms
from ppo_plus.models.loading import load_policy
from ppo_plus.rollout.vllm_client import VLLMClient
from ppo_plus.rollout.vllm_engine import VLLMEngine
from ppo_plus.utils.collectives import Collectives

ROWS, PROMPT, PAD = 32, 14, 0
SIDES = ("ours", "generate_batch", "vllm")


@contextmanager
def serve(python: str, model: str, dtype: str) -> Iterator[tuple[str, int]]:
    """Start a vLLM server; yield its address and the id of its process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        python, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--host", "127.0.0.1",
        "--port", str(port), "--dtype", dtype, "--max-model-len", "512", "--max-num-seqs", str(ROWS),
        "--enable-lora", "--max-loras", "1", "--max-lora-rank", "16", "--logprobs-mode", "processed_logprobs",
    ]  # fmt: skip
    environment = os.environ | {
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True", "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1",
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }  # fmt: skip
    server = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield f"http://127.0.0.1:{port}", server.pid
    finally:
        processes = psutil.Process(server.pid).children(recursive=True)
        for process in (server, *processes):
            process.terminate()
        psutil.wait_procs(processes, timeout=30)
        server.wait()


def cpu_seconds(pid: int | None) -> float:
    """CPU time of this process, and of another with its children."""
    processes = [psutil.Process()]
    if pid is not None:
        server = psutil.Process(pid)
        processes += [server, *server.children(recursive=True)]
    return sum(sum(process.cpu_times()[:2]) for process in processes)


def measure(sides: dict[str, Callable[[], int]], repeats: int, pid: int | None) -> dict[str, dict[str, float]]:
    """Medians over repeats in turn, after one call of each that is not counted; a side returns its tokens."""
    spent: dict[str, list[tuple[float, float, int]]] = {side: [] for side in sides}
    for repeat in range(repeats + 1):
        for side, work in sides.items():
            start, cpu_start = now(), cpu_seconds(pid)
            tokens = work()
            if repeat:
                spent[side].append((now() - start, cpu_seconds(pid) - cpu_start, tokens))
    return {side: summarize(runs) for side, runs in spent.items()}


def summarize(runs: list[tuple[float, float, int]]) -> dict[str, float]:
    """Return medians of seconds, CPU seconds and tokens, and the speeds that follow from them."""
    wall, cpu, tokens = (statistics.median(column) for column in zip(*runs, strict=True))
    return {
        "seconds": wall, "cpu_seconds": cpu, "tokens": tokens, "tokens_per_second": tokens / wall,
        "tokens_per_cpu_second": tokens / max(cpu, 1e-9),
    }  # fmt: skip


def make_engine(url: str, model: ActorCritic, folder: str, end: int) -> VLLMEngine:
    config = PPOConfig(
        output_dir=folder, use_vllm=True, vllm_server_base_url=url, temperature=1.0, generation_batch_size=ROWS,
        use_cpu=not torch.cuda.is_available(), report_to="none",
    )  # fmt: skip
    client = VLLMClient(url, timeout=600.0)
    client.wait_until_up()
    collectives = Collectives(Accelerator(cpu=config.use_cpu))
    return VLLMEngine(client, config, [end], model.num_embeddings, PAD, collectives, lambda *args: None)


def measure_lengths(
    model: ActorCritic, engine: VLLMEngine, lengths: torch.Tensor, repeats: int, pid: int | None
) -> dict:
    """Measure all sides on prompts of `PROMPT` tokens and responses of these lengths."""
    vocabulary, end = model.num_embeddings, engine.stop_ids[0]
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, vocabulary - 1, (len(lengths), PROMPT), generator=generator)
    uniforms = sampling_uniforms(0, len(lengths), int(lengths.max()))
    uniforms[torch.arange(uniforms.shape[1]) >= lengths[:, None]] = torch.nan  # where a row has to end
    device, prompts = model.device, ids.tolist()

    def ours() -> int:
        inputs = (ids.to(device), torch.ones_like(ids).to(device), uniforms)
        model.sample(*inputs, stop_ids=[end], pad_token_id=PAD)
        return int(lengths.sum())

    def generate_batch() -> int:
        return sum(map(len, answer_continuously(model.language_model, prompts, lengths.tolist())))

    def vllm() -> int:
        return sum(int((row != 0).sum()) for row in engine.generate(prompts, uniforms).logprobs)

    with engine.serve(model), torch.no_grad():
        sides = measure(dict(zip(SIDES, (ours, generate_batch, vllm), strict=True)), repeats, pid)
    return {**sides, "ratio": sides["vllm"]["tokens_per_second"] / sides["ours"]["tokens_per_second"],
            "cpu_ratio": sides["vllm"]["tokens_per_cpu_second"] / sides["ours"]["tokens_per_cpu_second"]}  # fmt: skip


def measure_sync(model: ActorCritic, engine: VLLMEngine, folder: str, repeats: int) -> dict[str, Any]:
    """Return megabytes and median seconds of handing over the adapter, and of all weights through a file."""
    file, sizes = Path(folder) / "all.safetensors", {}

    def adapter() -> None:
        with engine.serve(model):
            sizes["adapter"] = sum(f.stat().st_size for f in Path(folder).glob("vllm-adapter-*/*"))

    def everything() -> None:
        weights = {name: p.detach().contiguous() for name, p in model.language_model.named_parameters()}
        base = {name: p for name, p in weights.items() if "lora_" not in name}
        save_file({name: p.clone() for name, p in base.items()}, file)
        load_file(file)
        sizes["all"] = file.stat().st_size

    spent = {name: statistics.median(seconds(work) for _ in range(repeats))
             for name, work in (("adapter", adapter), ("all", everything))}  # fmt: skip
    return {f"{name}_{unit}": value for name in spent for unit, value in
            (("mb", sizes[name] / 2**20), ("seconds", spent[name]))}  # fmt: skip


def main() -> None:
    parser = benchmark_parser(__doc__, "counted turns of each side")
    parser.add_argument(
        "--vllm", default=str(ROOT / ".venv-vllm/bin/python"), help="Python of an environment with vLLM"
    )
    parser.add_argument("--url", help="a server that is up, in place of --vllm")
    args = parser.parse_args()
    if args.url is None and not Path(args.vllm).is_file():
        parser.error(f"there is no {args.vllm}: `make test-vllm` makes it; or pass --vllm or --url")
    with tempfile.TemporaryDirectory() as folder:
        name = chosen_model(args, folder)
        policy = load_policy(AutoModelForCausalLM.from_pretrained(name, dtype=args.dtype), peft_config=lora())
        with torch.no_grad():  # an adapter that changes something
            for parameter in (p for n, p in policy.named_parameters() if "lora_B" in n):
                parameter.normal_(std=0.02)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = ActorCritic(policy.to(device), ValueHead(policy.config.hidden_size)).eval()
        workloads = {
            "equal": torch.full((ROWS,), 6 if args.tiny else 48),
            "uneven": drawn_lengths(ROWS, 2, 32 if args.tiny else 256),
        }
        with nothing(args.url) if args.url else serve(args.vllm, name, args.dtype) as (url, pid):
            engine = make_engine(url, model, folder, policy.config.vocab_size - 1)
            found = {
                key: measure_lengths(model, engine, lengths, args.repeats, pid) for key, lengths in workloads.items()
            }
            result = {
                "workloads": found, "sync": measure_sync(model, engine, folder, args.repeats), "dtype": args.dtype,
                "threads": torch.get_num_threads(), "vllm": engine.client.request("GET", "/version")["version"],
            }  # fmt: skip
    report("engines", result, write=not args.tiny)


@contextmanager
def nothing(url: str) -> Iterator[tuple[str, None]]:
    yield url, None


if __name__ == "__main__":
    main()

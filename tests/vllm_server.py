"""A server with the part of vLLM's HTTP interface that ppo_plus uses, over a tiny model of transformers and PEFT."""

from __future__ import annotations

import copy
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model


class FakeVLLM:
    """Answers as vLLM does; the attributes make it answer otherwise.

    Attributes:
        requests: (path, payload) of each request, in order.
        adapters: names that are loaded, and their folders.
        fail_from: number of the completion from which on it answers with `failure`; None never.
        failure: HTTP state of failures; None closes the connection.
        raw: whether log-probabilities are those at temperature 1, as without `--logprobs-mode processed_logprobs`.
        stale: whether the first adapter answers for all that follow.
        max_rank: `--max-lora-rank`.
        loads_adapters: whether there are routes for adapters.
        stop_early: length at which responses end whatever `max_tokens` is.
        edit: changes the body of a completion.
    """

    def __init__(self, model, **attributes):
        self.model = get_peft_model(copy.deepcopy(model), LoraConfig(r=1, target_modules="all-linear")).eval()
        self.requests, self.adapters, self.completions = [], {}, 0
        self.fail_from, self.failure, self.raw, self.stale, self.max_rank = None, 500, False, False, 16
        self.loads_adapters, self.stop_early, self.version, self.max_model_len = True, None, "0.32.0", 128
        self.edit = lambda body: body
        vars(self).update(attributes)
        self._lock, fake = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                self.answer(None)

            def do_POST(self):
                self.answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def answer(self, payload):
                with fake._lock:
                    fake.requests.append((self.path, payload))
                    status, body = fake.respond(self.path, payload)
                if status is None:
                    self.close_connection = True
                    return
                data = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args):
                """Write nothing."""

        class Server(ThreadingHTTPServer):
            request_queue_size = 128  # connections at the same time

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self._server.shutdown()
        self._server.server_close()

    def respond(self, path, payload):
        if path == "/v1/models":
            base = {"id": "base", "root": "tiny", "parent": None, "max_model_len": self.max_model_len}
            return 200, {"data": [base, *({"id": name, "parent": "base"} for name in self.adapters)]}
        if path in ("/health", "/version"):
            return 200, {"version": self.version}
        if path == "/v1/completions":
            return self.complete(payload)
        if not self.loads_adapters:
            return 404, {"detail": "Not Found"}
        name = payload["lora_name"]
        if path == "/v1/load_lora_adapter":
            return self.load(name, Path(payload["lora_path"]))
        if name not in self.adapters:
            return refuse(404, f"The lora adapter '{name}' cannot be found.")
        del self.adapters[name]
        return 200, "Success"

    def load(self, name, folder):
        if not (folder / "adapter_config.json").is_file():
            return refuse(404, f"No adapter found for {folder}")
        rank = json.loads((folder / "adapter_config.json").read_text())["r"]
        if rank > self.max_rank:
            return refuse(500, f"LoRA rank {rank} is greater than max_lora_rank {self.max_rank}.")
        if not (self.stale and len(self.model.peft_config) > 1):
            PeftModel.load_adapter(self.model, str(folder), name)
        self.adapters[name] = folder
        return 200, "Success"

    @torch.no_grad()
    def complete(self, payload):
        self.completions += 1
        if self.fail_from is not None and self.completions >= self.fail_from:
            return (None, None) if self.failure is None else refuse(self.failure, "EngineCore encountered an issue.")
        if payload["model"] not in (*self.adapters, "base"):
            return refuse(404, f"The model `{payload['model']}` does not exist.")
        adapter = list(self.model.peft_config)[1] if self.stale and self.adapters else payload["model"]
        generator = torch.Generator().manual_seed(payload["seed"])
        ids, logprobs = [], []
        self.model.set_adapter(adapter if payload["model"] != "base" else "default")  # a new adapter changes nothing
        while len(ids) < (self.stop_early or payload["max_tokens"]):
            logits = self.model(torch.tensor([payload["prompt"] + ids])).logits[0, -1].float()
            scored = (logits / (1.0 if self.raw else payload["temperature"])).log_softmax(-1)
            probabilities = (logits / payload["temperature"]).softmax(-1)
            token = int(torch.multinomial(probabilities, 1, generator=generator))
            ids.append(token)
            logprobs.append(float(scored[token]))
            if token in payload["stop_token_ids"]:
                break
        choice = {"index": 0, "token_ids": ids, "logprobs": {"token_logprobs": logprobs}}
        return 200, self.edit({"choices": [choice]})


def refuse(status, message):
    return status, {"error": {"message": message, "code": status}}

"""Fields of `PPOConfig` about responses from a vLLM server, under TRL's names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

from .checks import _field, above, at_least, at_most


@dataclass(repr=False)
class VLLMFields:
    """Server that generates responses in place of the trainer."""

    use_vllm: bool = _field(False, "Generate responses by a vLLM server, which gets the adapter at each rollout.")
    vllm_mode: Literal["server", "colocate"] = _field(
        "server", "Where vLLM runs; 'colocate', in the trainer's process, is refused: the two need other libraries."
    )
    vllm_server_base_url: str | None = _field(
        None, "Address of the vLLM server, as http://localhost:8000; it replaces vllm_server_host and vllm_server_port."
    )
    vllm_server_host: str = _field("0.0.0.0", "Host of the vLLM server.")
    vllm_server_port: int = _field(8000, "Port of the vLLM server.", at_least(1) & at_most(65535))
    vllm_server_timeout: float = _field(
        240.0, "Maximum seconds until the vLLM server is up, and for each of its answers.", above(0)
    )

    @property
    def vllm_url(self) -> str:
        """Address of the vLLM server, without a slash at its end."""
        url = self.vllm_server_base_url or f"http://{self.vllm_server_host}:{self.vllm_server_port}"
        return url.rstrip("/")

    def _check_vllm(self) -> None:
        if self.vllm_mode == "colocate":
            raise ValueError(
                "PPOConfig: vllm_mode='colocate' is not supported: vLLM would run in the trainer's environment, and it "
                "requires other versions of transformers than ppo_plus. Start `vllm serve` in an environment of its "
                "own, on this machine or another, and set vllm_mode='server'."
            )
        if not self.vllm_url.startswith(("http://", "https://")):
            raise ValueError(
                f"PPOConfig: vllm_server_base_url must begin with http:// or https://; got "
                f"{self.vllm_server_base_url!r}."
            )
        if urlsplit(self.vllm_url).username is not None:
            raise ValueError(
                "PPOConfig: vllm_server_base_url has a user name or password, which would be saved and pushed with the "
                "arguments of the run: use an address without them."
            )
        if self.use_vllm:
            return
        for name in ("vllm_server_base_url", "vllm_server_host", "vllm_server_port", "vllm_server_timeout"):
            if getattr(self, name) != getattr(VLLMFields, name):
                raise ValueError(
                    f"PPOConfig: {name}={getattr(self, name)!r} has no effect with use_vllm=False: set use_vllm=True, "
                    "or remove it."
                )

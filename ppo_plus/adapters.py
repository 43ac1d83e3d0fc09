"""Adapters on one base: which of them speaks, and their weights on disk."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import CONFIG_NAME, get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
from peft.utils.other import AuxiliaryTrainingWrapper, TrainableTokensWrapper
from safetensors import safe_open
from torch import Tensor, nn
from transformers.utils import CONFIG_NAME as MODEL_CONFIG

from .bases import Samples, are_different, decode_samples, local_folder, sample_files, sample_model
from .checkpoint import checkpoints
from .heads import find_other_heads, pop_score_head, score_head_shapes
from .lora import use_plain_lora
from .rollout import read_json_object, readable

WEIGHTS_FILE = "adapter_model.safetensors"
REWARD_FILE = "reward_model.json"  # what RewardTrainer says of a reward model, beside it
# Files that say how an adapter is to be used, where it has them.
BESIDE = (REWARD_FILE, "tokenizer_config.json", "value_head.safetensors", "value_head.bin")
LEAVE_THE_BASE = ("gaussian", "eva", "orthogonal", "mica")  # of the ways to start LoRA that have names
PREFIX = "base_model.model."  # of the names in an adapter's file
TEXT_ONLY, WHOLE = {r"^model\.language_model\.": "model."}, {r"^model\.": "model.language_model."}
HEADS = ("score", "classifier")  # PEFT adds both to what an adapter of a sequence classifier saves
REFUSED = {
    "kasa_config": "which cuts the smallest singular values out of the base's own weights",
    "layer_replication": "which makes another, deeper model of the base",
    "alora_invocation_tokens": "so it speaks only after these tokens, which PeftModel's own forward alone looks for",
}


@contextlib.contextmanager
def use_adapter(model: nn.Module, name: str | None) -> Iterator[None]:
    """Make one adapter the active one inside the block, or none; put back what was active, also after an error.

    Only the two fields that PEFT's layers read are changed. PEFT's own switches turn `requires_grad` on for an adapter
    that they activate and off for the others; here nothing is trained that was not trained before.
    """
    if name is not None and name not in cast(Any, model).peft_config:
        raise ValueError(f"There is no adapter {name!r} here, only {list(cast(Any, model).peft_config)}.")
    layers: list[Any] = [m for m in model.modules() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)]
    before = [(layer._active_adapter, layer._disable_adapters) for layer in layers]
    try:
        for layer in layers:
            layer._active_adapter = layer._active_adapter if name is None else [name]
            # A layer that trains single tokens knows of no adapter but those that do.
            layer._disable_adapters = name is None or name not in getattr(layer, "trainable_tokens_delta", [name])
        yield
    finally:
        for layer, (active, disabled) in zip(layers, before, strict=True):
            layer._active_adapter, layer._disable_adapters = active, disabled


def active_adapters(model: nn.Module) -> list[str]:
    """The adapters that speak now."""
    layer = next(m for m in model.modules() if isinstance(m, BaseTunerLayer))
    return [] if layer.disable_adapters else list(layer.active_adapters)


def active_adapter(model: nn.Module) -> str | None:
    """The adapter that speaks now; None if none does."""
    return next(iter(active_adapters(model)), None)


def scalings(model: nn.Module, adapter: str = "default") -> list[float]:
    """By what an adapter's products are multiplied in its layers (LoRA's alpha over r), each number once."""
    layers = (module for module in model.modules() if isinstance(module, BaseTunerLayer))
    found = (getattr(layer, "scaling", {}) for layer in layers)
    return sorted({float(by_name[adapter]) for by_name in found if adapter in by_name})


@contextlib.contextmanager
def same_requires_grad(model: nn.Module) -> Iterator[None]:
    """Put back after the block what was trained before it; adding an adapter turns on and off whole adapters."""
    trained = [(p, p.requires_grad) for p in model.parameters()]
    try:
        yield
    finally:
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)


def belongs_to(parameter: str, adapter: str) -> bool:
    """Whether a parameter of that name is one of the adapter's."""
    return adapter in parameter.split(".")


def set_trained(model: nn.Module, adapter: str, trained: bool) -> None:
    """Whether the weights of one adapter are trained."""
    for name, parameter in model.named_parameters():
        if belongs_to(name, adapter):
            parameter.requires_grad_(trained)


def train_adapter(model: nn.Module) -> None:
    """Train the active adapters of a model whose adapters were loaded frozen, as `PeftModel.from_pretrained` does."""
    if isinstance(model, PeftModel) and not any(parameter.requires_grad for parameter in model.parameters()):
        for adapter in active_adapters(model):
            set_trained(model, adapter, True)


def weights_as(model: nn.Module, adapter: str, other: str) -> dict[str, Tensor]:
    """Copies of one adapter's weights, by the names that they have in another adapter of the same form."""
    own = {name: tensor for name, tensor in model.state_dict().items() if belongs_to(name, adapter)}
    return {
        ".".join(other if part == adapter else part for part in name.split(".")): tensor.detach().clone()
        for name, tensor in own.items()
    }


def adapter_folder(model: Any) -> Path | None:
    """The local folder of a PEFT adapter, downloaded if it is on the Hub; None for whatever is no adapter's name.

    Raises:
        ValueError: neither a folder nor a name on the Hub, or the Hub did not answer what it was asked.
    """
    if not isinstance(model, str | Path):
        return None
    local = Path(model)
    if (local / CONFIG_NAME).is_file():
        if not (local / WEIGHTS_FILE).is_file():
            raise ValueError(f"{model} has an {CONFIG_NAME} but no {WEIGHTS_FILE}: no weights.")
        read_json_object(local / CONFIG_NAME)
        return local
    if local.exists():
        if (saved := checkpoints(local)) and not (local / MODEL_CONFIG).is_file():
            raise ValueError(
                f"{model} holds checkpoints and no model: training has not ended, or save_model() was not called. Pass "
                f"one of its checkpoints, the newest is {saved[-1][1]}, or call trainer.save_model()."
            )
        return None
    found = [download(str(model), file) for file in (CONFIG_NAME, WEIGHTS_FILE)]
    if found[0] is None or found[1] is None:
        return None
    read_json_object(found[0])
    for file in BESIDE:
        download(str(model), file)
    return found[0].parent


def download(name: str, file: str) -> Path | None:
    """Download a file of a model on the Hub; None where there is no such file or model.

    Raises:
        ValueError: the name is none of the Hub's, or the Hub refused or failed to answer.
    """
    try:
        return Path(hf_hub_download(name, file))
    except HFValidationError as error:
        raise ValueError(
            f"There is no folder {name!r}, and it cannot be a name on the Hub ({error}). Check the path; it is looked "
            f"for from {Path.cwd()}."
        ) from error
    except GatedRepoError as error:
        raise ValueError(
            f"{name!r} is gated: accept its terms on the Hub, and log in with a token that may read it (hf auth login)."
        ) from error
    except (RepositoryNotFoundError, RemoteEntryNotFoundError):
        return None
    except LocalEntryNotFoundError as error:  # not in the cache, and the Hub could not be asked
        if not isinstance(error.__cause__, HfHubHTTPError):
            return None
        raise ValueError(_of_hub(name, file, error.__cause__)) from error
    except HfHubHTTPError as error:
        raise ValueError(_of_hub(name, file, error)) from error


def _of_hub(name: str, file: str, error: HfHubHTTPError) -> str:
    status = error.response.status_code
    fix = "Try again later, or pass a local folder."
    if status in (401, 403):
        fix = "Log in with a token that may read it (hf auth login), or pass a local folder."
    return f"The Hub answered {status} when asked for {file} of {name!r}. {fix}"


def reward_description(model: str | Path) -> dict[str, Any]:
    """What `RewardTrainer` wrote about a reward model, downloaded if it is on the Hub; empty where it wrote nothing."""
    file: Path | None = Path(model) / REWARD_FILE
    if not Path(model).exists():
        file = download(str(model), REWARD_FILE) if is_hub_name(str(model)) else None
    return read_json_object(file) if file is not None and file.is_file() else {}


def is_hub_name(name: str) -> bool:
    """Whether a model on the Hub could have this name."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def check_no_adapter(model: Any, fix: str) -> None:
    """Refuse the name of an adapter, and a model into which transformers has put one: PEFT would put another over it.

    Args:
        model: a name or a model.
        fix: what to pass instead, a sentence.

    Raises:
        ValueError: there is an adapter, and nothing of it would be left in the model that is trained.
    """
    if adapter_folder(model) is not None:
        what = f"model={str(model)!r} is an adapter, and a new one would take its place"
    elif getattr(model, "_hf_peft_config_loaded", False):
        what = "transformers has put an adapter into this model, frozen, and a new one would take its place"
    else:
        return
    raise ValueError(f"{what}: what it has learned would be lost without a word. {fix}")


def check_base_is_frozen(policy: PeftModel) -> None:
    """Refuse to train weights of the base beside those of adapters: the base is reference and reward model as well."""
    adapters = policy.peft_config
    trained = [
        name
        for name, parameter in policy.named_parameters()
        if parameter.requires_grad and not any(belongs_to(name, adapter) for adapter in adapters)
    ]
    if trained:
        raise ValueError(
            f"Weights of the adapter's base would be trained, {len(trained)} of them, the first {trained[0]}. The base "
            "is the reference, and what reward adapters were trained on: freeze it (requires_grad_(False)), or name "
            "its modules in LoraConfig(modules_to_save=...), which trains copies."
        )


def check_own_weights(config: PeftConfig | None, whose: str) -> None:
    """Refuse an adapter that changes its base, which then is not that of the other roles, or that would not speak."""
    if not isinstance(config, PeftConfig | None):
        raise TypeError(
            f"{whose} must be a PeftConfig; got {type(config).__name__}. Pass LoraConfig(...), of a dict "
            "LoraConfig(**options)."
        )
    if isinstance(saved := getattr(config, "modules_to_save", None), str):
        raise ValueError(f"{whose} has modules_to_save={saved!r}, which must be a list: write [{saved!r}].")
    init, bias = getattr(config, "init_lora_weights", True), getattr(config, "bias", "none")
    shared = "Actor, reference, critic and reward adapters share that base"
    if isinstance(init, str) and init.lower() not in LEAVE_THE_BASE:
        raise ValueError(
            f"{whose} has init_lora_weights={init!r}, which is not known to leave the base's weights as they are, as "
            f"the default and {', '.join(LEAVE_THE_BASE)} do. {shared}: choose one of these; save a trained adapter of "
            "that kind as plain LoRA (path_initial_model_for_weight_conversion)."
        )
    if bias != "none":
        raise ValueError(
            f"{whose} has bias={bias!r}, which trains biases of the base itself. {shared}, and an adapter that is "
            "switched off would leave them changed: use bias='none'."
        )
    for option, reason in REFUSED.items():
        if getattr(config, option, None) is not None:
            raise ValueError(f"{whose} has {option}, {reason}. {shared}: leave the option out.")


def mount(policy: PeftModel, name: str, directory: Path, *, trained: bool = False) -> nn.Linear:
    """Load the adapter of a reward model onto a base, next to the adapters it has.

    Args:
        policy: the base with its adapters.
        name: what the adapter is called here.
        directory: an adapter of `AutoModelForSequenceClassification` with one label, as `RewardTrainer` saves it, or
            one of a causal language model beside its value head, as LLaMA-Factory saves it.
        trained: whether its weights are trained.

    Returns:
        the score head, a frozen linear layer from H to 1.
    """
    check_reward_adapter(directory, policy.config.get_text_config().hidden_size)
    check_base_weights(directory, sample_model(policy), policy.config._name_or_path)
    weights, config = weights_for(policy, directory), PeftConfig.from_pretrained(str(directory))
    head = pop_score_head(weights, directory)
    trained_whole = [module for module in config.modules_to_save or [] if module not in HEADS]
    config.modules_to_save, config.inference_mode, config.task_type = trained_whole or None, not trained, "CAUSAL_LM"
    with same_requires_grad(policy):
        policy.add_adapter(name, config)
        use_plain_lora(policy)
        use_own_tokens(policy)
        load_adapter(policy, name, weights, directory, "It was trained on another architecture.")
    set_trained(policy, name, trained)
    return head


def use_own_tokens(policy: PeftModel) -> None:
    """Let adapters that train single tokens stand beside others.

    PEFT (0.21) looks for the tokens of every adapter that it saves or loads, and fails where that one trains none.
    """
    for wrapper in policy.modules():
        if isinstance(wrapper, TrainableTokensWrapper):
            for method in ("adapter_state_dict", "adapter_state_dict_load_map"):
                vars(wrapper)[method] = partial(_of_own_tokens, wrapper, method)


def _of_own_tokens(wrapper: Any, method: str, adapter: str, *args: Any) -> dict:
    own = adapter in wrapper.token_adapter.trainable_tokens_delta
    return getattr(type(wrapper), method)(wrapper, adapter, *args) if own else {}


def load_adapter(policy: PeftModel, name: str, weights: dict[str, Tensor], directory: Path, fix: str) -> None:
    """Put weights into an adapter; nothing missing, nothing left over, and nothing into the base below it."""
    check_leaves_the_base(policy, name, weights, directory)
    with fitting(f"The adapter in {directory}", fix):
        result = set_peft_model_state_dict(policy, weights, adapter_name=name)
    check_complete(policy, name, weights, result.unexpected_keys, directory, fix)


def check_complete(
    policy: PeftModel, name: str, weights: dict[str, Tensor], unexpected: Collection[str], directory: Path, fix: str
) -> None:
    """Refuse an adapter that lacks tensors, or has some that found no place."""
    # Of what would be saved: some kinds derive further tensors, which PEFT would name as missing.
    absent = sorted(get_peft_model_state_dict(policy, adapter_name=name).keys() - weights.keys())
    if absent or unexpected:
        raise ValueError(
            f"The adapter in {directory} does not fit this model: missing {absent[:3]}, unexpected "
            f"{sorted(unexpected)[:3]}. {fix}"
        )


def check_leaves_the_base(policy: PeftModel, name: str, weights: dict[str, Tensor], directory: Path) -> None:
    """Refuse weights of the base among those of an adapter (PEFT saves embeddings that were resized) unless equal."""
    here = policy.state_dict()
    for key, tensor in weights.items():
        own = None if belongs_to(key, name) else here.get(key)
        if own is not None and (own.shape != tensor.shape or not torch.equal(own.cpu(), tensor.to(own.dtype).cpu())):
            raise ValueError(
                f"The adapter in {directory} brings other weights than this base has at {key}, and every role shares "
                "the base. Train it on this base, with save_embedding_layer=False where only PEFT saved them."
            )


def check_reward_adapter(directory: Path, hidden_size: int) -> None:
    """Refuse an adapter that is no reward model of this base; reads no more than its configuration and a header."""
    file = weights_file(directory)
    check_own_weights(PeftConfig.from_pretrained(str(directory)), f"The adapter in {directory}")
    shapes = score_head_shapes(directory, file)
    if shapes not in ({"weight": (1, hidden_size)}, {"weight": (1, hidden_size), "bias": (1,)}):
        other = find_other_heads(file)
        raise ValueError(
            f"{directory} is not a reward adapter for this base: its score head has shape {[*shapes.values()]}, "
            f"expected one of (1, {hidden_size})"
            + (f"; it has {other[0]}, which is no head 'score' on the last token's hidden state" if other else "")
            + ". Train it on the same base, with num_labels=1 and modules_to_save=['score']; a causal adapter is a "
            "reward model where v_head.summary.weight lies beside it, in value_head.safetensors."
        )


def check_trained_tokens(directory: Path, num_embeddings: int) -> None:
    """Refuse an adapter that trains the embedding of a token that its base does not have."""
    indices = getattr(PeftConfig.from_pretrained(str(directory)), "trainable_token_indices", None) or []
    by_module = indices.values() if isinstance(indices, dict) else [indices]
    largest = max((index for tokens in by_module for index in tokens), default=-1)
    if largest >= num_embeddings:
        raise ValueError(
            f"The adapter in {directory} trains the embedding of token {largest}, but the actor's base has "
            f"embeddings for {num_embeddings} tokens: tokens were added to the base before it was trained. Save that "
            "base with its tokens (resize_token_embeddings, save_pretrained), and train reward model and actor on it."
        )


def check_base_weights(directory: Path, samples: Samples, base: str) -> bool:
    """Refuse a reward adapter that was trained on a base of other weights.

    Args:
        directory: of the adapter.
        samples: of the weights of the actor's base; empty where they are not known yet.
        base: name of the actor's base.

    Returns:
        whether both bases are known, so that they are the same; False where weights tell nothing.
    """
    different = are_different(base_samples(directory), samples)
    if different:
        raise ValueError(
            f"The reward adapter in {directory} was trained on {trained_on(directory)!r}, the actor's base is "
            f"{base!r}, whose weights are others: its numbers mean nothing there. Train one on the actor's base."
        )
    return different is not None


def base_samples(directory: Path) -> Samples:
    """Samples of the base that an adapter was trained on: those written beside it, or of that base's local files."""
    described = reward_description(directory).get("base_weights")
    if described:
        return decode_samples(described)
    return sample_files(local_base(directory))


def trained_on(directory: Path) -> str:
    """The name of the base that an adapter was trained on; empty where the adapter does not say."""
    config = PeftConfig.from_pretrained(str(directory))
    return cast(str, reward_description(directory).get("base_model") or config.base_model_name_or_path or "")


def local_base(directory: Path) -> Path | None:
    """The folder of the base that an adapter was trained on, if that base is on this machine."""
    return local_folder(trained_on(directory), PeftConfig.from_pretrained(str(directory)).revision)


def weights_file(directory: Path) -> Path:
    """The file of an adapter's tensors; PEFT would look for a missing one on the Hub."""
    file = directory / WEIGHTS_FILE
    if not file.is_file():
        raise ValueError(f"{directory} has no {file.name}: it holds no adapter, or was not finished.")
    return file


def adapter_weights(directory: Path, names: dict[str, str] | None = None) -> dict[str, Tensor]:
    """The tensors of an adapter on disk, renamed as `key_mapping` of PEFT says."""
    with readable(weights_file(directory)):
        return load_peft_weights(str(directory), device="cpu", key_mapping=names)


def weights_for(model: nn.Module, directory: Path) -> dict[str, Tensor]:
    """The tensors of an adapter on disk under the names that they have in this model, without those that do nothing.

    An adapter of all linear layers of a multimodal model has some in its tower, which text alone does not train.
    """
    names = names_for(model, directory)
    weights = adapter_weights(directory, names)
    if names != TEXT_ONLY:
        return weights
    modules = {PREFIX + name for name in names_of_modules(model)}
    learned_nothing = {key.partition(".lora_")[0] for key, b in weights.items() if ".lora_B." in key and not b.any()}
    idle = learned_nothing - modules
    return {key: tensor for key, tensor in weights.items() if key.partition(".lora_")[0] not in idle}


def names_for(model: nn.Module, directory: Path) -> dict[str, str] | None:
    """How to rename the tensors of an adapter that was trained on this language model within a multimodal one, or out
    of it; None where names are the same.

    Of Qwen3.5, `AutoModelForCausalLM` makes the language model, `AutoModelForSequenceClassification` the whole.
    """
    whole = "model.language_model" in names_of_modules(model)
    with readable(weights_file(directory)), safe_open(weights_file(directory), framework="pt") as tensors:
        theirs = any(key.startswith(f"{PREFIX}model.language_model.") for key in tensors.keys())  # noqa: SIM118
    return None if whole == theirs else WHOLE if whole else TEXT_ONLY


def names_of_modules(model: nn.Module) -> set[str]:
    """As the base calls them, with adapters or without."""
    return {name for name, _ in (model.get_base_model() if isinstance(model, PeftModel) else model).named_modules()}


@contextlib.contextmanager
def fitting(what: str, fix: str) -> Iterator[None]:
    """Say in one sentence that tensors have other names or shapes than the model's."""
    try:
        yield
    except RuntimeError as error:
        first = next((line.strip() for line in str(error).splitlines()[1:]), str(error))
        raise ValueError(f"{what} does not fit this model ({first[:200]}). {fix}") from error

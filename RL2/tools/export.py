"""Export of a checkpoint as a folder for `from_pretrained`: a policy, its adapters, or a reward model."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from safetensors import SafetensorError

from RL2.config.model import Lora
from RL2.config.values import build
from RL2.data.template import change_template
from RL2.errors import ConfigError, first_line, naming
from RL2.io import durable
from RL2.io.checkpoint import NOTES, damage, load_weights, models, stored_weights
from RL2.models.loading import is_quantised
from RL2.models.lora import add_adapters, is_adapter
from RL2.models.policy import Policy, export_adapter, load_tokenizer
from RL2.models.policy import export as write_model
from RL2.models.value import ValueModel, mark_padding

KEY = "--model"


def export(checkpoint: Path, out: Path, model_name: str, *, adapter: bool) -> None:
    """Write the folder `out` completely, or not at all.

    `model_name` is the model that the run began with; "" takes it from the checkpoint and its config.yaml. `adapter`
    exports only the adapters of a LoRA run, for peft. Raise ConfigError if the checkpoint is missing, damaged or of
    another model, or if the disk is full.
    """
    if not (checkpoint / NOTES).is_file():
        raise ConfigError(f"{checkpoint} is not a checkpoint (it has no {NOTES}); checkpoints are named step_NNNNNN")
    if out.exists():
        raise ConfigError(f"{out} exists; choose a new folder")
    if why := damage(checkpoint):
        raise ConfigError(f"{checkpoint} is damaged: {why}; export another checkpoint")
    names = stored_weights(checkpoint)
    group = "critic" if "lm.score.weight" in names else "actor"
    has_adapters = any(map(is_adapter, names))
    if adapter and not has_adapters:
        raise ConfigError(f"{checkpoint} has no adapters: its run trained all weights; omit --adapter")
    began = _began_with(checkpoint, group, is_given=bool(model_name), has_adapters=has_adapters)
    model_name = model_name or began["model_name"]

    with naming(KEY):
        tokenizer = load_tokenizer(model_name)
        change_template(tokenizer, began["chat_template"], began["chat_template_kwargs"] or {}, group)
        kind = ValueModel if group == "critic" else Policy
        lm = kind.build(model_name, dequantize=is_quantised(model_name))
        if has_adapters:
            add_adapters(lm, build(Lora, began["lora"], "actor.lora"), torch.float32, model_name, "actor")
        model = kind(lm)
        model.fill(model_name, torch.device("cpu"))
    load_weights(checkpoint, model)
    if group == "critic":
        mark_padding(lm, tokenizer)

    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        if adapter:
            export_adapter(lm, partial, write=True)
            tokenizer.save_pretrained(partial)
        else:
            write_model(lm, tokenizer, partial, write=True)
        durable.replace_folder(partial, out)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise ConfigError(f"{out} could not be written: {first_line(error)}; it was removed") from error


def _began_with(checkpoint: Path, group: str, *, is_given: bool, has_adapters: bool) -> dict[str, Any]:
    """Return what the run began with: model and adapters from the checkpoint, the rest from its config.yaml.

    Raise ConfigError if they contradict each other, unless the model `is_given`, or if neither names the model.
    """
    config = checkpoint.parent / "config.yaml"
    settings: Any = OmegaConf.to_container(OmegaConf.load(config)) if config.is_file() else {}
    configured = settings.get(group, {})
    noted = {key.removeprefix(f"{group}."): value for key, value in models(checkpoint).items()}
    adapters = {key.removeprefix("lora."): value for key, value in noted.items() if key.startswith("lora.")}
    name = noted.get("model_name", configured.get("model_name"))
    lora = configured.get("lora", {"save": "merged"}) | adapters
    if (name is None and not is_given) or (has_adapters and "rank" not in lora):
        raise ConfigError(f"{config} is missing; pass {KEY} with the model that the run began with")
    if configured and not is_given and (configured["model_name"], configured.get("lora", lora)) != (name, lora):
        raise ConfigError(
            f"{checkpoint} began with {name}, {config} has {configured['model_name']}, or they differ in {group}.lora: "
            f"the file belongs to another run; pass {KEY} with the model that it began with"
        )
    template = {key: configured.get(key) for key in ("chat_template", "chat_template_kwargs")}
    return {"model_name": name, "lora": lora, **template}

"""Policy: a causal language model that returns token statistics instead of logits."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from RL2.config.model import TrainableChat
from RL2.data.template import Template, change_template
from RL2.errors import ModelError, first_line, naming
from RL2.models.conversion import own_name, stored_layout, weight_shapes
from RL2.models.inspection import length_limit, logit_transform, stored_buffers
from RL2.models.loading import build, configuration, empty, folder_here, materialise, refuse_no_model
from RL2.models.lora import ADAPTER, adapted_weights, adapter_config, is_adapter, merge, merged_name
from RL2.models.multimodal import multimodal
from RL2.models.other_parts import other_parts
from RL2.models.packed import PackedModel, backbone
from RL2.ops.attention import is_packed
from RL2.ops.one_pass import Expected
from RL2.ops.teacher_stats import Teacher, teacher_stats
from RL2.ops.tiles import VocabularyShard
from RL2.ops.token_stats import token_stats
from RL2.parallel.fsdp import local, whole
from RL2.parallel.tp import first_row, whole_rows
from RL2.types import SharedPrefix, StatsRequest, TokenBatch

HIDDEN = StatsRequest(("hidden",))
"""Request for the last hidden states of the action tokens, [A, D], which a teacher's head reads."""


class Policy(PackedModel):
    """Model that returns statistics of the action tokens. Logits never leave `token_stats`."""

    CHECKED = StatsRequest(("logp",))

    def __init__(
        self, lm: PreTrainedModel, sp: dist.ProcessGroup | None = None, tp: dist.ProcessGroup | None = None
    ) -> None:
        super().__init__(lm, sp, tp)
        self.logit_transform = logit_transform(lm)

    @staticmethod
    def build(model_name: str, dequantize: bool = False) -> PreTrainedModel:
        return build(AutoModelForCausalLM, model_name, dequantize)

    def stats_of(
        self,
        hidden_ND: Tensor,
        labels_N: Tensor,
        request: StatsRequest,
        teacher: Teacher | None = None,
        expected: Expected | None = None,
    ) -> dict[str, Tensor]:
        if request == HIDDEN:
            return {"hidden": hidden_ND}
        hidden_ND, weight_VD = self._with_bias(hidden_ND)
        how: dict[str, Any] = {
            "temperature": request.temperature,
            "transform": self.logit_transform,
            "fields": request.fields,
            "top_k": request.top_k,
            "tp": self._shard(),
            "budget_mib": request.budget_mib,
        }
        if teacher is None:
            stats = token_stats(hidden_ND, weight_VD, labels_N, expected=expected, **how)
        else:
            stats = teacher_stats(hidden_ND, weight_VD, labels_N, teacher, beta=request.beta, expected=expected, **how)
        return {name: getattr(stats, name) for name in request.fields}

    @torch.no_grad()
    def teach(
        self, batch: TokenBatch, shared: SharedPrefix | None, temperature: float, student: PreTrainedModel
    ) -> Teacher:
        """Return the hidden states of the actions of `batch`, [A, E], and the head, as a teacher of `student`.

        The head has the rows of this process's shard of the student's vocabulary. FSDP must not free it before the
        backward pass of the student (collective under tensor parallelism if the vocabularies have different sizes).
        """
        hidden_AE, weight_VE = self._with_bias(self(batch, shared, HIDDEN)["hidden"])
        total, wanted = self.lm.config.vocab_size, student.config.vocab_size
        if self.tp is not None and total != wanted:
            start, end = first_row(wanted, self.tp), first_row(wanted, self.tp, after=1)
            weight_VE = whole_rows(weight_VE, total, self.tp)[start:end]
        return Teacher(hidden_AE, weight_VE, temperature, self.logit_transform, total)

    def _with_bias(self, hidden_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Return hidden states and head, with the head's bias, if any, as one more column."""
        weight_VD, bias_V = local(head(self.lm).weight), head(self.lm).bias
        if bias_V is None:
            return hidden_ND, weight_VD
        weight_VD = torch.cat([weight_VD, local(bias_V)[:, None]], 1)
        return torch.cat([hidden_ND, torch.ones_like(hidden_ND[:, :1])], 1), weight_VD

    def _shard(self) -> VocabularyShard | None:
        total = self.lm.config.vocab_size
        return None if self.tp is None else VocabularyShard(self.tp, first_row(total, self.tp), total)

    def stats_alone(self, batch: TokenBatch) -> dict[str, Tensor]:
        ids = batch.token_ids_T[None]
        if self.tp is not None:  # the head is sharded, which only token_stats handles
            hidden_TD = backbone(self.lm)(input_ids=ids, use_cache=False).last_hidden_state[0]
            return self.stats_of(hidden_TD, batch.labels_T, self.CHECKED)
        whole = multimodal(self.lm)  # the model whose numbers count
        lm = self.lm if whole is None else whole.around(self.lm)
        logits_TV = lm(input_ids=ids, use_cache=False).logits[0].float()
        return {"logp": logits_TV.log_softmax(-1).gather(-1, batch.labels_T[:, None])[:, 0]}


def head(lm: PreTrainedModel) -> nn.Linear:
    """Return the linear layer from hidden states to logits."""
    return lm.get_output_embeddings()


def load_model(model_name: str, dtype: torch.dtype, dequantize: bool = False) -> PreTrainedModel:
    """Load the whole causal LM of a hub name or folder in `dtype`, packed or with its own forward as in training."""
    lm = Policy.load(model_name, dequantize=dequantize).lm
    for parameter in lm.parameters():  # the rotary frequencies stay float32
        parameter.data = parameter.data.to(dtype)
    return lm


def empty_model(like: PreTrainedModel, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """Return a model of the same shape with uninitialised weights on `device`."""
    lm = empty(AutoModelForCausalLM, like.config, dtype, is_packed(like))
    materialise(lm, lm, device)
    return lm.eval().requires_grad_(False)


def configured_tokenizer(config: TrainableChat, group: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a configured model, with its chat template.

    `group` is the prefix of its configuration keys. Raise ConfigError if one of the settings is invalid.
    """
    with naming(f"{group}.model_name"):
        tokenizer = load_tokenizer(config.model_name)
    change_template(tokenizer, config.chat_template, config.chat_template_kwargs, group)
    return tokenizer


def load_tokenizer(model_name: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a hub name or folder. Raise ModelError if it cannot be read."""
    refuse_no_model(model_name)
    configuration(model_name)  # the tokenizer is looked up by it; the error then names the damaged file
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_name)
    except Exception as error:  # transformers raises a type of its own for each kind of damage
        raise ModelError(f"{model_name}: its tokenizer cannot be read: {first_line(error)}") from error
    if not tokenizer.encode("a 1", add_special_tokens=False):  # the result if only a configuration exists
        raise ModelError(f"{model_name} has no tokenizer: it has no tokenizer.json")
    return tokenizer


def refuse_unknown_tokens(lm: PreTrainedModel, token_ids: Iterable[int]) -> None:
    """Raise ModelError if `token_ids` contains an id that the model does not have."""
    if (largest := max(token_ids, default=0)) >= lm.config.vocab_size:
        raise ModelError(
            f"{lm.name_or_path}: its tokenizer produces token {largest} from the data, but the model has "
            f"{lm.config.vocab_size}; the tokenizer belongs to another model, or the model was not resized for it"
        )


def max_length(model_name: str) -> int:
    """Return the maximum length of a sequence in tokens, as `positions`; only the configuration is read."""
    return positions(configuration(model_name))


def rotary_limit(model_name: str) -> int | None:
    """Return `length_limit` of a model if its configuration is on this machine, else None."""
    return None if folder_here(model_name) is None else length_limit(configuration(model_name))


def positions(config: PretrainedConfig) -> int:
    """Return the maximum length of a sequence in tokens; some models set no limit.

    If the rotary frequencies depend on the longest sequence of a batch, it is the length up to which they do not.
    """
    return length_limit(config) or getattr(config, "max_position_embeddings", None) or 2**31


def end_tokens(
    lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, template: Template | None = None
) -> tuple[int, ...]:
    """Return the ids that end a response: the tokenizer's, the chat template's and the generation configuration's.

    `template` is the tokenizer's, if it has been analysed before.
    """
    ids = {tokenizer.eos_token_id, *(template or Template(tokenizer)).end_ids}
    generation = lm.generation_config.eos_token_id if lm.generation_config is not None else None
    ids |= set(generation) if isinstance(generation, list) else {generation}
    return tuple(sorted(i for i in ids if i is not None))


def stop_tokens(
    lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, template: Template | None = None
) -> tuple[int, ...]:
    """Return `end_tokens` for sampling. Raise ModelError if the model lacks one, since it could never sample it."""
    found = end_tokens(lm, tokenizer, template)
    if found and found[-1] >= lm.config.vocab_size:
        raise ModelError(
            f"{lm.name_or_path}: its responses end with token {found[-1]}, but the model has "
            f"{lm.config.vocab_size}; the tokenizer belongs to another model, or the model was not resized for it"
        )
    return found


def named_weights(
    lm: PreTrainedModel, dtype: torch.dtype | None = None, merged: bool = True
) -> Iterator[tuple[str, Tensor]]:
    """Yield each tensor of a checkpoint with its transformers name, whole, one at a time; tied tensors once.

    Parameters are converted to `dtype`, if given, with adapters merged into their weights. Without `merged`, these
    weights are those of the base, in its own type. Stored buffers, such as a router's bias, follow unchanged.
    Collective under sharding: parameters are rounded before they are gathered, which halves the traffic in half
    precision.
    """
    layers = adapted_weights(lm)
    for wrapped_name, parameter in lm.named_parameters():
        name, weight = merged_name(wrapped_name), parameter.detach()
        if is_adapter(name):
            continue
        if name == wrapped_name:
            yield name, whole(weight.to(dtype or weight.dtype))
        elif not merged:
            yield name, whole(weight)
        else:  # a wrapped weight is merged before it is rounded
            weight = merge(layers[name], whole(weight)) if name in layers else whole(weight)
            yield name, weight.to(dtype or weight.dtype)
    yield from stored_buffers(lm).items()  # whole on every process, in the type of the checkpoint


def export(
    lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, write: bool, file_bytes: int = 4 * 2**30
) -> None:
    """Write a folder that transformers loads (collective), on each process with `write`.

    Files of at most `file_bytes` are written as soon as they are full, so host memory never holds the whole model.
    Tensors are stored as in the checkpoints that transformers converts, for example each expert on its own. The text
    model of a multimodal checkpoint is stored under the checkpoint's names, beside its other parts as they are.
    """
    parts = other_parts(lm)
    layout = (stored_layout(lm) or own_name) if parts is None else parts.layout(lm)
    stored = {name: x for pair in weight_shapes(lm).items() for name, x in layout(*pair).items()}
    stored |= {} if parts is None else parts.shapes
    files = split_torch_state_dict_into_shards(
        stored, filename_pattern="model{suffix}.safetensors", max_shard_size=file_bytes
    )
    if write:
        folder.mkdir(parents=True, exist_ok=True)
        _save_configuration(lm, tokenizer, folder)
        if parts is not None:
            parts.copy_files(folder)
        if files.is_sharded:
            index = {"metadata": files.metadata, "weight_map": files.tensor_to_filename}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    begun: dict[str, dict[str, Tensor]] = defaultdict(dict)
    trained = (pair for one in named_weights(lm, torch.float32) for pair in layout(*one).items())
    for name, weight in chain(trained, parts.tensors() if write and parts is not None else ()):
        if write:
            file = files.tensor_to_filename[name]
            begun[file][name] = weight.cpu().contiguous()
            if len(begun[file]) == len(files.filename_to_tensors[file]):
                save_file(begun.pop(file), folder / file, metadata={"format": "pt"})


def export_adapter(lm: PreTrainedModel, folder: Path, write: bool) -> None:
    """Write a folder that `peft.PeftModel.from_pretrained` loads (collective); only a process with `write` writes.

    It fits on the whole model if `lm` is the text of a multimodal one.
    """
    multi = multimodal(lm)
    weights = {}
    for name, parameter in lm.named_parameters():
        if is_adapter(name):
            weight = whole(parameter.detach())
            name = name if multi is None else multi.whole_name(name)
            weights[f"base_model.model.{name.replace(f'.{ADAPTER}.', '.')}"] = weight.cpu().contiguous()
    if write:
        folder.mkdir(parents=True, exist_ok=True)
        loaded_by, whole_name = (lm, None) if multi is None else (multi.model, multi.whole_name)
        adapter_config(lm, loaded_by, whole_name).save_pretrained(folder)
        save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def _save_configuration(lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    lm.config.architectures = [type(lm).__name__]
    lm.config.save_pretrained(folder)
    if lm.generation_config is not None:
        if ends := end_tokens(lm, tokenizer):  # programs that sample from the export stop where training did
            lm.generation_config.eos_token_id = list(ends) if len(ends) > 1 else ends[0]
        lm.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)

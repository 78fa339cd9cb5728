"""Parts of a multimodal checkpoint that are not trained: copied from its files into an export, byte for byte.

Quantised tensors are the exception: the export has no quantisation, so they become value * scale in float32.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME
from transformers.utils.hub import CHAT_TEMPLATE_FILE, LEGACY_PROCESSOR_CHAT_TEMPLATE_FILE

from RL2.models.conversion import StoredLayout, own_name, stored_layout, weight_shapes
from RL2.models.loading import PROCESSOR_FILES, tensors_for, weights_folder
from RL2.models.multimodal import Multimodal, multimodal
from RL2.models.stored import TORCH_DTYPES, Stored, read_value


@dataclass(frozen=True)
class OtherParts:
    """Tensors and files of a multimodal checkpoint beside those of its text model."""

    whole: Multimodal
    folder: Path
    """Folder of the checkpoint."""
    text: dict[str, str]
    """Name in a checkpoint of the text model alone -> its name in this one."""
    stored: dict[str, Stored]
    """Tensors that are copied."""

    @property
    def shapes(self) -> dict[str, Tensor]:
        """The tensors on the meta device."""
        return {
            name: torch.empty(
                each.shape, dtype=TORCH_DTYPES[each.dtype if each.scale is None else "F32"], device="meta"
            )
            for name, each in self.stored.items()
        }

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors, one at a time."""
        for name, each in self.stored.items():
            yield name, read_value(name, each)

    def layout(self, lm: PreTrainedModel) -> StoredLayout:
        """Return the layout of this checkpoint, for the parameters of its text model.

        A checkpoint has fused experts or each on its own. If it has neither, names are those of the multimodal class.
        """
        alone = stored_layout(lm) or own_name
        split = {name for pair in weight_shapes(lm).items() for name in alone(*pair)}

        def by_names(name: str, value: Tensor) -> dict[str, Tensor]:
            found = alone(name, value) if split <= self.text.keys() else {name: value}
            return {self.text.get(each) or self.whole.whole_name(each): x for each, x in found.items()}

        return by_names

    def copy_files(self, folder: Path) -> None:
        """Copy the configuration, with float32 as the type of the weights, and the files of processors to `folder`."""
        config = json.loads((self.folder / CONFIG_NAME).read_text())
        config.pop("torch_dtype", None)
        for part in (config, config.get("text_config") or {}):
            part.pop("quantization_config", None)
        (folder / CONFIG_NAME).write_text(json.dumps({**config, "dtype": "float32"}, indent=2) + "\n")
        for file in (file for pattern in PROCESSOR_FILES for file in self.folder.glob(pattern)):
            # a processor would prefer the former file of the template to the one that the tokenizer has just written
            if file.name != LEGACY_PROCESSOR_CHAT_TEMPLATE_FILE or not (folder / CHAT_TEMPLATE_FILE).exists():
                shutil.copyfile(file, folder / file.name)


def other_parts(lm: PreTrainedModel) -> OtherParts | None:
    """Return the parts that an export of `lm` has beside it; None for a text-only export.

    A value model is exported alone: no multimodal class has its head.
    """
    whole = multimodal(lm) if lm.get_output_embeddings() is not None else None
    if whole is None:
        return None
    name = str(lm.name_or_path)
    folder = weights_folder(name, PROCESSOR_FILES)
    stored = tensors_for(lm, folder, name)
    text, others = whole.split(stored)
    return OtherParts(whole, folder, text, {name: stored[name] for name in others})

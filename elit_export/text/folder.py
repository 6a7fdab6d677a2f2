"""The configuration of a text encoder in a user's folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elit_export.bundle.readers import check_folder, read_json_object
from elit_export.checkpoints.hf_folder import CONFIG, check_numbers, part_folder, shards_of
from elit_export.errors import CheckpointError, InputError
from elit_export.spec import ModelSpec
from elit_export.spec.limits import BLOCKS, HEADS, VOCABULARY, WIDTH

# Of a configuration, as transformers calls them.
NUMBER_LIMITS = {
    **dict.fromkeys(("num_hidden_layers", "depth"), BLOCKS),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "num_heads"), HEADS),
    **dict.fromkeys(("hidden_size", "intermediate_size", "head_dim", "out_hidden_size"), WIDTH),
    "vocab_size": VOCABULARY,
}
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLED = (".bin", ".pt", ".pth", ".ckpt")
ENCODER_PART = "text_encoder"  # the folder of the encoder in a whole pipeline
TOKENIZER_PART = "tokenizer"
REMEDY = f"give a folder with {ENCODER_PART}/ and {TOKENIZER_PART}/, as diffusers saves a pipeline"
TOKENIZER_FILES = (("tokenizer.json",), ("vocab.json", "merges.txt"))  # one of these sets


@dataclass(frozen=True)
class Kind:
    """One class of encoder, and the prompt template of the pipeline it belongs to.

    `renamed` maps the published names of weights to those of the text part; `unneeded` are prefixes of the other
    weights. A prompt stands between `before`, whose hidden states are not given to the model, and `after`.
    """

    class_name: str
    model_type: str
    config_class: str
    text_class: str  # of the text part, in transformers
    renamed: Mapping[str, str]
    unneeded: tuple[str, ...]
    before: str
    after: str
    marks: tuple[str, ...]  # one token each


# The pipeline of its text-to-image model drops the first 34 tokens, which stand before the prompt.
QWEN = Kind(
    class_name="Qwen2_5_VLForConditionalGeneration",
    model_type="qwen2_5_vl",
    config_class="Qwen2_5_VLConfig",
    text_class="Qwen2_5_VLTextModel",
    renamed={r"^model\.visual\.": "visual.", r"^model\.(language_model\.)?": ""},
    unneeded=("visual.", "lm_head."),
    before=(
        "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, "
        "spatial relationships of the objects and background:<|im_end|>\n<|im_start|>user\n"
    ),
    after="<|im_end|>\n<|im_start|>assistant\n",
    marks=("<|im_start|>", "<|im_end|>"),
)
KINDS = {kind.class_name: kind for kind in (QWEN,)}


@dataclass(frozen=True)
class EncoderFolder:
    """An encoder whose configuration was read; its weights are still on disk."""

    path: Path
    tokenizer: Path
    kind: Kind
    width: int

    def check_fits(self, spec: ModelSpec) -> None:
        """Raise InputError if a model takes text of another width."""
        if self.width != spec.text_width:
            raise InputError(
                f"{self.path}: embeds text in {self.width} numbers a token, the model takes {spec.text_width}",
                "give the encoder that the model was trained with",
            )


def read_encoder(folder: str | Path) -> EncoderFolder:
    """Read the folder of a pipeline, of its encoder, or of encoder and tokenizer; raises CheckpointError.

    The tokenizer of an encoder lies in the same folder or in `tokenizer` beside it.
    """
    path = part_folder(Path(folder), ENCODER_PART, "text encoder", REMEDY)
    config = read_json_object(path / CONFIG)
    check_numbers(path / CONFIG, config, NUMBER_LIMITS)
    kind = _kind(path, config)
    width = _width(path, config)
    _check_weights(path, kind)
    return EncoderFolder(path, _tokenizer_path(path), kind, width)


def _kind(path: Path, config: Mapping[str, Any]) -> Kind:
    """Identify the encoder by `architectures` or, where that is missing, by `model_type`."""
    architectures = config.get("architectures")
    name = architectures[0] if isinstance(architectures, list) and len(architectures) == 1 else architectures
    if architectures is None:
        name = next((kind.class_name for kind in KINDS.values() if kind.model_type == config.get("model_type")), None)
    if not isinstance(name, str) or name not in KINDS:
        shown = name if architectures is not None else config.get("model_type")
        raise CheckpointError(
            f"{path}: its class is {shown!r}; known: {', '.join(KINDS)}",
            "for another encoder give its embeddings: elit-export sample BUNDLE --prompts FILE.npz",
        )
    return KINDS[name]


def _width(path: Path, config: Mapping[str, Any]) -> int:
    """Return the width of the text part, which older configurations do not keep apart."""
    part = config.get("text_config", config)
    width = part.get("hidden_size") if isinstance(part, dict) else None
    if isinstance(width, bool) or not isinstance(width, int) or width < 1:
        raise CheckpointError(f"{path / CONFIG}: hidden_size is {width!r}, must be a whole number of at least 1")
    return width


def _check_weights(path: Path, kind: Kind) -> None:
    if (path / WEIGHTS).is_file():
        return
    if (path / INDEX).is_file():
        shards_of(path / INDEX)
        return
    others = sorted(file.name for file in path.iterdir() if file.suffix in (".safetensors", *PICKLED))
    remedy = f"save it again with transformers: {kind.class_name}.from_pretrained(…).save_pretrained(FOLDER)"
    if any(name.endswith(PICKLED) for name in others):
        remedy = f"{remedy}; pickled weights are not read, as they can run any code"
    has = f" (it has {', '.join(others)})" if others else ""
    raise CheckpointError(f"{path}: no weights, {WEIGHTS} is missing{has}", remedy)


def _tokenizer_path(encoder: Path) -> Path:
    places = (encoder, encoder.resolve().parent / TOKENIZER_PART)
    for path in places:
        if any(all((path / name).is_file() for name in names) for names in TOKENIZER_FILES):
            check_folder(path, what="the tokenizer", error=CheckpointError)
            return path
    expected = " or ".join(" and ".join(names) for names in TOKENIZER_FILES)
    raise CheckpointError(
        f"no tokenizer for {encoder}: neither it nor {places[1]} has {expected}",
        f"copy `{TOKENIZER_PART}` of the pipeline beside it",
    )

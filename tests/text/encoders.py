"""Small random text encoders and their tokenizers, made and saved by transformers itself."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer
from transformers.utils import logging

from tests.helpers import tensor_by_name

WIDTH = 24  # as `tests.text_models.text_spec` takes text
VOCABULARY = 520
# What diffusers tells Qwen-Image's encoder of a prompt, and the tokens it leaves out.
TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
DROPPED = 34
AFTER = 5  # tokens behind the prompt


@cache
def tokenizer() -> Qwen2Tokenizer:
    """Bytes, and the words of the template as one token each, as in the real one."""
    learner = Tokenizer.from_str(Qwen2Tokenizer()._tokenizer.to_str())
    learner.model = models.BPE()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = TEMPLATE.replace("<|im_start|>", "\n\n").replace("<|im_end|>", "\n")
    trainer = trainers.BpeTrainer(vocab_size=500, min_frequency=1, show_progress=False, initial_alphabet=alphabet)
    learner.train_from_iterator([words], trainer)
    learned = json.loads(learner.to_str())["model"]
    pairs = [tuple(pair) for pair in learned["merges"]]
    marks = ["<|im_start|>", "<|im_end|>"]
    return Qwen2Tokenizer(vocab=learned["vocab"], merges=pairs, extra_special_tokens=marks)


def encoder(**changes: Any) -> Any:
    """Two layers, a vision tower of one, nothing zero in it."""
    facts: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 2, 2]},
    }
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": WIDTH}
    config = Qwen2_5_VLConfig(text_config=facts | changes, vision_config=vision | {"fullatt_block_indexes": [0]})
    model = Qwen2_5_VLForConditionalGeneration(config)
    for name, tensor in model.state_dict().items():
        values = torch.from_numpy(tensor_by_name(name, tuple(tensor.shape), 9))
        tensor.copy_(1 + values if name.endswith("norm.weight") else values)
    return model.eval()


def save_encoder(folder: Path, **changes: Any) -> Path:
    """The two parts of a pipeline's folder that embed text."""
    logging.disable_progress_bar()
    encoder(**changes).save_pretrained(folder / "text_encoder")
    tokenizer().save_pretrained(folder / "tokenizer")
    return folder


def by_hand(model: Any, prompts: list[str]) -> list[np.ndarray]:
    """Embeddings of a padded batch by the whole model, one (L, W) for each prompt."""
    batch = tokenizer()([TEMPLATE.format(prompt) for prompt in prompts], padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**batch, output_hidden_states=True).hidden_states[-1]
    rows = zip(hidden, batch.attention_mask.bool(), strict=True)
    return [values[mask][DROPPED:].numpy() for values, mask in rows]

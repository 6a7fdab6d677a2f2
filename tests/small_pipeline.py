"""A small random pipeline of Qwen-Image's classes, a file of Read and Write, and a recipe: to try the commands on.

    python -m tests.small_pipeline FOLDER

writes FOLDER/pipeline (transformer in bf16, VAE, text encoder, tokenizer), FOLDER/interface.safetensors and
FOLDER/recipe.toml.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from elit_export.checkpoints.diffusers import save_interface
from tests.checkpoints.test_diffusers import written_base
from tests.text.encoders import save_encoder
from tests.text_models import text_model
from tests.vae import LATENTS, save_vae

CHANNELS = 8
RECIPE = """
name = "small"
checkpoint = "pipeline"
interface = "interface.safetensors"
rows = { min = 1, opt = 2, max = 4 }
text = { min = 1, opt = 16, max = 256 }

[decoder]
folder = "pipeline"

[targets.cpu]
backend = "onnxruntime"
device = "cpu"
precision = "fp32"
threads = 1
"""


def save_pipeline(folder: Path) -> Path:
    """Write it all into `folder`; gives the pipeline's own folder."""
    pipeline, model = folder / "pipeline", text_model(in_channels=CHANNELS, core_depth=1, tail_depth=0)
    model.data = LATENTS[CHANNELS]
    written_base(model, pipeline / "transformer", torch.bfloat16)
    save_interface(folder / "interface.safetensors", model)
    save_vae("qwen8", pipeline / "vae")
    (folder / "recipe.toml").write_text(RECIPE)
    return save_encoder(pipeline)


if __name__ == "__main__":
    save_pipeline(Path(sys.argv[1]))

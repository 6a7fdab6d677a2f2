"""Write a checkpoint of a named size with random weights, to measure speed where the released ones are not at hand.

    python benchmarks/random_checkpoint.py ELIT-SiT-B/2 b2.safetensors --split 4-6-2
    elit-export build benchmarks/b2.toml --target cpu --checkpoint b2.safetensors --out b2
    elit-export bench engines b2 --checkpoint b2.safetensors --rows 2

No tensor is zero, so that nothing is skipped or hidden.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from elit_export.checkpoints.native import save_checkpoint
from elit_export.models.elit import Elit
from elit_export.models.registry import BACKBONES, NAMES, named_spec, new_model
from elit_export.spec import SD_VAE, DataFacts, ModelSpec


def spec_of(name: str, resolution: int, split: str | None) -> ModelSpec:
    spec = named_spec(name, resolution=resolution)
    if split is None:
        return spec
    head, core, tail = (int(part) for part in split.split("-"))
    own = BACKBONES[spec.backbone].fields(core)
    return replace(spec, head_depth=head, core_depth=core, tail_depth=tail, **own)


def random_model(spec: ModelSpec) -> Elit:
    """Every matrix scaled by its inputs, so that activations keep their size."""
    model = new_model(spec, SD_VAE if spec.in_channels == 4 else DataFacts(kind="vae", vae="unknown"))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        is_table = name.endswith(("pos_embed", "read.query", "y_embedder.weight"))
        matrix_scale = 0.9 / parameter[0].numel() ** 0.5
        scale = 0.3 if is_table else matrix_scale if parameter.dim() > 1 else 0.1
        parameter.data.normal_(std=scale, generator=generator)
        if name.endswith(("norm.scale", "norm.weight")):
            parameter.data.add_(1.0)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=NAMES, metavar="NAME", help="e.g. ELIT-SiT-B/2")
    parser.add_argument("out", type=Path)
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--split", help="HEAD-CORE-TAIL in place of the released one")
    arguments = parser.parse_args()
    save_checkpoint(arguments.out, random_model(spec_of(arguments.name, arguments.resolution, arguments.split)))


if __name__ == "__main__":
    main()

"""How far an engine may be from PyTorch: the one table."""

from __future__ import annotations

from dataclasses import dataclass

from elit_export.spec import Precision


@dataclass(frozen=True)
class Tolerance:
    """Least SQNR of one step and of a whole short trajectory, in dB."""

    step_db: float
    trajectory_db: float


CACHE_DB = 115.0  # of the graphs of the cache, which are fp32 in every plan set
# Of the decoder of a VAE, which is fp32 in every plan set: no pixel may differ from diffusers by more than
# DECODE_RELATIVE of the largest value, nor all of them together by more than DECODE_DB. Neither holds the other: one
# pixel of 512 × 512 that is off by 2e-3 of the largest value leaves 110 dB, and 1e-4 at every pixel is at most 80 dB.
# Measured with random weights of the SD-VAE's shape (benchmarks/decoder.py, ONNX Runtime): 109.7 dB and 3.5e-6 of the
# largest value for 32 × 32 latents, 93.6 dB and 2.5e-5 for 64 × 64, where sums are longer; 119.7 dB and 1.7e-6 at
# both in that of AutoencoderKLQwenImage; 123 dB and more for small decoders, in ONNX Runtime and OpenVINO.
DECODE_DB = 85.0
DECODE_RELATIVE = 1e-4
TOLERANCES = {
    # fp32 engines differ from PyTorch by the order of sums only; 115 dB is a relative error of 1.8e-6.
    # Measured at the corners of every profile: 122 dB (shipped model), 124 dB (B/2 shape), 121 dB (XL/2 shape, at
    # min, opt and max of both K and rows only). The worst state of the trajectories: 115.5 dB (shipped model, its
    # multistep one; the others reach 123), 124 dB (B/2 shape).
    Precision.FP32: Tolerance(step_db=115.0, trajectory_db=110.0),
    # Linear layers of blocks and between them, and attention itself, rounded (`graphs.rounding`). The shipped model
    # keeps 61 dB (fp16, ONNX Runtime) and 47 dB (bf16, rounded at every node) at every budget
    # (tests/graphs/test_precision.py). GPU kernels round in other places and have not been measured.
    Precision.FP16: Tolerance(step_db=55.0, trajectory_db=50.0),
    # OpenVINO, which rounds every product and what lies between, keeps 44 dB on calls of 16 rows and more and 39 dB on
    # one of a single row with little noise left (t = 1/8); its worst trajectory, multistep, ends at 35.7 dB.
    Precision.BF16: Tolerance(step_db=36.0, trajectory_db=32.0),
    # Products in 8 bits err most at the last steps, where least noise is left: a call of one such row (t = 1/8) keeps
    # 29 dB in int8 and 25 dB in fp8 (graphs for TensorRT, run by ONNX Runtime), 32 dB in int8 of OpenVINO; calls of 16
    # rows and more 31, 26 and 36 dB at every budget. The worst trajectory, multistep, keeps 28 dB in int8 of OpenVINO;
    # none was run in fp8. All of the shipped model.
    Precision.INT8: Tolerance(step_db=25.0, trajectory_db=22.0),
    Precision.FP8: Tolerance(step_db=22.0, trajectory_db=18.0),
}

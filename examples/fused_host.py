"""Samples a calibrated bundle by its graph `fused`, a whole cached step, with NumPy and ONNX Runtime alone.

Usage: python examples/fused_host.py BUNDLE OUT.npy [THRESHOLD [CALLS]]; prints 1 for a step that computed, 0 for one
reused. With CALLS it samples by the solver table of so many calls for guidance none, else by 50 steps of Euler.
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort

STEPS, IMAGES = 50, 4
folder, out, threshold = Path(sys.argv[1]), sys.argv[2], float((sys.argv[3:] or ["0.1"])[0])
manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
spec, calibration = manifest["model"]["spec"], manifest["cache_calibration"]
on_cpu = [made for made in manifest["plan_sets"] if (made["backend"], made["device"]) == ("onnxruntime", "cpu")]
plan = next((made["fused"] for made in on_cpu if made["fused"]), None)
if not plan or not calibration or calibration["checkpoint_sha256"] != manifest["model"]["checkpoint_sha256"]:
    sys.stderr.write(f"error: {folder}: build it with `fused = true`, then: elit-export calibrate cache {folder}\n")
    sys.exit(2)
calls = int((sys.argv[4:] or ["0"])[0])
solvers = [made for made in manifest.get("solvers", []) if (made["guidance"], made["schedule"]) == ("none", "full")]
tables = [made["table"] for made in solvers if made["table"].get("budgets") is None]  # every call here is a full one
table = next((table for table in tables if len(table["weights"]) == calls), None)
if calls and not table:
    command = f"elit-export calibrate solver {folder} --calls {calls} --guidance none"
    sys.stderr.write(f"error: {folder}: no table of {calls} calls: {command}\n")
    sys.exit(2)
times = table["times"] if table else [1 - step / STEPS for step in range(STEPS + 1)]
weights = table["weights"] if table else [[0] * step + [-1 / STEPS] for step in range(STEPS)]
session = ort.InferenceSession(folder / "plans" / plan["artifact"]["name"] / plan["file"])
shapes, outputs = {i.name: i.shape for i in session.get_inputs()}, [o.name for o in session.get_outputs()]
kept = spec["group_size"] ** 2  # the full budget; its fit is of all budgets, or of the nearest
fit = min(calibration["fits"], key=lambda fit: 0 if fit["kept"] is None else abs(fit["kept"] - kept))
given = {"y": np.arange(IMAGES) % spec["num_classes"], "latents": np.arange(kept)}
given |= {"threshold": np.array(threshold, np.float32), "most": np.array(4), "order": np.array(1)}
given |= {name: np.array(fit["fit"][name], np.float32) for name in ("coefficients", "low", "high")}
state = {name: np.zeros([IMAGES, *shapes[name][1:]], np.float32) for name in shapes if f"{name}_next" in outputs}
state["reused"] = np.array(-1)  # nothing is computed yet
x = np.random.default_rng(0).standard_normal([IMAGES, *shapes["x"][1:]])
velocities = []
for step, row in enumerate(weights):  # t goes from 1, noise, to 0
    now = {"x": x.astype(np.float32), "t": np.full(IMAGES, times[step], np.float32)}
    force = np.array(step in (0, len(weights) - 1))
    found = dict(zip(outputs, session.run(None, {**given, **state, **now, "force": force}), strict=True))
    state = {name: found[f"{name}_next"] for name in state}
    velocities.append(found["velocity"])
    x += sum(weight * velocity for weight, velocity in zip(row, velocities, strict=True) if weight)
    sys.stdout.write("01"[int(found["computed"])])
np.save(out, x)

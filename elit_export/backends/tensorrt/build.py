"""Graph → TensorRT plan, with `tensorrt` or `tensorrt_rtx`, which have the same Python API.

Networks are strongly typed: the graph fixes the arithmetic. TensorRT for RTX builds for named
compute capabilities without a GPU; TensorRT builds for the GPU of the machine it runs on.
"""

from __future__ import annotations

import functools
import logging
import platform
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from elit_export.backends.protocols import Builder, BuiltPlan, GraphFile, OnShare, RealInputs
from elit_export.backends.tensorrt import cuda as cuda_layer
from elit_export.backends.tensorrt.options import FIRST_WITH, TensorRTTarget
from elit_export.backends.versions import version_numbers
from elit_export.errors import BackendUnavailable, BuildError
from elit_export.spec import GraphSpec, Precision, Profile

TIMING_CACHE = "timing.cache"
MEGABYTE = 1 << 20
logger = logging.getLogger(__name__)


class TensorRTBuilder:
    """Builds a plan per profile, or one with several optimization profiles."""

    def check(self, target: TensorRTTarget) -> None:
        """Raise BackendUnavailable or BuildError if the library here cannot build for the target."""
        flavour = target.flavour
        trt = flavour.library()
        _check_version(trt, target)
        _check_options(target)
        _check_arithmetic(target)
        if flavour.names_capabilities:
            _check_known(trt, target.compute_capabilities)
        else:
            _check_local(target)

    def fingerprint(self, target: TensorRTTarget) -> dict[str, str]:
        return {"library": f"{target.flavour.module} {target.flavour.library().__version__}"}

    def group_profiles(self, profiles: Sequence[Profile], target: TensorRTTarget) -> list[tuple[Profile, ...]]:
        """Return one group per profile, or one with all profiles."""
        return [tuple(profiles)] if target.layout == "multi-profile" else [(profile,) for profile in profiles]

    def build_plan(
        self,
        graph: GraphFile,
        folder: Path,
        profiles: Sequence[Profile],
        target: TensorRTTarget,
        inputs: RealInputs | None,
        progress: OnShare,
    ) -> BuiltPlan:
        """Write the plan into `folder`.

        Raises BuildError with what the library said; KeyboardInterrupt ends the build at its next step.
        """
        trt = target.flavour.library()
        monitor = _monitor(trt, progress)
        # On a thread of its own: Ctrl-C comes to the main thread, where the library would swallow it in a callback.
        with ThreadPoolExecutor(max_workers=1) as worker:
            try:
                timing = folder.parent / TIMING_CACHE
                plan = worker.submit(_serialized, trt, graph, profiles, target, monitor, timing).result()
            except BaseException as error:
                monitor.interrupted = error
                raise
        file = graph.path.with_suffix(".plan").name
        (folder / file).write_bytes(plan)
        progress(1.0)
        return BuiltPlan(
            file=file,
            label=_label(profiles, target, trt.__version__),
            versions={target.backend: trt.__version__},
            built_on={"machine": platform.machine(), "system": platform.system()},
        )


# ---------------------------------------------------------------- before building


def _check_version(trt: Any, target: TensorRTTarget) -> None:
    oldest = target.flavour.oldest
    if version_numbers(trt.__version__, 2) < oldest:
        minimum = ".".join(map(str, oldest))
        raise BackendUnavailable(
            f"{target.backend} {trt.__version__} is too old", f"pip install -U '{target.backend}>={minimum}'"
        )


def _check_options(target: TensorRTTarget) -> None:
    if target.timing_cache and not target.flavour.timing_cache:
        raise BuildError(f"{target.backend} tunes on the device that runs the plan", "leave timing_cache out")
    if target.compatibility != "none" and not target.flavour.compatibility:
        raise BuildError(
            f"{target.backend} has no compatibility = {target.compatibility!r}",
            "leave it out, and name every GPU in compute_capabilities",
        )


def _check_arithmetic(target: TensorRTTarget) -> None:
    first = FIRST_WITH.get(target.precision, (0, 0))
    if older := [name for name in target.compute_capabilities if version_numbers(name) < first]:
        precision = target.precision.value
        raise BuildError(f"compute capability {older[0]} has no {precision} arithmetic", "give it a target with fp16")


def _check_known(trt: Any, capabilities: Iterable[str]) -> None:
    known = [name for name in trt.ComputeCapability.__members__ if name.startswith("SM")]
    for capability in capabilities:
        if _sm(capability) not in known:
            dotted = ", ".join(f"{name[2:-1]}.{name[-1]}" for name in known)
            raise BuildError(
                f"compute capability {capability}: tensorrt-rtx {trt.__version__} builds for {dotted}; "
                f"for other GPUs use backend = 'tensorrt' on the GPU itself"
            )


def _check_local(target: TensorRTTarget) -> None:
    problem, remedy = cuda_layer.device_problem()
    if problem:
        raise BackendUnavailable(f"{target.backend} builds on the GPU it builds for; {problem}", remedy)
    here = cuda_layer.Cuda().compute_capability()
    if target.compute_capabilities != (here,):
        raise BuildError(
            f"{target.backend} builds for the GPU of this machine, compute capability {here}, and the target names "
            f"{', '.join(target.compute_capabilities)}",
            "build there, or use backend = 'tensorrt-rtx'",
        )


# ---------------------------------------------------------------- building


def _serialized(
    trt: Any, graph: GraphFile, profiles: Sequence[Profile], target: TensorRTTarget, monitor: Any, timing: Path
) -> Any:
    """Return the bytes of a plan; raises BuildError, or the exception that interrupted the monitor."""
    log = _log(trt)
    log.errors.clear()
    builder = trt.Builder(log)
    network = _parsed(trt, builder, graph.path, log, target.precision)
    config = _config(trt, builder, target)
    for profile in profiles:
        config.add_optimization_profile(_optimization_profile(builder, network, graph.spec, profile))
    config.progress_monitor = monitor
    cache = _timing_cache(config, timing) if target.timing_cache else None
    plan = builder.build_serialized_network(network, config)
    if monitor.interrupted:
        raise monitor.interrupted
    if plan is None:
        small = f" (workspace_mb = {target.workspace_mb} may be too little)" if target.workspace_mb else ""
        reason = log.last_errors() or "it gives no reason"
        raise BuildError(f"{target.backend} cannot build {_names(profiles)}: {reason}{small}")
    if cache is not None:
        timing.write_bytes(cache.serialize())
    return plan


def _parsed(trt: Any, builder: Any, graph: Path, log: Any, precision: Precision) -> Any:
    """Parse a graph into a network; raises BuildError naming all nodes that the parser refuses."""
    flag = trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED
    network = builder.create_network(1 << int(flag))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(graph)):
        refused = "; ".join(_refusal(parser.get_error(index)) for index in range(parser.num_errors))
        raise BuildError(f"{trt.__name__} cannot read {graph.name}: {refused or log.last_errors()}")
    if precision is Precision.FP32 and _has_native_attention(trt, network):
        raise BuildError(f"{graph.name}: native attention has no fp32 kernel", "export with precision = 'fp32'")
    return network


def _refusal(error: Any) -> str:
    """Format an error as `MatMul core.3.attn/MatMul_93: what is wrong`, without the node if none is named."""
    node = f"{error.node_operator()} {error.node_name()}".strip()
    return f"{node}: {error.desc()}" if node else str(error.desc())


def _has_native_attention(trt: Any, network: Any) -> bool:
    kinds = {network.get_layer(index).type for index in range(network.num_layers)}
    return trt.LayerType.ATTENTION_INPUT in kinds


def _config(trt: Any, builder: Any, target: TensorRTTarget) -> Any:
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)  # on by default, and fp32 would not be fp32
    if target.flavour.names_capabilities:
        config.num_compute_capabilities = len(target.compute_capabilities)
        for index, capability in enumerate(target.compute_capabilities):
            config.set_compute_capability(trt.ComputeCapability.__members__[_sm(capability)], index)
    if target.workspace_mb is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, target.workspace_mb * MEGABYTE)
    if target.optimization_level is not None:
        config.builder_optimization_level = target.optimization_level
    if target.compatibility in ("version", "both"):
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if target.compatibility in ("hardware", "both"):
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    if target.detailed_inspection:
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    return config


def _optimization_profile(builder: Any, network: Any, graph: GraphSpec, profile: Profile) -> Any:
    """Return the ranges of every input of the network, as its graph's spec has them."""
    shapes, optimization_profile = graph.corner_shapes(profile), builder.create_optimization_profile()
    for index in range(network.num_inputs):
        name = network.get_input(index).name
        optimization_profile.set_shape(name, *shapes[name])
    return optimization_profile


def _timing_cache(config: Any, path: Path) -> Any:
    """Return the timing cache that the plans of one target share while they are built."""
    cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
    config.set_timing_cache(cache, ignore_mismatch=False)
    return cache


# ---------------------------------------------------------------- log and progress of the library


@functools.cache
def _log(trt: Any) -> Any:
    """Return a TensorRT logger that writes to `logging` and remembers errors.

    There is one for all builds: the library requires the same logger while objects made with it live. Warnings
    are about the network made here and errors are part of a BuildError, so both are logged as INFO.
    The class is inside the function because its base depends on the library.
    """
    failures = (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR)
    levels = {**dict.fromkeys((*failures, trt.ILogger.WARNING), logging.INFO), trt.ILogger.INFO: logging.DEBUG}

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            logger.log(levels.get(severity, logging.DEBUG), "%s", message)
            if severity in failures:
                self.errors.append(message)

        def last_errors(self) -> str:
            return "; ".join(self.errors[-3:])

    return Log()


def _monitor(trt: Any, progress: OnShare) -> Any:
    """Return a monitor that reports the share of the outermost phase, and ends the build on an interrupt."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.interrupted: BaseException | None = None
            self._whole = ("", 1)  # name and steps of the phase without a parent

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            if parent is None:
                self._whole = (name, steps)

        def step_complete(self, name: str, step: int) -> bool:
            whole, steps = self._whole
            try:
                if name == whole:
                    progress(min((step + 1) / steps, 1.0))
            except BaseException as error:  # the library could not carry it: raised once it has returned
                self.interrupted = error
            return self.interrupted is None

        def phase_finish(self, name: str) -> None:
            pass

    return Monitor()


# ---------------------------------------------------------------- names


def _label(profiles: Sequence[Profile], target: TensorRTTarget, version: str) -> str:
    devices = "-".join(_sm(capability).lower() for capability in target.compute_capabilities)
    return f"{_names(profiles)}-{target.backend}{version}-{devices}"


def _sm(capability: str) -> str:
    """Turn `8.9` into `SM89`."""
    return f"SM{capability.replace('.', '')}"


def _names(profiles: Sequence[Profile]) -> str:
    return "-".join(profile.name for profile in profiles)


BUILDERS: dict[str, Builder] = {"tensorrt": TensorRTBuilder(), "tensorrt-rtx": TensorRTBuilder()}

"""What a plan takes and gives, as its library tells, held against the graph that it is said to be of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from elit_export.errors import BundleError
from elit_export.spec import GraphSpec, TensorSpec


@dataclass(frozen=True)
class Port:
    """One input or output of an opened plan. `dtype` is NumPy's name of its type.

    None, in the place of the type, of all dimensions or of one, is what the library does not tell or leaves open.
    """

    name: str
    dtype: str | None
    dims: tuple[int | None, ...] | None

    def __str__(self) -> str:
        dims = "…" if self.dims is None else ", ".join("?" if size is None else str(size) for size in self.dims)
        return f"{self.name} {self.dtype or '?'}[{dims}]"

    def fits(self, tensor: TensorSpec) -> bool:
        return self.name == tensor.name and self.dtype in (None, tensor.dtype) and self._has_dims(tensor.dims)

    def _has_dims(self, dims: tuple[int | str, ...]) -> bool:
        """A dynamic dimension of the graph must be left open; a fixed one has its size, or is not told."""
        if self.dims is None:
            return True
        return len(self.dims) == len(dims) and all(
            size is None or size == dim for size, dim in zip(self.dims, dims, strict=True)
        )


def check_ports(plan: Path, graph: GraphSpec, inputs: Sequence[Port], outputs: Sequence[Port]) -> None:
    """Raise BundleError if a plan takes other tensors than its graph, or does not give those of the graph.

    Their order does not matter, and a plan may give more: one that is bisected shows what every node gives.
    """
    names = {tensor.name for tensor in graph.outputs}
    own_outputs = [port for port in outputs if port.name in names]
    for what, plan_ports, graph_tensors in (("takes", inputs, graph.inputs), ("gives", own_outputs, graph.outputs)):
        ports = sorted(plan_ports, key=lambda port: port.name)
        tensors = sorted(graph_tensors, key=lambda tensor: tensor.name)
        if len(ports) != len(tensors) or not all(map(Port.fits, ports, tensors)):
            raise BundleError(
                f"{plan}: is not a plan of the graph `{graph.name}`: it {what} {', '.join(map(str, plan_ports))}; "
                f"the graph {what} {', '.join(map(_said, graph_tensors))}",
                "copy the bundle again, or build it again: elit-export build RECIPE --target TARGET --out BUNDLE",
            )


def open_dim(size: object) -> int | None:
    """A size that a library tells as a number, where −1, a name or nothing leaves it open."""
    return size if isinstance(size, int) and size >= 0 else None


def _said(tensor: TensorSpec) -> str:
    return f"{tensor.name} {tensor.dtype}[{', '.join(map(str, tensor.dims))}]"

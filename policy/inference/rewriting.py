"""Rewrite a traced ONNX graph with operations that the runtime computes faster.

Convolutions over time become matrix products. The chunks are short and the channels many, so that a convolution reads
far more weights than activations. As a product of windows (B, T, kernel x inputs) with a matrix (kernel x inputs,
outputs) it takes half the time at a batch of several chunks, because the runtime stores the matrix in the order in
which it reads it. It can have 8-bit weights, too.

Mish is computed with one exponential, because the runtime's logarithm of one plus an exponential is slow.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from policy.inference.mapped import Maker

# From here on, mish(x) is x in float32, and e^2x has not overflowed yet.
MISH_IS_IDENTITY = 20.0


class Part(NamedTuple):
    """A traced module.

    Attributes:
        graph: its ONNX graph, without the weights.
        weights: how to make each of the weights that the graph's nodes name.
    """

    graph: Any
    weights: dict[str, Maker]

    def drop_unused(self) -> None:
        """Remove the weights that no node names."""
        used = {name for node in self.graph.node for name in node.input}
        for name in self.weights.keys() - used:
            del self.weights[name]


class _Writer:
    """Makes the nodes that replace one node.

    Args:
        onnx: the imported package `onnx`.
        part: the graph that receives their constants.
        prefix: begins the names of what they compute.
    """

    def __init__(self, onnx: Any, part: Part, prefix: str) -> None:
        self._onnx, self._part, self._prefix = onnx, part, prefix
        self.nodes: list[Any] = []

    def constant(self, value: Any, dtype: type[np.generic] = np.int64) -> str:
        """Add a constant, and return its name."""
        name = f"{self._prefix}.constant_{len(self._part.graph.initializer)}"
        self._part.graph.initializer.append(self._onnx.numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def weight(self, name: str, make: Maker) -> str:
        """Add a weight, and return its name."""
        self._part.weights[name] = make
        return name

    def __call__(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """Add a node, and return the name of its output."""
        output = f"{self._prefix}.{len(self.nodes)}"
        self.nodes.append(self._onnx.helper.make_node(kind, list(inputs), [output], **attributes))
        return output

    def finish(self, output: str) -> list[Any]:
        """Return the nodes, the last of which computes `output`."""
        self.nodes[-1].output[0] = output
        return self.nodes


def rewrite(onnx: Any, part: Part) -> None:
    """Rewrite a graph in place.

    Args:
        onnx: the imported package `onnx`.
        part: the graph and its weights.
    """
    lengths = {
        value.name: value.type.tensor_type.shape.dim[-1].dim_value
        for value in (*part.graph.value_info, *part.graph.input)
        if value.type.tensor_type.shape.dim
    }
    nodes: list[Any] = []
    for number, node in enumerate(part.graph.node):
        write = _Writer(onnx, part, f"rewritten_{number}")
        settings = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
        length = lengths.get(node.input[0]) if node.input else None
        if node.op_type == "Mish":
            nodes += _mish(write, node)
        elif node.op_type in _PRODUCTS and length and _over_time(part.weights.get(node.input[1]), settings):
            nodes += _product(write, part, node, length, settings)
        else:
            nodes.append(node)
    del part.graph.node[:]
    part.graph.node.extend(nodes)
    part.drop_unused()


def _mish(write: _Writer, node: Any) -> list[Any]:
    """Compute x tanh(log(1 + e^x)) as x - 2x / (n + 2), with n = e^x (e^x + 2)."""
    (x,), two = node.input, write.constant(2, np.float32)
    exponential = write("Exp", write("Min", x, write.constant(MISH_IS_IDENTITY, np.float32)))
    n = write("Mul", exponential, write("Add", exponential, two))
    write("Mul", x, write("Div", n, write("Add", n, two)))
    return write.finish(node.output[0])


def _over_time(weight: Maker | None, settings: dict[str, Any]) -> bool:
    """Whether a convolution is over one axis, with neither groups nor gaps in its windows."""
    dilated = any(size != 1 for size in settings.get("dilations", ()))
    return weight is not None and weight().ndim == 3 and settings.get("group", 1) == 1 and not dilated


def _product(write: _Writer, part: Part, node: Any, length: int, settings: dict[str, Any]) -> list[Any]:
    """The nodes that compute a convolution of (B, inputs, `length`) as a matrix product of rows (B, T, *)."""
    (stride,) = settings.get("strides", (1,))
    rows = write("Transpose", node.input[0], perm=(0, 2, 1))
    make = part.weights[node.input[1]]
    rows = _PRODUCTS[node.op_type](write, rows, node.input[1], make, length, stride, settings)
    if len(node.input) > 2:
        rows = write("Add", rows, node.input[2])
    write("Transpose", rows, perm=(0, 2, 1))
    return write.finish(node.output[0])


def _windows_product(
    write: _Writer, rows: str, name: str, make: Maker, length: int, stride: int, settings: dict[str, Any]
) -> str:
    """Multiply the windows of a convolution with its weights."""
    _, inputs, kernel = make().shape
    before, after = settings.get("pads", (0, 0))
    matrix = write.weight(f"{name}.matrix", partial(_as_matrix, make, (2, 1, 0), kernel * inputs))
    if (kernel, stride, before, after) != (1, 1, 0, 0):
        first = np.arange(0, length + before + after - kernel + 1, stride)
        padded = write("Pad", rows, write.constant([0, before, 0, 0, after, 0]))
        gathered = write("Gather", padded, write.constant(first[:, None] + np.arange(kernel)), axis=1)
        rows = write("Reshape", gathered, write.constant([-1, len(first), kernel * inputs]))
    return write("MatMul", rows, matrix)


def _overlapping_product(
    write: _Writer, rows: str, name: str, make: Maker, length: int, stride: int, settings: dict[str, Any]
) -> str:
    """Multiply rows with the weights of a transposed convolution, and add what overlaps."""
    inputs, outputs, kernel = make().shape
    before, after = settings.get("pads", (0, 0))
    (more,) = settings.get("output_padding", (0,))
    matrix = write.weight(f"{name}.matrix", partial(_as_matrix, make, (0, 2, 1), inputs))
    product = write("Reshape", write("MatMul", rows, matrix), write.constant([-1, length * kernel, outputs]))
    padded = write("Pad", product, write.constant([0, 0, 0, 0, 1, 0]))  # the last row is zero
    size = stride * (length - 1) + kernel + more - before - after
    added: list[list[int]] = [[] for _ in range(size)]
    for row in range(length):
        for offset in range(kernel):
            if 0 <= (place := stride * row + offset - before) < size:
                added[place].append(row * kernel + offset)
    most = max(map(len, added))
    indices = [[*found, *[length * kernel] * (most - len(found))] for found in added]
    gathered = write("Gather", padded, write.constant(indices), axis=1)
    return write("ReduceSum", gathered, write.constant([2]), keepdims=0)


def _as_matrix(make: Maker, order: tuple[int, int, int], rows: int) -> NDArray[Any]:
    """A convolution's weights as a matrix with `rows` rows, with their axes in another order."""
    return make().transpose(order).reshape(rows, -1)


_PRODUCTS: dict[str, Callable[..., str]] = {"Conv": _windows_product, "ConvTranspose": _overlapping_product}

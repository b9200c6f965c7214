"""Convolutions over time in an ONNX graph, written as matrix products.

The chunks are short and the channels many, so that a convolution reads far more weights than activations. As a product
of windows (B, T, kernel x inputs) with a matrix (kernel x inputs, outputs) it takes half the time at a batch of
several chunks, because the runtime stores the matrix in the order in which it reads it. It can have 8-bit weights, too.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from policy.inference.mapped import Maker


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


def convolutions_as_products(onnx: Any, part: Part) -> None:
    """Replace the convolutions over one axis, in place.

    Args:
        onnx: the imported package `onnx`.
        part: the graph and its weights.
    """
    lengths = {
        value.name: value.type.tensor_type.shape.dim[-1].dim_value
        for value in (*part.graph.value_info, *part.graph.input)
        if value.type.tensor_type.shape.dim
    }
    nodes = []
    for number, node in enumerate(part.graph.node):
        weight = part.weights.get(node.input[1]) if node.op_type == "Conv" else None
        settings = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
        length = lengths.get(node.input[0]) if node.input else None
        if weight is None or not length or not _is_plain(weight(), settings):
            nodes.append(node)
            continue
        nodes += _product(onnx, part, node, f"product_{number}", length, settings)
    del part.graph.node[:]
    part.graph.node.extend(nodes)
    part.drop_unused()


def _is_plain(weight: NDArray[Any], settings: dict[str, Any]) -> bool:
    """Whether a convolution is over one axis, with neither groups nor gaps in its windows."""
    dilated = any(size != 1 for size in settings.get("dilations", ()))
    return weight.ndim == 3 and settings.get("group", 1) == 1 and not dilated


def _product(onnx: Any, part: Part, node: Any, name: str, length: int, settings: dict[str, Any]) -> list[Any]:
    """The nodes that compute a convolution of (B, inputs, `length`) as a matrix product."""
    make, constant = onnx.helper.make_node, partial(_add_constant, onnx, part.graph, name)
    outputs, inputs, kernel = part.weights[node.input[1]]().shape
    before, after = settings.get("pads", (0, 0))
    (stride,) = settings.get("strides", (1,))
    first = np.arange(0, length + before + after - kernel + 1, stride)
    nodes = [make("Transpose", [node.input[0]], [f"{name}.rows"], perm=(0, 2, 1))]
    if kernel > 1 or stride > 1 or before or after:
        indices = constant("indices", first[:, None] + np.arange(kernel))
        nodes += [
            make("Pad", [f"{name}.rows", constant("pads", np.array([0, before, 0, 0, after, 0]))], [f"{name}.padded"]),
            make("Gather", [f"{name}.padded", indices], [f"{name}.gathered"], axis=1),
            make(
                "Reshape",
                [f"{name}.gathered", constant("shape", np.array([-1, len(first), kernel * inputs]))],
                [f"{name}.windows"],
            ),
        ]
    matrix = f"{node.input[1]}.matrix"
    part.weights[matrix] = partial(_matrix, part.weights[node.input[1]])
    nodes.append(make("MatMul", [nodes[-1].output[0], matrix], [f"{name}.product"]))
    if len(node.input) > 2:
        nodes.append(make("Add", [f"{name}.product", node.input[2]], [f"{name}.biased"]))
    return [*nodes, make("Transpose", [nodes[-1].output[0]], list(node.output), perm=(0, 2, 1))]


def _add_constant(onnx: Any, graph: Any, prefix: str, name: str, value: NDArray[np.int64]) -> str:
    graph.initializer.append(onnx.numpy_helper.from_array(value.astype(np.int64), f"{prefix}.{name}"))
    return f"{prefix}.{name}"


def _matrix(weight: Maker) -> NDArray[Any]:
    """A convolution's weights (outputs, inputs, kernel) as the matrix (kernel x inputs, outputs) of its product."""
    outputs, inputs, kernel = (array := weight()).shape
    return array.transpose(2, 1, 0).reshape(kernel * inputs, outputs)

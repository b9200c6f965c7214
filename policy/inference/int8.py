"""Weight matrices of an ONNX model as 8-bit integers, so that a call reads a quarter of the memory."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from policy.inference.mapped import Maker
from policy.inference.rewriting import Part

# Numbers of weights that share one scale, the preferred one first. Larger blocks run faster, smaller ones round less;
# at 128 both are near their best.
BLOCK_SIZES = (128, 64, 32)
SMALLEST_OUTPUT = 64
# At this level, the runtime also rounds activations to 8 bits, with one scale per block, and multiplies integers.
ACCURACY_LEVEL = 4
ZERO_POINT = 128


def quantized(weight: NDArray[np.float32], block_size: int) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Round a matrix to 8 bits symmetrically, with one scale for each block of a row.

    Args:
        weight: (outputs, inputs) float32.
        block_size: number of weights in a block; it must divide the number of inputs.

    Returns:
        (outputs, blocks, block_size) uint8 values with zero at 128, and their (outputs, blocks) float32 scales.

    Example:
        >>> values, scales = quantized(np.array([[0.0, 1.0, -0.5, 2.0]], np.float32), block_size=2)
        >>> ((values.astype(int) - 128) * scales[..., None]).reshape(4).round(2).tolist()
        [0.0, 1.0, -0.5, 2.0]
    """
    blocks = weight.reshape(len(weight), -1, block_size)
    scales = np.abs(blocks).max(axis=2) / 127
    steps = np.where(scales == 0, 1, scales)[..., None]
    return (np.rint(blocks / steps) + ZERO_POINT).astype(np.uint8), scales.astype(np.float32)


def narrow(onnx: Any, part: Part) -> None:
    """Replace the matrix products of an ONNX graph by products with 8-bit weights, in place.

    Args:
        onnx: the imported package `onnx`.
        part: the graph and its weights.
    """
    for node in part.graph.node:
        if node.op_type not in ("Gemm", "MatMul") or node.input[1] not in part.weights:
            continue
        name = node.input[1]
        transposed = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
        weight = partial(_transposed, part.weights[name], not transposed)
        if weight().ndim != 2:
            continue
        outputs, inputs = weight().shape
        block_size = next((size for size in BLOCK_SIZES if inputs % size == 0), None)
        if block_size is None or outputs < SMALLEST_OUTPUT:
            continue
        for kind, index in (("values", 0), ("scales", 1)):
            part.weights[f"{name}.{kind}"] = partial(_quantized, weight, block_size, index)
        bias = ["", "", node.input[2]] if node.op_type == "Gemm" else []
        node.CopyFrom(
            onnx.helper.make_node(
                "MatMulNBits",
                [node.input[0], f"{name}.values", f"{name}.scales", *bias],
                list(node.output),
                domain="com.microsoft",
                K=inputs,
                N=outputs,
                bits=8,
                block_size=block_size,
                accuracy_level=ACCURACY_LEVEL,
            )
        )
    part.drop_unused()


def _transposed(make: Maker, transpose: bool) -> NDArray[Any]:
    return make().T if transpose else make()


def _quantized(weight: Maker, block_size: int, index: int) -> NDArray[Any]:
    return quantized(weight(), block_size)[index]

"""The graph as Deeploy reads it: `network.onnx`, `inputs.npz` and `outputs.npz`. Needs the package onnx, no torch."""

from __future__ import annotations

import importlib
import io
from typing import Any

import numpy as np

from edgepress.checkpoints.errors import PlanError
from edgepress.hardware.deeploy.graph import Graph, Tensor

OPSET, IR = 10, 5  # what Deeploy's own test models have
OWN = "PACTOps"  # their domain of the operators that are not ONNX's
HINT = 'the export to deeploy needs the package onnx: pip install "edgepress[deeploy]"'


def onnx() -> Any:
    """The package onnx. Raises PlanError where it is missing."""
    try:
        return importlib.import_module("onnx")
    except ImportError:
        raise PlanError(HINT) from None


def files(graph: Graph, producer: str) -> dict[str, bytes]:
    """The three files by name. Whole numbers stand in float32 tensors, of which Deeploy finds the widths itself."""
    model = network(graph, producer)
    return {
        "network.onnx": model.SerializeToString(),
        "inputs.npz": _arrays(graph.inputs),
        "outputs.npz": _arrays(graph.outputs),
    }


def network(graph: Graph, producer: str) -> Any:
    """The graph as an onnx.ModelProto, every tensor with its shape: Deeploy's passes need them all."""
    package = onnx()
    helper, numpy_helper, kind = package.helper, package.numpy_helper, package.TensorProto.FLOAT
    kinds: dict[str, Any] = {node.inputs[1]: np.int64 for node in graph.nodes if node.op == "Reshape"}
    # Larger than the whole numbers of float32, and Deeploy adds half a step to them.
    wide = [name for node in graph.nodes if node.op == "RequantShift" for name in node.inputs[1:]]
    kinds |= dict.fromkeys(wide, np.float64)

    def described(name: str, shape: tuple[int, ...]) -> Any:
        return helper.make_tensor_value_info(name, kind, shape)

    def attribute(value: Any) -> Any:
        numbers = isinstance(value, float) or (isinstance(value, list) and isinstance(value[0], float))
        return numpy_helper.from_array(np.array(value, dtype=np.float32)) if numbers else value

    nodes = [
        helper.make_node(
            node.op, list(node.inputs), [node.output], name=f"{node.op}_{k}", domain=OWN if node.own else "",
            **{key: attribute(value) for key, value in node.attributes.items()},
        )
        for k, node in enumerate(graph.nodes)
    ]  # fmt: skip
    constants = [
        numpy_helper.from_array(values.astype(kinds.get(name, np.float32)), name)
        for name, values in graph.constants.items()
    ]
    outputs = {tensor.name for tensor in graph.outputs}
    made = helper.make_graph(
        nodes,
        "decode_step",
        [described(tensor.name, tensor.shape) for tensor in graph.inputs],
        [described(tensor.name, tensor.shape) for tensor in graph.outputs],
        constants,
        value_info=[described(name, shape) for name, shape in graph.shapes.items() if name not in outputs],
    )
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(OWN, 1)]
    return helper.make_model(made, producer_name=producer, ir_version=IR, opset_imports=opsets)


def _arrays(tensors: list[Tensor]) -> bytes:
    file = io.BytesIO()
    arrays: dict[str, Any] = {t.name: t.value.reshape(t.shape).astype(np.int64) for t in tensors}
    np.savez(file, **arrays)
    return file.getvalue()

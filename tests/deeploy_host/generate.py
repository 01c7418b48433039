"""Let Deeploy compile an exported folder for its target Generic: C for one plain core, which this machine runs too.

Run by the interpreter that has deeploy-pulp: python generate.py FOLDER. The code goes to FOLDER/host/Network.c.
Generic lacks two of the operators, whose parsers and templates are Deeploy's own, and takes the second dimension of a
RequantShift for its channels; in our graph it is the last.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "hardware" / "deeploy"))
from Deeploy.AbstractDataTypes import PointerClass
from Deeploy.CommonExtensions.DataTypes import int8_t, int32_t
from Deeploy.DeeployTypes import CodeGenVerbosity, NodeBinding, NodeMapper
from Deeploy.Targets.Generic.Bindings import BasiciRMSNormBinding, BasicRQSBindings, BasicTransformer
from Deeploy.Targets.Generic.Deployer import GenericDeployer
from Deeploy.Targets.Generic.Layers import RequantShiftLayer, iHardswishLayer, iRMSNormLayer
from Deeploy.Targets.Generic.Parsers import RequantShiftParser, iHardswishParser, iRMSNormParser
from Deeploy.Targets.Generic.Platform import GenericEngine, GenericMapping, GenericOptimizer, GenericPlatform
from Deeploy.Targets.Generic.Templates import iHardswishTemplate
from Deeploy.Targets.Generic.TypeCheckers import HardswishChecker
from driver import c_code, narrowest


class LastDimension(RequantShiftLayer):  # type: ignore[misc]
    """A RequantShift whose factors belong to the last dimension."""

    def computeShapes(self, inputs: Any, outputs: Any, *_: Any) -> Any:  # noqa: N802
        return inputs, outputs


class LastDimensionParser(RequantShiftParser):  # type: ignore[misc]
    def parseNodeCtxt(self, context: Any, node: Any, channels_first: bool = True) -> Any:  # noqa: N802
        found = super().parseNodeCtxt(context, node, channels_first)
        self.operatorRepresentation["channels"] = int(np.prod(node.inputs[1].shape))
        return found


def main() -> None:
    folder = Path(sys.argv[1])
    work = folder / "host"
    work.mkdir(exist_ok=True)
    hardswish = NodeBinding(
        HardswishChecker([PointerClass(int8_t)], [PointerClass(int32_t)]), iHardswishTemplate.referenceTemplate,
        BasicTransformer,
    )  # fmt: skip
    mapping = GenericMapping | {
        "iRMSNorm": iRMSNormLayer([NodeMapper(iRMSNormParser(), [BasiciRMSNormBinding])]),
        "iHardswish": iHardswishLayer([NodeMapper(iHardswishParser(), [hardswish])]),
        "RequantShift": LastDimension([NodeMapper(LastDimensionParser(), BasicRQSBindings)]),
    }
    graph = onnx_graphsurgeon.import_onnx(onnx.load_model(folder / "network.onnx"))
    with np.load(folder / "inputs.npz") as inputs:
        kinds = {name: narrowest(inputs[name]) for name in inputs.files}
    deployer = GenericDeployer(
        graph, GenericPlatform(engines=[GenericEngine("Generic", mapping)]), kinds, GenericOptimizer,
        lambda graph: graph.nodes, default_channels_first=False, deeployStateDir=str(work),
        inputOffsets=dict.fromkeys(kinds, 0),
    )  # fmt: skip
    deployer.prepare(CodeGenVerbosity(None))
    (work / "Network.c").write_text(c_code(deployer))


if __name__ == "__main__":
    main()

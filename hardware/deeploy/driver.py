"""Let Deeploy compile an exported folder, and print what it puts into each memory as one line of JSON.

Run by the interpreter that has deeploy-pulp, never imported: python driver.py FOLDER L1 L2, two sizes in bytes. It does
for the target Siracusa_w_neureka what Deeploy's own test runner does, which its wheel leaves out: weights go to
N-EUREKA's SRAM, all else to L2, and the tiles to L1. The C code goes to FOLDER/deeploy.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon
from Deeploy.AbstractDataTypes import PointerClass
from Deeploy.CommonExtensions.DataTypes import int8_t, int16_t, int32_t
from Deeploy.DeeployTypes import CodeGenVerbosity
from Deeploy.EngineExtension.NetworkDeployers.EngineColoringDeployer import EngineColoringDeployerWrapper
from Deeploy.MemoryLevelExtension.MemoryLevels import MemoryHierarchy, MemoryLevel
from Deeploy.MemoryLevelExtension.NetworkDeployers.MemoryLevelDeployer import MemoryDeployerWrapper
from Deeploy.MemoryLevelExtension.OptimizationPasses.MemoryLevelAnnotationPasses import (
    AnnotateDefaultMemoryLevel,
    AnnotateIOMemoryLevel,
    AnnotateNeurekaWeightMemoryLevel,
)
from Deeploy.Targets.Neureka.Deployer import NeurekaDeployer
from Deeploy.Targets.Neureka.Platform import MemoryNeurekaPlatformWrapper, NeurekaOptimizer, NeurekaPlatform
from Deeploy.TilingExtension.TilerExtension import Tiler, TilerDeployerWrapper

WEIGHT_MEMORY = "WeightMemory_SRAM"  # the name that Deeploy's kernels know


class SingleBuffers(Tiler):  # type: ignore[misc]
    """Every tile once in L1: it is read, computed and written before the next."""

    def multiBufferStrategy(self, *_: Any) -> int:  # noqa: N802
        return 1


def one_by_one(graph: Any) -> list[list[Any]]:
    """Every operator is tiled by itself."""
    return [[node] for node in graph.nodes]


def narrowest(values: Any) -> Any:
    """The narrowest signed type that holds the values: unsigned inputs would get an offset."""
    for kind in (int8_t, int16_t, int32_t):
        if values.min() >= kind.typeMin and values.max() <= kind.typeMax:
            return PointerClass(kind)
    raise OverflowError("an input does not fit 32 bits")


def deployer_of(folder: Path, work: Path, l1: int, l2: int) -> Any:
    """Deeploy's compiler for this graph and these memories."""
    graph = onnx_graphsurgeon.import_onnx(onnx.load_model(folder / "network.onnx"))
    with np.load(folder / "inputs.npz") as inputs:
        kinds = {name: narrowest(inputs[name]) for name in inputs.files}
    memories = MemoryHierarchy(
        [
            MemoryLevel("L3", ["L2"], 64_000_000),
            MemoryLevel("L2", ["L3", "L1"], l2),
            MemoryLevel("L1", ["L2"], l1),
            MemoryLevel(WEIGHT_MEMORY, [], 4 * 2**20),
        ]
    )
    memories.setDefaultMemoryLevel("L2")
    platform = NeurekaPlatform()
    deployer = NeurekaDeployer(
        graph, platform, kinds, NeurekaOptimizer, one_by_one, default_channels_first=False, deeployStateDir=str(work),
        inputOffsets=dict.fromkeys(kinds, 0),
    )  # fmt: skip
    deployer = EngineColoringDeployerWrapper(deployer)
    levels = memories.memoryLevels
    deployer.Platform = MemoryNeurekaPlatformWrapper(platform, memories, levels["L1"], levels[WEIGHT_MEMORY])
    passes = [
        AnnotateIOMemoryLevel("L2"),
        AnnotateDefaultMemoryLevel(memories),
        AnnotateNeurekaWeightMemoryLevel(platform.engines[0].name, levels[WEIGHT_MEMORY]),
    ]
    deployer = TilerDeployerWrapper(MemoryDeployerWrapper(deployer, passes), SingleBuffers, workDir=str(work))
    deployer.tiler.memoryAllocStrategy = "TetrisRandom"  # the others need a program of their own, or longer
    deployer.tiler.searchStrategy = "random-max"
    return deployer


def c_code(deployer: Any) -> str:
    """What would be Network.c, without the header of the board's libraries."""
    return "\n".join(
        [
            deployer.generateIncludeString(),
            deployer.generateBufferInitializationCode(),
            deployer.generateGlobalDefinitionCode(),
            "void RunNetwork() {",
            deployer.generateInferenceInitializationCode(),
            deployer.generateFunction(CodeGenVerbosity(None)),
            "}",
            "void InitNetwork() {",
            deployer.generateEngineInitializationCode(),
            deployer.generateBufferAllocationCode(),
            "}",
            "",
        ]
    )


def main() -> None:
    """Print {"seconds", "jobs", "operators", "memories": {level: {"capacity", "static", "dynamic"}}}."""
    folder, l1, l2 = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    work = folder / "deeploy"
    work.mkdir(exist_ok=True)
    began = time.perf_counter()
    deployer = deployer_of(folder, work, l1, l2)
    deployer.prepare(CodeGenVerbosity(None))
    (work / "Network.c").write_text(c_code(deployer))
    tiler = deployer.tiler
    memories = {
        level: {
            "capacity": int(tiler.memoryHierarchy.memoryLevels[level].size),
            "static": int(tiler.outerMemoryScheduler.getConstantTensorOffset(deployer.ctxt, level)),
            "dynamic": int(dynamic),
        }
        for level, dynamic in deployer.worstCaseBufferSize.items()
    }
    engines = [node.attrs.get("engine") for node in deployer.graph.nodes]
    facts = {
        "seconds": round(time.perf_counter() - began, 1),
        "operators": len(engines),
        "jobs": engines.count("Neureka"),
        "memories": memories,
    }
    print(json.dumps(facts))


if __name__ == "__main__":
    main()

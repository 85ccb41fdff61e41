"""What is inside an artifact: its operations, counted as its format names them."""

from __future__ import annotations

import re
import zipfile
from collections import Counter
from pathlib import Path

import torch

from ..checkpoints import read_weights
from ..runtimes.openvino import openvino_core
from ..runtimes.programs import load_program


def operations_pth(path: Path) -> Counter[str]:
    """Modules that the weights belong to, found from their tensors."""
    kinds: Counter[str] = Counter()
    for name, tensor in read_weights(path).tensors.items():
        if name.endswith('running_mean'):
            kinds['BatchNorm2d'] += 1
        elif name.endswith('weight') and tensor.ndim == 4:
            kinds['Conv2d'] += 1
    return kinds


def operations_pt2(path: Path) -> Counter[str]:
    """ATen operators of an exported program."""
    nodes = load_program(path).graph.nodes
    return Counter(str(node.target) for node in nodes if node.op == 'call_function')


def operations_aoti(path: Path) -> Counter[str]:
    """Calls in the generated code of an AOTInductor package: library functions and fused loops."""
    with zipfile.ZipFile(path) as archive:
        sources = [name for name in archive.namelist() if name.endswith('.wrapper.cpp')]
        text = '\n'.join(archive.read(name).decode() for name in sources)
    return Counter(re.findall(r'(?:aoti_torch_c\w+?_|(?=cpp_|triton_))(\w+)\(', text))


def operations_torchscript(path: Path) -> Counter[str]:
    """Nodes of a TorchScript graph, without constants and lists."""
    graph = torch.jit.load(path, map_location='cpu').inlined_graph
    kinds = Counter(node.kind() for node in graph.nodes())
    return Counter({kind: n for kind, n in kinds.items() if kind.startswith('aten::')})


def operations_onnx(path: Path) -> Counter[str]:
    """Nodes of an ONNX graph."""
    import onnx

    model = onnx.load(path, load_external_data=False)
    return Counter(node.op_type for node in model.graph.node)


def operations_openvino(path: Path) -> Counter[str]:
    """Layers of an OpenVINO IR, without constants."""
    model = openvino_core().read_model(path)
    return Counter(op.get_type_name() for op in model.get_ops() if op.get_type_name() != 'Constant')


def operations_coreml(path: Path) -> Counter[str]:
    """Operations of a Core ML program, without constants."""
    import coremltools

    function = coremltools.utils.load_spec(str(path)).mlProgram.functions['main']
    block = function.block_specializations[function.opset]
    return Counter(op.type for op in block.operations if op.type != 'const')


def batch_norms(operations: Counter[str]) -> int:
    """Normalisations among them, by any format's name for one."""
    return sum(n for name, n in operations.items() if 'batchnorm' in name.lower().replace('_', ''))


def convolutions(operations: Counter[str]) -> int:
    """Convolutions among them."""
    return sum(n for name, n in operations.items() if re.search('conv(?!ert)', name.lower()))

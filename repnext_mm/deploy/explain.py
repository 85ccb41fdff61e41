"""Where an artifact's time goes, by operator, from its runtime's own profile."""

from __future__ import annotations

import json
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from ..measure.operators import by_operator
from ..runtimes import open_artifact
from ..runtimes.onnx import ONNXArtifact
from ..runtimes.openvino import OpenVINOArtifact, openvino_core
from .job import IN_PART, PART_NAMES

#: Kinds of operators by what their names contain, in any runtime; the first that fits.
KINDS = (
    ('reorder', r'reorder|transpose|permute|contiguous|clone|copy|convert|to_dense|to_copy'),
    ('activation', r'gelu|erf|relu|elu|sigmoid|tanh'),
    ('split or join', r'split|slice|chunk|concat|\bcat|narrow'),
    ('norm', r'batch_?norm'),
    ('resize', r'resize(?!_)|interpolate|upsample'),
    ('quantisation', r'quant'),
    ('matrix product', r'matmul|gemm|bmm|linear|::mm|innerproduct|fullyconnected'),
    ('element-wise', r'add|mul|sub|div|eltwise|mean|reduce|pow'),
)
OTHER = 'other'


@dataclass(frozen=True)
class Operator:
    """All calls of one operator with one kernel.

    Args:
        operator: As the runtime names it.
        kind: As people do: 1x1 convolution, depthwise convolution, activation, reorder, ...
        kernel: The implementation that ran, where the runtime reports it.
        ms: Own time in one run.
        share: Of all own times.
        calls: In one run.
    """

    operator: str
    kind: str
    kernel: str
    ms: float
    share: float
    calls: float


@dataclass(frozen=True)
class Explanation:
    """A profile of one artifact."""

    path: str
    runtime: str
    precision: str
    operators: list[Operator]
    #: Nodes in the graph as the runtime optimised it, by kind; empty where it does not show it.
    nodes: dict[str, int] = field(default_factory=dict)
    #: By part of a complete model (backbone, neck, head, NMS, masks, ...); empty for a backbone.
    parts: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def kinds(self) -> dict[str, dict[str, float]]:
        """`ms`, `share` and `calls` by kind, the longest first."""
        table: dict[str, dict[str, float]] = {}
        for entry in self.operators:
            row = table.setdefault(entry.kind, {'ms': 0.0, 'share': 0.0, 'calls': 0.0})
            for key in row:
                row[key] += getattr(entry, key)
        return dict(sorted(table.items(), key=lambda item: -item[1]['ms']))

    def as_record(self) -> dict[str, Any]:
        """As JSON values."""
        return {**asdict(self), 'kinds': self.kinds}

    def show(self, console: Console, top: int = 12) -> None:
        """Print kinds, then operators."""
        total = sum(entry.ms for entry in self.operators)
        title = f'{self.path} in {self.runtime} {self.precision}: {total:.1f} ms in operators'
        console.print(title, highlight=False)
        if self.parts:
            parts = [
                (part, '', f'{row["ms"]:.2f}', f'{row["share"]:.1%}', '')
                for part, row in self.parts.items()
            ]
            _show(console, ('part', ''), parts)
        rows = [(kind, '', *_cells(row)) for kind, row in self.kinds.items()]
        _show(console, ('kind', ''), rows)
        rows = [(f'{e.operator} ({e.kind})', e.kernel, *_cells(asdict(e))) for e in self.operators]
        _show(console, ('operator', 'kernel'), rows[:top])
        if self.nodes:
            nodes = ', '.join(f'{count} {kind}' for kind, count in self.nodes.items())
            console.print(f'Nodes in the optimised graph: {nodes}.', highlight=False)


def _cells(row: dict[str, float]) -> tuple[str, str, str]:
    return f'{row["ms"]:.2f}', f'{row["share"]:.1%}', f'{row["calls"]:.0f}'


def _show(console: Console, names: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table(*names, box=SIMPLE)
    for header in ('own ms', 'share', 'calls'):
        table.add_column(header, justify='right')
    for row in rows:
        table.add_row(*row)
    console.print(table)


def explain(
    path: str | Path,
    *,
    threads: int | None = None,
    precision: str | None = None,
    trust: bool = False,
    runs: int = 5,
) -> Explanation:
    """Profile an artifact on noise of its own size, or 512x512 where that is open.

    Raises:
        ArtifactError: The file cannot be opened or run.
    """
    opened = open_artifact(path, threads=threads, precision=precision, trust=trust)
    with opened as artifact:
        inputs = artifact.example()
        artifact.run_named(inputs)  # says in one sentence what a runtime has against it
        if isinstance(artifact, ONNXArtifact):
            calls, nodes = _onnxruntime(artifact, inputs, threads, runs)
        elif isinstance(artifact, OpenVINOArtifact):
            calls, nodes = _openvino(artifact, inputs, threads, precision, runs)
        else:
            calls, nodes = _torch(lambda: artifact.run_named(inputs), runs), {}
        return Explanation(
            Path(path).name,
            artifact.runtime,
            artifact.precision,
            _summed(calls),
            nodes,
            _parts(calls),
        )


#: One operator's calls: name, kind, kernel, ms and number of calls in one run.
Call = tuple[str, str, str, float, float, str]


def _part(name: str) -> str:
    """The part of a complete model that its exporter put before the name of a node.

    Runtimes put words of their own before it, as OpenVINO what a conversion reads and writes.
    """
    before, found, _ = name.partition(IN_PART)
    return next((part for part in PART_NAMES if before.endswith(part)), '') if found else ''


#: ONNX Runtime names a convolution in its blocked layout by its output and this.
BLOCKED = '_nchwc'


def parts_of(nodes: Sequence[Any], exported: Sequence[Any]) -> dict[str, str]:
    """The part of each ONNX node that a runtime computes, by name.

    A node that the runtime made has the part of the exported convolution whose output it computes,
    with an activation after it or without, or else that of its next reader.

    Args:
        nodes: As the runtime has changed them.
        exported: As they are in the file.
    """
    makers = {name: node for node in exported for name in node.output}

    def convolution(output: str) -> str:
        while (node := makers.get(output)) is not None and 'Conv' not in node.op_type:
            output = next(iter(node.input), '')
        return _part(node.name) if node is not None else ''

    readers: dict[str, list[Any]] = {}
    for node in nodes:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    found: dict[str, str] = {}
    for node in reversed(nodes):  # readers come later in a graph
        later = (found.get(r.name, '') for name in node.output for r in readers.get(name, ()))
        name = node.name
        blocked = name.removesuffix(BLOCKED) if name.endswith(BLOCKED) else ''
        own = _part(name) or convolution(blocked)
        found[name] = own or next(filter(None, later), '')
    return found


def _parts(calls: Sequence[Call]) -> dict[str, dict[str, float]]:
    """`ms` and `share` by part of a complete model, the longest first; empty for a backbone."""
    sums: Counter[str] = Counter()
    for *_, ms, _, part in calls:
        sums[part or 'other'] += ms  # type: ignore[assignment]
    if set(sums) <= {'other'}:
        return {}
    total = sum(sums.values()) or 1.0
    return {part: {'ms': ms, 'share': ms / total} for part, ms in sums.most_common()}


def _summed(calls: Sequence[Call]) -> list[Operator]:
    sums: dict[tuple[str, str, str], list[float]] = {}
    for *key, ms, count, _ in calls:
        entry = sums.setdefault((key[0], key[1], key[2]), [0.0, 0.0])
        entry[0] += ms
        entry[1] += count
    total = sum(ms for ms, _ in sums.values()) or 1.0
    operators = [Operator(*key, ms, ms / total, count) for key, (ms, count) in sums.items()]
    return sorted(operators, key=lambda entry: -entry.ms)


def kind_of(name: str, weight: Sequence[int] = ()) -> str:
    """Kind of an operator; `weight` `(out, in / groups, kh, kw)` distinguishes convolutions."""
    if 'conv' in name.lower() and 'convert' not in name.lower():
        if len(weight) != 4:
            return 'convolution'
        if weight[1] == 1 and weight[0] > 1:
            return 'depthwise convolution'
        return '1x1 convolution' if tuple(weight[2:]) == (1, 1) else 'other convolution'
    found = (kind for kind, pattern in KINDS if re.search(pattern, name, re.IGNORECASE))
    return next(found, OTHER)


# --- one function per runtime


def _torch(function: Callable[[], Any], runs: int) -> list[Call]:
    calls = []
    for entry in by_operator(function, runs, shapes=True):
        # Inputs of a convolution: image, weight, bias, ...
        weight = entry['shapes'][1] if len(entry['shapes']) > 1 else ()
        kind = kind_of(entry['operator'], weight)
        calls.append((entry['operator'], kind, '', entry['ms'], entry['calls'], ''))
    return calls


def _onnxruntime(
    artifact: ONNXArtifact, inputs: dict[str, np.ndarray], threads: int | None, runs: int
) -> tuple[list[Call], dict[str, int]]:
    import onnx
    import onnxruntime

    with tempfile.TemporaryDirectory() as scratch:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = threads or 0
        options.inter_op_num_threads = 1
        options.add_session_config_entry('session.intra_op.allow_spinning', '0')
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(scratch, 'profile'))
        options.optimized_model_filepath = str(Path(scratch, 'optimised.onnx'))
        session = onnxruntime.InferenceSession(
            artifact.path, options, providers=['CPUExecutionProvider']
        )
        name = artifact.input_names[0]
        feed = {**inputs, name: inputs[name].astype(artifact.input_type, copy=False)}
        for _ in range(runs):
            session.run(None, feed)
        events = json.loads(Path(session.end_profiling()).read_text())
        graph = onnx.load(options.optimized_model_filepath).graph
    weights = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    nodes = {node.name: node for node in graph.node}
    exported = onnx.load(artifact.path, load_external_data=False).graph
    parts = parts_of(graph.node, exported.node)

    def kind(name: str, operator: str) -> str:
        node = nodes.get(name)
        inputs = node.input if node is not None else ()
        shapes = [weights[i] for i in inputs if len(weights.get(i, ())) == 4]
        shape = list(shapes[0]) if shapes else []
        attributes = {a.name: a for a in node.attribute} if node is not None else {}
        # Blocked layouts pad the weight: what the node says of itself is what it computes.
        if shape and 'kernel_shape' in attributes:
            shape[2:] = attributes['kernel_shape'].ints
        if shape and 'group' in attributes and attributes['group'].i > 1:
            shape[1] = 1
        return kind_of(operator, shape)

    calls = []
    for event in events:
        name = event.get('name', '').removesuffix('_kernel_time')
        if event.get('cat') == 'Node' and name != event['name']:
            operator = event['args']['op_name']
            ms = event['dur'] / 1e3 / runs
            part = parts.get(name, '')
            calls.append((operator, kind(name, operator), '', ms, 1 / runs, part))
    counted = Counter(kind(node.name, node.op_type) for node in graph.node)
    return calls, dict(counted.most_common())


def _openvino(
    artifact: OpenVINOArtifact,
    inputs: dict[str, np.ndarray],
    threads: int | None,
    precision: str | None,
    runs: int,
) -> tuple[list[Call], dict[str, int]]:
    options: dict[str, Any] = {
        'PERFORMANCE_HINT': 'LATENCY',
        'INFERENCE_PRECISION_HINT': precision or 'f32',
        'PERF_COUNT': True,
    }
    if threads:
        options['INFERENCE_NUM_THREADS'] = threads
    request = openvino_core().compile_model(artifact.path, 'CPU', options).create_infer_request()
    calls = []
    # A node below a microsecond is now and then reported as not run.
    kinds: dict[str, str] = {}
    for _ in range(runs):
        request.infer(dict(enumerate(inputs.values())))
        for node in request.get_profiling_info():
            if str(node.status).endswith('EXECUTED') and 'NOT' not in str(node.status):
                kind = _openvino_kind(node.node_type, node.exec_type)
                ms = node.real_time.total_seconds() * 1e3
                part = _part(node.node_name)
                calls.append((node.node_type, kind, node.exec_type, ms / runs, 1 / runs, part))
                kinds[node.node_name] = kind
    return calls, dict(Counter(kinds.values()).most_common())


def _openvino_kind(operator: str, kernel: str) -> str:
    """Its convolutions are distinguished by their kernels."""
    kind = kind_of(operator)
    if kind != 'convolution':
        return kind
    if '1x1' in kernel:
        return '1x1 convolution'
    depthwise = '_dw' in kernel or 'dw_' in kernel or 'Group' in operator
    return 'depthwise convolution' if depthwise else 'other convolution'

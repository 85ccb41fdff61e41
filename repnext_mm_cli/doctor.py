"""Says which of the packages that must fit each other do so here, and how to mend what does not.

`repnext-mm doctor` prints one screen and exits with 0 if all is well, else with 1. Each
package is imported in a process of its own, so that one that crashes is reported like the others.
Only the standard library is used: this must run where nothing else does.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

PYTHONS = ((3, 10), (3, 11), (3, 12))
TIMEOUT = 300  # s; a first import from a cold disk takes tens of seconds

# The versions shown to work together, as constraints.txt pins them, by import name.
TORCH = {
    'torch': 'torch==2.11.0',
    'torchvision': 'torchvision==0.26.0',
    'timm': 'timm==1.0.31',
    'cv2': 'opencv-python-headless==5.0.0.93',
}
STACKS = {
    'openmmlab': {
        'mmengine': 'mmengine==0.10.7',
        'mmcv': 'mmcv==2.1.0',
        'mmdet': 'mmdet==3.3.0',
        'mmseg': 'mmsegmentation==1.2.2',
    },
    'onedl': {
        'mmengine': 'onedl-mmengine==0.10.12',
        'mmcv': 'onedl-mmcv==2.3.6',
        'mmdet': 'onedl-mmdetection==3.5.1',
        'mmseg': 'onedl-mmsegmentation==1.4.2',
    },
}
# Two more that put their files into the module mmcv.
OTHER_MMCV = ('mmcv-lite', 'mmcv-full')

# What each package must be able to do, as a program that leaves what there is to know in `facts`.
_NMS = 'torch.tensor([[0., 0., 4., 4.], [0., 0., 4., 3.]]), torch.tensor([.9, .8]), 0.5'
PROBES = {
    'torch': """
import torch
gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
facts = dict(version=torch.__version__, gpu=gpu)
""",
    'torchvision': f"""
import torch, torchvision
facts = dict(version=torchvision.__version__)
torchvision.ops.nms({_NMS})
""",
    'timm': """
import timm, timm.models
facts = dict(version=timm.__version__)
""",
    'cv2': """
import cv2
facts = dict(version=cv2.__version__)
""",
    'mmengine': """
import mmengine, mmengine.model
facts = dict(version=mmengine.__version__)
""",
    'mmcv': f"""
import torch, mmcv
facts = dict(version=mmcv.__version__)
import mmcv._ext
from mmcv.ops import get_compiling_cuda_version, nms
nms({_NMS})
cuda = get_compiling_cuda_version()
facts['cuda'] = cuda if cuda[:1].isdigit() else None
""",
    'mmdet': """
import mmdet, mmdet.models, mmdet.evaluation
facts = dict(version=mmdet.__version__)
""",
    'mmseg': """
import mmseg, mmseg.models, mmseg.evaluation
facts = dict(version=mmseg.__version__)
""",
    'repnext_mm': """
import torch, repnext_mm
facts = dict(version=repnext_mm.__version__)
repnext_mm.reparameterize(repnext_mm.RepNeXt('m0').eval())(torch.zeros(1, 3, 64, 64))
""",
}
NEEDS = {
    'torchvision': ('torch',),
    'timm': ('torch', 'torchvision'),
    'mmengine': ('torch', 'cv2'),
    'mmcv': ('torch', 'cv2', 'mmengine'),
    'mmdet': ('torch', 'torchvision', 'cv2', 'mmengine', 'mmcv'),
    'mmseg': ('torch', 'torchvision', 'cv2', 'mmengine', 'mmcv'),
    'repnext_mm': ('torch', 'torchvision', 'timm', 'cv2', 'mmengine'),
}

# Known troubles: what the error says, what that means, and what to mend (a key of `mend`).
TROUBLES = (
    (
        'torchvision',
        r'torchvision::nms does not exist|undefined symbol|cannot open shared object',
        'torchvision {version} was built for another torch than the {torch} installed here.',
        'torchvision',
    ),
    (
        'cv2',
        r'(lib\w+)\.so\S*: cannot open shared object',
        'OpenCV needs the system library {0}, which is missing; its headless build does without.',
        'cv2',
    ),
    (
        'mmcv',
        r"No module named 'mmcv\._ext'",
        'mmcv is installed without its compiled operators (no mmcv._ext), which mmdet and mmseg '
        'need; the backbones and fusion work without.',
        'mmcv',
    ),
    (
        'mmcv',
        r'undefined symbol|cannot open shared object|ABI|crashed with',
        "mmcv's operators were compiled for another torch than the installed {torch}: {error}.",
        'mmcv',
    ),
    (
        'mmdet|mmseg',
        r'MMCV==(\S+) is used but incompatible',
        '{name} refuses the installed mmcv {0}: its releases take mmcv from 2.0 to below 2.2.',
        'mmcv',
    ),
    (
        'mmdet|mmseg',
        r'MMEngine==(\S+) is used but incompatible',
        '{name} refuses the installed mmengine {0}: it takes mmengine below 1.0.',
        'mmengine',
    ),
    (
        'mmseg',
        r"No module named '(ftfy|regex)'",
        'mmseg needs {0}, which its own requirements forget.',
        'text',
    ),
    (
        'mmengine|mmcv|mmdet|mmseg',
        r"No module named 'pkg_resources'",
        '{name} needs pkg_resources, which setuptools dropped in version 81.',
        'setuptools',
    ),
)


@dataclass(frozen=True)
class Probe:
    """What came of importing and using one package; `error` is empty if all went well."""

    facts: dict[str, Any]
    error: str


@dataclass(frozen=True)
class Finding:
    """One line of the screen; without a problem the package works here."""

    name: str
    version: str
    note: str = ''
    problem: str = ''
    fix: str = ''


def run_probe(package: str) -> Probe:
    """Import and use a package in a Python of its own."""
    code = (
        'import json, sys\n'
        'facts = {}\n'
        f'try:\n{textwrap.indent(PROBES[package], "    ")}'
        'finally:\n    print("\\n" + json.dumps(facts), flush=True)\n'
    )
    try:
        done = subprocess.run(
            [sys.executable, '-W', 'ignore', '-c', code],
            capture_output=True,
            text=True,
            errors='replace',
            timeout=TIMEOUT,
        )
    except subprocess.TimeoutExpired:
        return Probe({}, f'no answer within {TIMEOUT} s')
    if done.returncode < 0:
        return Probe({}, f'crashed with {signal.Signals(-done.returncode).name}')
    facts = json.loads(done.stdout.splitlines()[-1])
    if done.returncode == 0:
        return Probe(facts, '')
    # A message may have several lines: from the last line that names an exception to the end.
    error = re.split(r'\n(?=[\w.]+(?::|$))', done.stderr.strip())[-1]
    return Probe(facts, ' '.join(error.split()))


def project(spec: str) -> str:
    """Name of the distribution in a requirement such as ``mmcv==2.1.0``."""
    return spec.split('==')[0]


def installed(distribution: str) -> str:
    """Version of an installed distribution, or an empty string."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ''


def detect_stack() -> tuple[str, list[str]]:
    """The stack with most distributions installed, and the installed ones that contradict it."""
    present = {
        stack: [project(spec) for spec in specs.values() if installed(project(spec))]
        for stack, specs in STACKS.items()
    }
    stack = max(present, key=lambda name: len(present[name]))
    foreign = [d for other, found in present.items() if other != stack for d in found]
    if project(STACKS[stack]['mmcv']) in present[stack]:
        foreign += [d for d in OTHER_MMCV if installed(d)]
    return stack, foreign


def managed_by_make() -> str:
    """The command that makes this environment anew, if `make install` made it."""
    venv, checkout = Path(sys.prefix), Path(__file__).resolve().parent.parent
    if not (venv / 'repnext_mm-install.json').exists() and venv.parent != checkout:
        return ''
    command = 'make reinstall'
    if Path.cwd() != checkout:
        command = f'make -C {shlex.quote(str(checkout))} reinstall'
    if 'onedl' in (detect_stack()[0], venv.name.removeprefix('.venv-')):
        command += ' STACK=onedl'
    if venv.parent != checkout:
        command += f' VENV={shlex.quote(str(venv))}'
    return command


def mend(what: str, torch_version: str = '') -> str:
    """The command that mends one thing, for this Python and its stack."""
    if make := managed_by_make():
        return f'{make} PYTHON=python3.11' if what == 'python' else make
    pip = f'{shlex.quote(sys.executable)} -m pip'
    stack, foreign = detect_stack()
    specs = {**TORCH, **STACKS[stack]}
    mmcv = specs['mmcv']
    compile_mmcv = (
        f"{pip} install 'setuptools<81' wheel ninja && MMCV_WITH_OPS=1 {pip} install "
        '--force-reinstall --no-cache-dir --no-build-isolation --no-deps '
        f'--no-binary {project(mmcv)} {mmcv}'
    )
    if what == 'stack':
        every = [*foreign, *(project(s) for s in STACKS[stack].values() if installed(project(s)))]
        rest = ' '.join(spec for spec in STACKS[stack].values() if spec != mmcv)
        return f'{pip} uninstall -y {" ".join(every)} && {compile_mmcv} && {pip} install {rest}'
    if what == 'torchvision' and (release := re.match(r'2\.(\d+)', torch_version)):
        # torchvision 0.(n + 15) belongs to torch 2.n.
        wanted = f"'torchvision==0.{int(release[1]) + 15}.*'"
        return f'{pip} install --force-reinstall --no-deps {wanted}'
    return {
        'python': 'make install PYTHON=python3.11',
        'mmcv': compile_mmcv,
        'cv2': f'{pip} install --force-reinstall --no-deps {specs["cv2"]}',
        'text': f'{pip} install ftfy regex',
        'setuptools': f"{pip} install 'setuptools<81'",
        'repnext_mm': f'{pip} install --force-reinstall --no-deps repnext_mm',
    }.get(what) or f'{pip} install {specs[what]}'


def check_python() -> Finding:
    version = sys.version.split()[0]
    if sys.version_info[:2] in PYTHONS:
        return Finding('Python', version)
    problem = f'Python {version} is not among 3.10, 3.11 and 3.12, for which the packages exist.'
    return Finding('Python', version, problem=problem, fix=mend('python'))


def check_stack() -> Finding:
    stack, foreign = detect_stack()
    if not foreign:
        return Finding('stack', stack)
    problem = f'{", ".join(foreign)} overwrite modules of the {stack} stack: keep one of the two.'
    return Finding('stack', 'mixed', problem=problem, fix=mend('stack'))


def judge(package: str, probes: dict[str, Probe], unwell: list[str]) -> Finding:
    """Turn what a probe met into a sentence and a command."""
    error, facts = probes[package].error, probes[package].facts
    stack, _ = detect_stack()
    spec = {**TORCH, **STACKS[stack]}.get(package, package)
    version = facts.get('version') or installed(project(spec))
    torch_facts = probes['torch'].facts if 'torch' in probes else {}
    torch_version = torch_facts.get('version') or installed('torch')
    if not error:
        if package == 'torch':
            return Finding(package, version, facts['gpu'] or 'no GPU, runs on the CPU')
        if package == 'mmcv' and torch_facts.get('gpu') and not facts['cuda']:
            problem = "mmcv's operators were compiled for the CPU alone, but torch sees a GPU."
            return Finding(package, version, problem=problem, fix=mend('mmcv'))
        if package == 'mmcv':
            built = f'CUDA {facts["cuda"]}' if facts['cuda'] else 'the CPU'
            return Finding(package, version, f'operators compiled for {built}')
        return Finding(package, version)
    for packages, pattern, sentence, what in TROUBLES:
        if re.fullmatch(packages, package) and (found := re.search(pattern, error)):
            problem = sentence.format(
                *found.groups(), name=package, version=version, torch=torch_version, error=error
            )
            return Finding(package, version, problem=problem, fix=mend(what, torch_version))
    if f"No module named '{package}'" in error:
        return Finding(package, '-', problem='is not installed.', fix=mend(package, torch_version))
    if cause := next((need for need in NEEDS.get(package, ()) if need in unwell), None):
        return Finding(package, version or '-', problem=f'waits for {cause}.')
    problem = f'does not work here: {error}'
    return Finding(package, version, problem=problem, fix=mend(package, torch_version))


def diagnose(packages: tuple[str, ...] = tuple(PROBES)) -> list[Finding]:
    """Check this Python, the choice of stack and the named packages, each in its own process."""
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        probes = dict(zip(packages, pool.map(run_probe, packages)))
    findings = [check_python(), check_stack()]
    for package in packages:
        unwell = [finding.name for finding in findings if finding.problem]
        findings.append(judge(package, probes, unwell))
    return findings


def render(findings: list[Finding]) -> str:
    """The screen: a line for each package, under it what is wrong and the command."""
    lines, margin = [sys.executable], ' ' * 7
    for finding in findings:
        mark = 'FAIL' if finding.problem else 'ok'
        lines.append(f'{mark:>5}  {finding.name:<12} {finding.version:<16} {finding.note}'.rstrip())
        lines += textwrap.wrap(finding.problem, 95, initial_indent=margin, subsequent_indent=margin)
        if finding.fix:
            lines.append(f'{margin}mend: {finding.fix}')
    unwell = sum(bool(finding.problem) for finding in findings)
    lines.append(
        f'{unwell} of {len(findings)} checks failed.' if unwell else 'All of it works together.'
    )
    return '\n'.join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog='repnext-mm doctor', description='Check that the installed packages fit each other.'
    )
    parser.parse_args(argv)
    findings = diagnose()
    print(render(findings))
    return int(any(finding.problem for finding in findings))

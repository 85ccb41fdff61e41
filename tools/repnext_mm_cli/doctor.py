"""Says which of the packages that must fit each other do so here, and how to fix what does not.

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

PYTHONS = ((3, 10), (3, 11), (3, 12), (3, 13))
TIMEOUT = 300  # s; a first import from a cold disk takes tens of seconds

# The versions shown to work together, as each stack's constraints file pins them, by import name.
STACKS = {
    'mm': {
        'torch': 'torch==2.14.1',
        'torchvision': 'torchvision==0.29.1',
        'timm': 'timm==1.0.31',
        'cv2': 'opencv-python==5.0.0.93',
        'mmengine': 'mmengine==0.10.7',
        'mmcv': 'mmcv-lite==2.1.0',
        'mmdet': 'mmdet==3.3.0',
        'mmseg': 'mmsegmentation==1.2.2',
    },
    'onedl': {
        'torch': 'torch==2.7.0',
        'torchvision': 'torchvision==0.22.0',
        'timm': 'timm==1.0.15',
        'cv2': 'opencv-python==5.0.0.93',
        'mmengine': 'onedl-mmengine==0.10.12',
        'mmcv': 'onedl-mmcv==2.3.6',
        'mmdet': 'onedl-mmdetection==3.5.1',
        'mmseg': 'onedl-mmsegmentation==1.4.2',
    },
}
# What belongs to one stack alone: the OpenMMLab packages.
OPENMMLAB = ('mmengine', 'mmcv', 'mmdet', 'mmseg')
# Distributions that install the module mmcv, and those that install the module cv2: one of each.
MMCV = ('mmcv-lite', 'mmcv', 'mmcv-full', 'onedl-mmcv')
OPENCV = (
    'opencv-python',
    'opencv-python-headless',
    'opencv-contrib-python',
    'opencv-contrib-python-headless',
)

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
import torch
from repnext_mm import operators
found = operators.describe()
facts = dict(kind=found.kind, text=found.text, problem=found.problem, advice=found.advice)
if found.kind != 'none':
    import mmcv
    from mmcv.ops import get_compiling_cuda_version, nms
    facts.update(version=mmcv.__version__, cuda=get_compiling_cuda_version())
    nms({_NMS})
""",
    'mmdet': """
import repnext_mm, mmdet, mmdet.models, mmdet.evaluation
facts = dict(version=mmdet.__version__)
""",
    'mmseg': """
import repnext_mm, mmseg, mmseg.models, mmseg.evaluation
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

# Known troubles: what the error says, what that means, and what to fix (a key of `fix`).
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
        'headless',
    ),
    (
        'mmcv',
        r'crashed with (\w+)',
        "mmcv's compiled operators crash ({0}): they do not fit the installed torch {torch}.",
        'mmcv',
    ),
    (
        'mmdet|mmseg',
        r'MMCV==(\S+) is used but incompatible',
        '{name} refuses the installed mmcv {0}: its releases require mmcv from 2.0 to below 2.2.',
        'mmcv',
    ),
    (
        'mmdet|mmseg',
        r'MMEngine==(\S+) is used but incompatible',
        '{name} refuses the installed mmengine {0}: it requires mmengine below 1.0.',
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
        stack: [d for module in OPENMMLAB if installed(d := project(specs[module]))]
        for stack, specs in STACKS.items()
    }
    # A compiled mmcv goes with the mm packages as mmcv-lite does.
    present['mm'] += [d for d in ('mmcv', 'mmcv-full') if installed(d)]
    stack = max(present, key=lambda name: len(present[name]))
    mmcv = [d for d in MMCV if installed(d)]
    foreign = [d for other, found in present.items() if other != stack for d in found]
    return stack, foreign if len(mmcv) < 2 else list(dict.fromkeys([*foreign, *mmcv]))


def managed_by_make() -> str:
    """The command that makes this environment again, if `make install` made it."""
    venv, checkout = Path(sys.prefix), Path(__file__).resolve().parents[2]
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


def fix(what: str, torch_version: str = '') -> str:
    """The command that fixes one thing, for this Python and its stack."""
    if make := managed_by_make():
        return f'{make} PYTHON=python3.11' if what == 'python' else make
    pip = f'{shlex.quote(sys.executable)} -m pip'
    stack, foreign = detect_stack()
    specs = STACKS[stack]
    if what in ('stack', 'mmcv'):
        names = [*foreign, *MMCV, *(project(specs[m]) for m in OPENMMLAB)]
        names = [name for name in dict.fromkeys(names) if installed(name)]
        if what == 'mmcv':
            names = [name for name in names if name in MMCV]
        remove = f'{pip} uninstall -y {" ".join(names)} && ' if names else ''
        rest = [specs[m] for m in OPENMMLAB if what == 'stack' or m == 'mmcv']
        if stack == 'mm':
            return f'{remove}{pip} install {" ".join(rest)}'
        rest.remove(specs['mmcv'])
        others = f' && {pip} install {" ".join(rest)}' if rest else ''
        return (
            f"{remove}{pip} install 'setuptools<81' wheel ninja && MMCV_WITH_OPS=1 {pip} install "
            f'--no-cache-dir --no-build-isolation --no-binary onedl-mmcv {specs["mmcv"]}{others}'
        )
    if what == 'torchvision' and (release := re.match(r'2\.(\d+)', torch_version)):
        # torchvision 0.(n + 15) belongs to torch 2.n.
        wanted = f"'torchvision==0.{int(release[1]) + 15}.*'"
        return f'{pip} install --force-reinstall --no-deps {wanted}'
    if what in ('cv2', 'headless'):
        spec = specs['cv2']
        if what == 'headless':
            spec = spec.replace('opencv-python', 'opencv-python-headless')
        names = [name for name in OPENCV if installed(name)]
        remove = f'{pip} uninstall -y {" ".join(names)} && ' if names else ''
        return f'{remove}{pip} install --no-deps {spec}'
    return {
        'python': 'make install PYTHON=python3.11',
        'text': f'{pip} install ftfy regex',
        'setuptools': f"{pip} install 'setuptools<81'",
        'repnext_mm': f'{pip} install --force-reinstall --no-deps repnext_mm',
    }.get(what) or f'{pip} install {specs[what]}'


def check_python() -> Finding:
    version = sys.version.split()[0]
    if sys.version_info[:2] in PYTHONS:
        return Finding('Python', version)
    problem = f'Python {version} is not among 3.10 to 3.13, for which the packages exist.'
    return Finding('Python', version, problem=problem, fix=fix('python'))


def check_stack() -> Finding:
    stack, foreign = detect_stack()
    if not foreign:
        return Finding('stack', stack)
    problem = (
        f'{" and ".join(foreign)} overwrite files of each other or of the {stack} packages: keep '
        'one of each.'
    )
    return Finding('stack', 'mixed', problem=problem, fix=fix('stack'))


def check_opencv() -> Finding:
    found = [name for name in OPENCV if installed(name)]
    versions = {installed(name) for name in found}
    # grad-cam requires the headless one beside mm's: of one version, their code is the same.
    if len(found) < 2 or (len(versions) == 1 and not any('contrib' in name for name in found)):
        return Finding('OpenCV', installed(found[0]) if found else '-', ' '.join(found))
    problem = f'{" and ".join(found)} overwrite each other: keep one.'
    return Finding('OpenCV', 'mixed', problem=problem, fix=fix('cv2'))


def judge_mmcv(version: str, facts: dict[str, Any], gpu: bool) -> Finding:
    """What the operators in use are, or what keeps mmcv from having any."""
    if facts['problem']:  # a sentence that contains the fix
        return Finding('mmcv', version or '-', problem=facts['problem'])
    if gpu and facts['kind'] == 'compiled' and not facts['cuda'][:1].isdigit():
        problem = "mmcv's operators were compiled for the CPU alone, but torch sees a GPU."
        return Finding('mmcv', version, problem=problem, fix=fix('mmcv'))
    return Finding('mmcv', version, facts['advice'] or facts['text'])


def judge(package: str, probes: dict[str, Probe], unwell: list[str]) -> Finding:
    """Turn what a probe met into a sentence and a command."""
    error, facts = probes[package].error, probes[package].facts
    stack, _ = detect_stack()
    spec = STACKS[stack].get(package, package)
    version = facts.get('version') or installed(project(spec))
    torch_facts = probes['torch'].facts if 'torch' in probes else {}
    torch_version = torch_facts.get('version') or installed('torch')
    if not error:
        if package == 'torch':
            return Finding(package, version, facts['gpu'] or 'no GPU, runs on the CPU')
        if package == 'mmcv':
            return judge_mmcv(version, facts, bool(torch_facts.get('gpu')))
        return Finding(package, version)
    for packages, pattern, sentence, what in TROUBLES:
        if re.fullmatch(packages, package) and (found := re.search(pattern, error)):
            problem = sentence.format(
                *found.groups(), name=package, version=version, torch=torch_version, error=error
            )
            return Finding(package, version, problem=problem, fix=fix(what, torch_version))
    if f"No module named '{package}'" in error:
        return Finding(package, '-', problem='is not installed.', fix=fix(package, torch_version))
    if cause := next((need for need in NEEDS.get(package, ()) if need in unwell), None):
        return Finding(package, version or '-', problem=f'waits for {cause}.')
    problem = f'does not work here: {error}'
    return Finding(package, version, problem=problem, fix=fix(package, torch_version))


def diagnose(packages: tuple[str, ...] = tuple(PROBES)) -> list[Finding]:
    """Check this Python, the choice of stack and the named packages, each in its own process."""
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        probes = dict(zip(packages, pool.map(run_probe, packages)))
    findings = [check_python(), check_stack(), check_opencv()]
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
            lines.append(f'{margin}fix: {finding.fix}')
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

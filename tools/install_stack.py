"""Set up one of the two stacks in its own virtual environment.

The default stack needs no compiler. The second one compiles mmcv's operators, once. `make install`
runs this with the standard library alone. The file must parse on old Pythons, so that they
are refused in one sentence: hence no __future__ import and no newer syntax.
"""

import argparse
import configparser
import contextlib
import fcntl
import hashlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import zipfile
from pathlib import Path

PYTHONS = ((3, 10), (3, 11), (3, 12), (3, 13))
if sys.version_info[:2] not in PYTHONS:
    sys.exit(
        'set-up stopped: {} is Python {}.{}, but the pinned packages exist for Python 3.10 to '
        '3.13; name one of those, as in `make install PYTHON=python3.11`.'.format(
            sys.executable, *sys.version_info[:2]
        )
    )

ROOT = Path(__file__).resolve().parent.parent
# The file with each stack's versions.
CONSTRAINTS = {'mm': ROOT / 'constraints.txt', 'onedl': ROOT / 'constraints-onedl.txt'}
COMPILED = 'onedl-mmcv'  # what the second stack compiles
STAMP = 'repnext_mm-install.json'
DISK_GIB = 8  # torch with its CUDA libraries unpacks to 5 GiB
CPYTHON = 'cp{}{}'.format(*sys.version_info[:2])
# Also where this runs in the very environment that it is about to replace.
BASE_PYTHON = getattr(sys, '_base_executable', None) or sys.executable


class SetupError(Exception):
    """One sentence for the user: what is wrong and how to fix it."""


def requirements(stack: str) -> list[str]:
    """From setup.cfg: the package's own requirements, its stack's, and for deployment and tests."""
    config = configparser.ConfigParser()
    config.read(ROOT / 'setup.cfg', encoding='utf-8')
    extras = config['options.extras_require']
    parts = [config['options']['install_requires'], extras[stack], extras['deploy'], extras['dev']]
    text = '\n'.join(parts)
    return [line for line in text.splitlines() if line and not line.startswith('#')]


def compiled_version() -> str:
    """The version of the package that the second stack compiles."""
    pins = CONSTRAINTS['onedl']
    found = re.search(rf'^{re.escape(COMPILED)}==(\S+)$', pins.read_text('utf-8'), re.M)
    if not found:
        raise SetupError(f'{pins} has no line `{COMPILED}==VERSION`; add it.')
    return found[1]


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def wanted_stamp(stack: str, venv: Path) -> dict[str, str]:
    """What the environment depends on; it is made anew when any of these changes."""
    return {
        'the pins': digest(CONSTRAINTS[stack].read_text('utf-8')),
        'the requirements in setup.cfg': digest('\n'.join(requirements(stack))),
        'tools/install_stack.py': digest(Path(__file__).read_text('utf-8')),
        'the Python': f'{sys.version.split()[0]} {os.path.realpath(BASE_PYTHON)}',
        'the folder': str(venv),
    }


def changes(venv: Path, stamp: dict[str, str]) -> list[str]:
    """Names of what differs from the stamp that the last finished set-up left in `venv`."""
    try:
        old = json.loads((venv / STAMP).read_text('utf-8'))
    except (OSError, ValueError):
        return ['an unfinished set-up'] if venv.exists() else ['nothing there yet']
    return [name for name in stamp if old.get(name) != stamp[name]]


def write_stamp(venv: Path, stamp: dict[str, str]) -> None:
    part = venv / (STAMP + '.part')
    part.write_text(json.dumps(stamp, indent=1), 'utf-8')
    part.rename(venv / STAMP)


def wheelhouse() -> Path:
    """Where compiled wheels are kept, outside the checkout."""
    default = Path.home() / '.cache' / 'repnext_mm' / 'wheelhouse'
    return Path(os.environ.get('REPNEXT_MM_WHEELHOUSE') or default).expanduser().resolve()


def check_machine(venv: Path, compiles: bool) -> None:
    """Refuse, before anything is downloaded, a machine on which the set-up cannot end well."""
    version = '{}.{}'.format(*sys.version_info[:2])
    if importlib.util.find_spec('ensurepip') is None:
        raise SetupError(
            f'{sys.executable} cannot make virtual environments (its ensurepip is missing); '
            f'install that part of Python, on Debian with `apt-get install python{version}-venv`.'
        )
    free = shutil.disk_usage(venv.parent).free / 2**30
    if free < DISK_GIB:
        raise SetupError(
            f'{venv.parent} has {free:.1f} GiB free and the set-up needs about {DISK_GIB}; free '
            'some, or name a folder on another disk, as in `make install VENV=/other/disk/venv`.'
        )
    if compiles and sys.version_info[:2] != (3, 11):
        raise SetupError(
            f'{CONSTRAINTS["onedl"].name} has versions for Python 3.11 and {sys.executable} is '
            f'{version}; name one, as in `make install STACK=onedl PYTHON=python3.11`.'
        )
    if not compiles or any(wheelhouse().glob(f'{COMPILED}-{compiled_version()}-*/*{CPYTHON}*.whl')):
        return
    compilers = [
        os.environ.get('CC') or sysconfig.get_config_var('CC') or 'gcc',
        os.environ.get('CXX') or 'c++',
    ]
    for name in [shlex.split(compiler)[0] for compiler in compilers]:
        if not shutil.which(name):
            raise SetupError(
                f'the compiler `{name}` was not found and {COMPILED} must be compiled here; '
                'install gcc with C++, on Debian with `apt-get install gcc g++`, or use the '
                'default stack, which needs none.'
            )
    if not Path(sysconfig.get_path('include'), 'Python.h').exists():
        raise SetupError(
            f'the C headers of {sys.executable} (Python.h) were not found and {COMPILED} must be '
            f'compiled here; install them, on Debian with `apt-get install python{version}-dev`, '
            'or use the default stack, which needs none.'
        )


def error_line(log: str) -> str:
    """The line of a build log that says most about why it failed."""
    for pattern in (r': (?:fatal )?error: ', r'^\s*\w*Error: ', r'^ERROR: ', r'\S'):
        lines = [line.strip() for line in log.splitlines() if re.search(pattern, line)]
        if lines:
            return lines[-1]
    return 'it printed nothing'


def progress(log: str) -> str:
    """How far the newest command in a log is, where it says so."""
    built = re.findall(r'^ *\[(\d+)/(\d+)\]', log, re.M)
    loaded = re.findall(r'^ *Progress (\d+) of (\d+)$', log, re.M)
    if built:
        return 'file {} of {}'.format(*built[-1])
    if loaded and loaded[-1][0] != loaded[-1][1]:
        return 'downloading, {:.0f} of {:.0f} MB'.format(*(int(n) / 1e6 for n in loaded[-1]))
    return 'unpacking' if 'Installing collected packages' in log else ''


def clock(seconds: float) -> str:
    return f'{seconds // 60:.0f} min {seconds % 60:02.0f} s'


class Steps:
    """Runs the set-up's commands, each into its own log, and shows how far they are."""

    def __init__(self, total: int, logs: Path) -> None:
        self.total, self.logs, self.done = total, logs, 0
        logs.mkdir(parents=True, exist_ok=True)

    def run(self, title: str, command: list[str], **environment: str) -> None:
        """Run one command; raises SetupError with its log and its telling line if it fails."""
        self.done += 1
        head = f'[{self.done}/{self.total}] {title}'
        log = self.logs / f'{self.done}.log'
        print(head, flush=True)
        env = {k: v for k, v in os.environ.items() if k not in ('PYTHONPATH', 'PYTHONHOME')}
        env.update(environment)
        start = said = time.monotonic()
        with open(log, 'wb') as out:
            process = subprocess.Popen(
                command, cwd=ROOT, env=env, stdout=out, stderr=subprocess.STDOUT
            )
            try:
                while process.poll() is None:
                    time.sleep(0.2)
                    now = time.monotonic()
                    pause = 2 if sys.stdout.isatty() else 30
                    if now - said >= pause:
                        said = now
                        self._say(f'      {clock(now - start)}  {progress(read(log))}')
            finally:
                if process.poll() is None:
                    process.terminate()
                    process.wait()
        self._say(f'      {clock(time.monotonic() - start)}', end=True)
        if process.returncode:
            raise SetupError(
                f'step {self.done} ({title}) failed: {error_line(read(log))} (complete log: {log}).'
            )

    @staticmethod
    def _say(text: str, end: bool = False) -> None:
        if sys.stdout.isatty():
            print(f'\r\033[K{text}', end='\n' if end else '', flush=True)
        else:
            print(text, flush=True)


def read(log: Path) -> str:
    return log.read_text('utf-8', errors='replace')


def describe_torch(python: Path) -> dict:
    """What the operators' binary interface depends on, asked of the installed torch."""
    code = (
        'import json, torch; from torch.utils.cpp_extension import CUDA_HOME; '
        'gpus = range(torch.cuda.device_count()); '
        'caps = sorted({"%d.%d" % torch.cuda.get_device_capability(i) for i in gpus}); '
        'print(json.dumps({"version": torch.__version__, "cuda": torch.version.cuda, '
        '"home": CUDA_HOME, "caps": caps}))'
    )
    result = subprocess.run([str(python), '-c', code], capture_output=True, text=True)
    if result.returncode:
        raise SetupError(f'the installed torch does not import: {error_line(result.stderr)}.')
    return json.loads(result.stdout)


def wheel_key(torch: dict) -> str:
    """Name of the wheelhouse folder: one per package version, torch, Python and CUDA."""
    device = 'cpu'
    if torch['caps'] or os.environ.get('FORCE_CUDA') == '1':
        if not torch['home']:
            raise SetupError(
                f'torch sees a GPU but the CUDA {torch["cuda"]} toolkit that compiles {COMPILED} '
                'for it was not found; install it and set CUDA_HOME, or set up for the CPU alone '
                'with `CUDA_VISIBLE_DEVICES= make install STACK=onedl`.'
            )
        archs = os.environ.get('TORCH_CUDA_ARCH_LIST') or ' '.join(torch['caps']) or 'all'
        device = 'cu{}-sm{}'.format(torch['cuda'], '_'.join(re.split(r'[ ;]+', archs)))
    platform = sysconfig.get_platform()
    return f'{COMPILED}-{compiled_version()}-torch{torch["version"]}-{CPYTHON}-{platform}-{device}'


def compile_jobs() -> str:
    """Parallel compilations: one per core, and 2 GiB of memory for each."""
    memory = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30
    return str(max(1, min(len(os.sched_getaffinity(0)), int(memory // 2))))


def compile_ops(steps: Steps, python: Path, home: Path) -> None:
    """Build the wheel of mmcv with its operators and put it into the folder `home`."""
    version = compiled_version()
    home.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix='building-', dir=home.parent) as folder:
        built = Path(folder, 'wheel')
        steps.run(
            f'compile {COMPILED} {version} for this torch, once (about 10 minutes on 2 cores)',
            # pip would cache the wheel by name and version alone and reuse it for another torch.
            [*pip(python, 'wheel'), '-v', '--no-cache-dir', '--no-build-isolation', '--no-deps',
             '--no-binary', COMPILED, f'{COMPILED}=={version}', '--wheel-dir', str(built)],
            MMCV_WITH_OPS='1',
            MAX_JOBS=os.environ.get('MAX_JOBS') or compile_jobs(),
            CFLAGS='-g0 ' + os.environ.get('CFLAGS', ''),  # debug symbols take a third of the time
        )  # fmt: skip
        with contextlib.suppress(OSError):  # another set-up was faster: its wheel serves as well
            built.rename(home)


def ops_load(python: Path, wheel: Path) -> bool:
    """Whether the operators in a compiled wheel fit the installed torch."""
    code = (
        'import importlib.util as util, sys, torch; '
        'spec = util.spec_from_file_location("_ext", sys.argv[1]); '
        'spec.loader.exec_module(util.module_from_spec(spec))'
    )
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as archive:
        (name,) = [n for n in archive.namelist() if re.match(r'mmcv/_ext\.([^/]*\.)?so$', n)]
        command = [str(python), '-c', code, archive.extract(name, folder)]
        return not subprocess.run(command, stderr=subprocess.DEVNULL).returncode


def compiled_wheel(steps: Steps, python: Path) -> Path:
    """The wheel of mmcv with operators for the installed torch; compiled unless one is kept."""
    home = wheelhouse() / wheel_key(describe_torch(python))
    kept = next(home.glob('*.whl'), None)
    if kept and ops_load(python, kept):
        steps.total -= 1
        print(f'      {COMPILED} is compiled already: {home}', flush=True)
        return kept
    if kept:
        print('      the compiled wheel does not load here, so it is compiled again', flush=True)
        shutil.rmtree(home)
    compile_ops(steps, python, home)
    return next(home.glob('*.whl'))


def pip(python: Path, verb: str) -> list[str]:
    return [str(python), '-m', 'pip', '--disable-pip-version-check', verb]


def fresh_venv(venv: Path) -> None:
    """Remove what is at `venv`, if that is a virtual environment of ours or nothing."""
    if venv.exists():
        if not (venv / 'pyvenv.cfg').exists() and any(venv.iterdir()):
            raise SetupError(
                f'{venv} is not a virtual environment, so it will not be replaced; move it away or '
                'name another folder, as in `make install VENV=.venv2`.'
            )
        shutil.rmtree(venv)


def settle_opencv(steps: Steps, python: Path, get: list[str]) -> None:
    """Leave one of OpenCV's distributions, which overwrite each other's files.

    `opencv-python` is what mm's packages require. It needs libGL and X11, which servers lack; its
    headless twin contains the same module without them.
    """
    code = (
        'import importlib.metadata as m; '
        'found = {d.name for d in m.distributions() if d.name.startswith("opencv-")}; '
        'print(*found, flush=True); import cv2'
    )
    done = subprocess.run([str(python), '-c', code], capture_output=True, text=True)
    found = done.stdout.split()
    if done.returncode == 0 and len(found) == 1:
        return
    steps.total += 2
    steps.run('remove OpenCV', [*pip(python, 'uninstall'), '--yes', *found])
    name = 'opencv-python' if done.returncode == 0 else 'opencv-python-headless'
    steps.run(f'one OpenCV: {name}', [*get, '--no-deps', name])


def install(stack: str, venv: Path, rebuild: bool) -> None:
    """Bring `venv` up to date for `stack`; does nothing when it is."""
    stamp = wanted_stamp(stack, venv)
    changed = changes(venv, stamp)
    if not changed and not rebuild:
        print(f'{venv.name} is up to date (stack {stack})', flush=True)
        return
    compiles = stack == 'onedl'
    check_machine(venv, compiles)
    why = ', '.join(changed) or 'make reinstall'
    print(f'set-up of the {stack} stack in {venv}, because of: {why}', flush=True)
    fresh_venv(venv)
    python = venv / 'bin' / 'python'
    logs = venv.with_name(venv.name + '-logs')
    steps = Steps(6 if compiles else 4, logs)
    get = [*pip(python, 'install'), '--constraint', str(CONSTRAINTS[stack])]
    tools = ['pip', 'setuptools', 'wheel', *(['ninja'] if compiles else [])]
    steps.run('virtual environment', [BASE_PYTHON, '-m', 'venv', str(venv)])
    steps.run('pip and build tools', [*get, '--upgrade', *tools])
    get += ['--no-build-isolation', '--progress-bar', 'raw']
    wheels = []
    if compiles:
        steps.run('torch and torchvision (3 GB the first time)', [*get, 'torch', 'torchvision'])
        wheels = [str(compiled_wheel(steps, python))]
    title = f'the {stack} stack, this package, tests and lint'
    if not compiles:
        title += ' (3 GB the first time)'
    steps.run(title, [*get, *wheels, '--editable', f'{ROOT}[{stack},deploy,dev]'])
    settle_opencv(steps, python, get)
    try:
        steps.run(
            'check that all of it works together', [str(python), '-m', 'repnext_mm_cli', 'doctor']
        )
    finally:
        print(read(logs / f'{steps.done}.log'), flush=True)
    write_stamp(venv, stamp)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument('--stack', choices=sorted(CONSTRAINTS), default='mm')
    parser.add_argument('--venv', type=Path, default=ROOT / '.venv', help='the environment')
    parser.add_argument('--rebuild', action='store_true', help='even if it is up to date')
    parser.add_argument(
        '--check-python', action='store_true', help='only say by exit code if this Python will do'
    )
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if args.check_python:
        return
    venv = args.venv.absolute()
    venv.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(venv.with_name(venv.name + '.lock'), 'w') as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f'waiting for another set-up of {venv} to end', flush=True)
                fcntl.flock(lock, fcntl.LOCK_EX)
            install(args.stack, venv, args.rebuild)
    except (SetupError, OSError) as error:
        sys.exit(f'set-up stopped: {error}')
    except KeyboardInterrupt:
        sys.exit('set-up interrupted; the next `make install` starts it again.')


if __name__ == '__main__':
    main()

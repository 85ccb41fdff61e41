"""Publishing: what is written, that it reads back, and the hub, which is a server on loopback."""

from __future__ import annotations

import base64
import hashlib
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
import timm
import tool_runs
import torch
from conftest import REPO
from safetensors import safe_open
from weight_files import assert_holds

import repnext_mm.timm  # noqa: F401  registers
from repnext_mm import RepNeXt, publish
from repnext_mm.checkpoints import load_pretrained
from repnext_mm.datasets import shapes
from repnext_mm.engine.cli import train_main


@pytest.fixture(scope='module')
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one epoch with a teacher, an optimizer and an average."""
    root = tmp_path_factory.mktemp('run')
    data = shapes.generate(root / 'shapes', shapes.Spec(train=12, val=12, size=64))
    tool_runs.succeed_here(
        train_main, 'repnext_m0_shapes', '--epochs', '2', '--work-dir', 'run', '--cfg-options',
        f'sample_data_root={data}', f'data_root={data / "imagenet"}',
        'train_dataloader.batch_size=16', "model.teacher=dict(model_name='test_resnet')",
        'custom_hooks.0.type=KeepEMA', cwd=root,
    )  # fmt: skip
    return root / 'run'


def published(run: Path, cwd: Path, *more: str) -> Path:
    """The file that `repnext-mm publish` writes."""
    arguments = [run / 'epoch_2.pth', '--work-dir', 'out', *more]
    output = tool_runs.succeed_here(publish.main, *arguments, cwd=cwd)
    (path,) = (cwd / 'out').rglob('*.safetensors')
    assert f'Wrote {path.relative_to(cwd)}' in output
    return path


@pytest.mark.slow
def test_what_is_written(run: Path, tmp_path: Path) -> None:
    path = published(run, tmp_path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert path.name == f'repnext_m0-{digest[:8]}.safetensors'
    raw = torch.load(run / 'epoch_2.pth', weights_only=True)
    with safe_open(path, 'pt') as file:
        header = json.loads(file.metadata()['repnext_mm'])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    state = {k.removeprefix('network.'): v for k, v in raw['state_dict'].items()}
    assert tensors.keys() == state.keys(), 'no optimizer, average or teacher'
    assert all(torch.equal(tensors[key], state[key]) for key in state)
    assert header['network'] == "RepNeXtClassifier(arch='m0')"
    assert header['classes'] == [*shapes.THINGS]
    measured = header['figures']['accuracy/top1']
    text = (path.parent / 'README.md').read_text()
    assert f'| accuracy/top1 | {measured:.4g} |' in text
    assert f'SHA-256 `{digest}`' in text and 'disc, ring, square' in text
    # The same again is the same file.
    assert published(run, tmp_path) == path


@pytest.mark.slow
def test_the_card_says_how_to_load(run: Path, tmp_path: Path) -> None:
    """Its code is run, as whoever reads it will."""
    for more in ((), ('--fused',)):
        folder = tmp_path / f'x{len(more)}'
        folder.mkdir()
        path = published(run, folder, *more)
        text = (path.parent / 'README.md').read_text()
        code = text.split('```python\n')[1].split('```')[0]
        code += 'import torch; print(tuple(model(torch.zeros(1, 3, 64, 64)).shape), '
        code += 'sum(p.numel() for p in model.parameters()))'
        done = subprocess.run(
            [sys.executable, '-c', code],
            cwd=path.parent,
            env=tool_runs.environment(),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        count = 2_008_685 if more else 2_077_690
        assert done.stdout.splitlines()[-1] == f'(1, 5) {count}'


@pytest.mark.slow
def test_it_is_a_backbone_as_well(run: Path, tmp_path: Path) -> None:
    path = published(run, tmp_path)
    assert '0 missing, 0 unexpected' in str(load_pretrained(RepNeXt('m0'), path))


@pytest.mark.slow
def test_the_average_is_chosen_by_name(run: Path, tmp_path: Path) -> None:
    path = published(run, tmp_path, '--container', 'ema_state_dict')
    averaged = torch.load(run / 'epoch_2.pth', weights_only=True)['ema_state_dict']
    own = {k.removeprefix('module.network.'): v for k, v in averaged.items() if k != 'steps'}
    model = timm.create_model('repnext_m0', num_classes=5, checkpoint_path=str(path))
    assert_holds(model, own)


@pytest.mark.parametrize(
    'arguments, said',
    [
        (['--push', 'x/y', '--fused'], '--push uploads what timm builds by name'),
        (['--push', 'nothing'], '--push nothing must be OWNER/NAME'),
        (['--container', 'ema'], "contains no weights under container='ema'"),
        (['missing.pth'], 'missing.pth'),
    ],
)
def test_wrong_input_is_named(arguments: list[str], said: str, tmp_path: Path) -> None:
    torch.save({'model': {'w': torch.ones(1)}}, tmp_path / 'a.pth')
    given = arguments if arguments[0] == 'missing.pth' else [str(tmp_path / 'a.pth'), *arguments]
    done = tool_runs.run_here(publish.main, *given, cwd=tmp_path)
    assert done.returncode == 1
    assert said in done.stderr and 'Traceback' not in done.stderr


def test_no_config_is_said(tmp_path: Path) -> None:
    torch.save({'model': {'w': torch.ones(1)}}, tmp_path / 'a.pth')
    done = tool_runs.run_here(publish.main, str(tmp_path / 'a.pth'), cwd=tmp_path)
    assert 'there is no config beside' in done.stderr
    config = str(REPO / 'configs/imagenet/repnext_m0_shapes.py')
    done = tool_runs.run_here(publish.main, str(tmp_path / 'a.pth'), config, cwd=tmp_path)
    assert 'does not fit the config' in done.stderr
    assert not (tmp_path / 'published').exists()


class Hub(BaseHTTPRequestHandler):
    """As much of the Hugging Face hub as uploading and loading a model asks for."""

    files: ClassVar[dict[str, bytes]] = {}

    def log_message(self, *args: object) -> None:
        """Nothing on the screen."""

    def answer(self, content: object, status: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {'Content-Length': str(len(body)), **headers}.items():
            self.send_header(name.replace('_', '-'), value)
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(body)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers['Content-Length']))
        host = f'http://{self.headers["Host"]}'
        assert self.headers['Authorization'] == 'Bearer hf_x'
        if self.path == '/api/repos/create':
            given = json.loads(body)
            name = f'{given.get("organization", "owner")}/{given["name"]}'
            self.answer({'url': f'{host}/{name}', 'name': name})
        elif self.path == '/api/validate-yaml':
            self.answer({'errors': [], 'warnings': []})
        elif '/preupload/' in self.path:
            files = json.loads(body)['files']
            self.answer({'files': [{'path': f['path'], 'uploadMode': 'regular',
                                    'shouldIgnore': False} for f in files]})  # fmt: skip
        elif '/commit/' in self.path:
            for line in body.splitlines():
                entry = json.loads(line)
                if entry['key'] == 'file':
                    Hub.files[entry['value']['path']] = base64.b64decode(entry['value']['content'])
            self.answer({'commitUrl': f'{host}/owner/name/commit/{"0" * 40}',
                         'commitOid': '0' * 40, 'pullRequestUrl': None})  # fmt: skip
        else:
            self.answer({'error': self.path}, 404)

    def do_GET(self) -> None:
        name = self.path.partition('/resolve/')[2].partition('/')[2]
        if name in Hub.files:
            data = Hub.files[name]
            digest = hashlib.sha256(data).hexdigest()
            self.answer(data, ETag=f'"{digest}"', X_Repo_Commit='0' * 40)
        elif self.path.startswith('/api/models/'):
            siblings = [{'rfilename': each} for each in Hub.files]
            self.answer({'id': 'owner/name', 'sha': '0' * 40, 'siblings': siblings, 'tags': []})
        else:
            self.answer({'error': 'none'}, 404, X_Error_Code='EntryNotFound')

    do_HEAD = do_GET


@pytest.fixture
def hub() -> Iterator[str]:
    Hub.files.clear()
    server = ThreadingHTTPServer(('127.0.0.1', 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}'
    server.shutdown()
    server.server_close()


@pytest.mark.slow
def test_the_hub_takes_it_and_timm_builds_it(run: Path, hub: str, tmp_path: Path) -> None:
    env = tool_runs.environment(
        HF_ENDPOINT=hub, HF_TOKEN='hf_x', HF_HOME=str(tmp_path / 'home'), HF_HUB_DISABLE_XET='1'
    )
    code = 'import sys; from repnext_mm.publish import main; sys.exit(main(sys.argv[1:]))'
    command = [sys.executable, '-c', code, str(run / 'epoch_2.pth'), '--push', 'owner/name']
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert 'Uploaded ' in done.stdout
    assert set(Hub.files) >= {'model.safetensors', 'config.json', 'README.md'}
    assert not any(name.endswith('.bin') for name in Hub.files), 'no pickle'
    settings = json.loads(Hub.files['config.json'])
    assert settings['architecture'] == 'repnext_m0' and settings['num_classes'] == 5
    assert settings['pretrained_cfg']['input_size'] == [3, 64, 64]
    assert settings['label_names'] == [*shapes.THINGS]

    code = (
        'import timm, torch, repnext_mm.timm\n'
        "model = timm.create_model('hf-hub:owner/name', pretrained=True).eval()\n"
        "torch.save(model.state_dict(), 'back.pth')\n"
        'print(timm.data.resolve_model_data_config(model)["input_size"])'
    )
    done = subprocess.run(
        [sys.executable, '-c', code], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip().endswith('(3, 64, 64)')
    back = torch.load(tmp_path / 'back.pth', weights_only=True)
    raw = torch.load(run / 'epoch_2.pth', weights_only=True)['state_dict']
    assert all(torch.equal(raw[f'network.{key}'], value) for key, value in back.items())


@pytest.mark.slow
def test_a_hub_that_refuses(run: Path, tmp_path: Path) -> None:
    env = tool_runs.environment(HF_ENDPOINT='http://127.0.0.1:9', HF_TOKEN='hf_x')
    code = 'import sys; from repnext_mm.publish import main; sys.exit(main(sys.argv[1:]))'
    command = [sys.executable, '-c', code, str(run / 'epoch_2.pth'), '--push', 'owner/name']
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 1
    assert 'http://127.0.0.1:9 did not take owner/name' in done.stderr
    assert 'Traceback' not in done.stderr

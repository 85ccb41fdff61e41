"""The command `repnext-mm`: its subcommands, names of configs, the list of models, completion."""

from __future__ import annotations

import json
import os
import pty
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import repnext_mm_cli
from blocking import block
from conftest import REPO
from repnext_mm_cli import COMMANDS, __main__, completion, main

from repnext_mm import configs, model_list
from repnext_mm.deploy.source import load_source
from repnext_mm.engine.config_file import find_config
from repnext_mm.engine.errors import UserError
from repnext_mm.published_results import published_results

#: Subcommands that a script of tools/ also runs.
TOOLS = ('train', 'test', 'deploy', 'benchmark', 'demo')


@pytest.fixture(autouse=True)
def _arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, 'argv', sys.argv)  # which a subcommand sets


def run(*command: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    path = [env.pop('first', ''), str(REPO), str(REPO / 'tools'), os.environ.get('PYTHONPATH', '')]
    env = {**os.environ, 'PYTHONPATH': os.pathsep.join(filter(None, path)), **env}
    arguments = [sys.executable, '-W', 'ignore', *map(str, command)]
    return subprocess.run(arguments, capture_output=True, text=True, env=env)


# --- subcommands


def test_help_lists_every_command_and_imports_nothing(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit, match='0'):
        main(['--help'])
    rows = capsys.readouterr().out.splitlines()
    for name, (_, text) in COMMANDS.items():
        assert f'  {name:<12}{text}' in rows
    code = """
import sys
before = set(sys.modules)
from repnext_mm_cli import main
try:
    main(['--help'])
finally:
    print({name.split('.')[0] for name in set(sys.modules) - before} - sys.stdlib_module_names)
"""
    assert run('-c', code).stdout.splitlines()[-1] == "{'repnext_mm_cli'}"


def test_no_command_is_an_error(capsys: pytest.CaptureFixture) -> None:
    assert main([]) == 2
    assert 'commands:' in capsys.readouterr().err


@pytest.mark.parametrize(
    'typed, hint',
    [('trian', 'did you mean train?'), ('modles', 'did you mean models?'), ('xyz', 'there are tr')],
)
def test_an_unknown_command_is_one_sentence(
    typed: str, hint: str, capsys: pytest.CaptureFixture
) -> None:
    assert main([typed, '--help']) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f'no subcommand {typed!r}; {hint}' in line


@pytest.mark.parametrize('name', COMMANDS)
def test_usage_names_the_command(
    name: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit, match='0'):
        main([name, '--help'])
    assert capsys.readouterr().out.startswith(f'usage: repnext-mm {name} ')
    if name in TOOLS:
        assert (REPO / 'tools' / f'{name}.py').is_file()
        monkeypatch.setattr(sys, 'argv', [str(REPO / 'tools' / f'{name}.py'), '--help'])
        with pytest.raises(SystemExit, match='0'):
            repnext_mm_cli.load(name)()
        assert capsys.readouterr().out.startswith(f'usage: tools/{name}.py ')


def test_a_command_that_cannot_be_imported_says_so(tmp_path: Path) -> None:
    block(tmp_path, 'torch')
    done = run('-m', 'repnext_mm_cli', 'train', 'x', first=str(tmp_path))
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: repnext-mm train cannot be imported: No module named 'torch'")
    assert line.endswith('`repnext-mm doctor` says what to install.')


def test_the_module_is_the_command() -> None:
    assert __main__.main is main


# --- names of configs


def test_names_resolve_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    name = 'mask_rcnn_repnext_m4_coco'
    packaged = configs.FOLDER / f'{name}.py'
    for typed in (name, f'{name}.py', f'configs/{name}', f'configs/{name}.py'):
        assert find_config(typed) == packaged
    (tmp_path / 'configs').mkdir()
    own = tmp_path / 'configs' / f'{name}.py'
    own.touch()
    for typed in (name, f'{name}.py', f'configs/{name}', f'configs/{name}.py'):
        assert find_config(typed).absolute() == own
    here = tmp_path / f'{name}.py'
    here.touch()
    for typed in (name, f'{name}.py', str(here)):
        assert find_config(typed).absolute() == here


def test_a_folder_of_the_same_name_does_not_hide_a_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'mask_rcnn_repnext_m4_coco').mkdir()
    assert find_config('mask_rcnn_repnext_m4_coco').parent == configs.FOLDER


def test_deploy_takes_the_name_of_a_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = load_source('semantic_fpn_repnext_m0_ade20k')
    assert source.config == source.name == 'semantic_fpn_repnext_m0_ade20k'
    assert load_source('repnext_m0').config is None


@pytest.mark.parametrize(
    'typed, hint',
    [
        ('mask_rcnn_repnet_m4_coco', 'did you mean mask_rcnn_repnext_m4_coco?'),
        ('mine/pest.py', 'did you mean mine/pets.py?'),
        ('zzz', '`repnext-mm models` lists those there are.'),
        ('mine', 'mine is a folder; name one config file in it.'),
    ],
)
def test_a_wrong_name_gets_one_sentence(
    typed: str, hint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine' / 'pets.py').touch()
    with pytest.raises(UserError) as caught:
        find_config(typed)
    assert str(caught.value).endswith(hint)
    assert '\n' not in str(caught.value)


# --- repnext-mm models


def test_models_lists_every_network_and_config(capsys: pytest.CaptureFixture) -> None:
    assert main(['models', '--json']) == 0
    listed = json.loads(capsys.readouterr().out)
    tables = published_results()
    networks = {row['name']: row['published'] for row in listed['networks']}
    assert set(networks) == {name for name in tables['imagenet'] if not name.startswith('_')}
    assert networks['repnext_m4']['top1_distilled'] == tables['imagenet']['repnext_m4'][3]
    assert networks['inception_next_tiny']['top1'] == tables['imagenet']['inception_next_tiny'][4]
    assert 'top1_distilled' not in networks['inception_next_tiny']
    rows = {row['name']: row for row in listed['configs']}
    files = (path for path in (REPO / 'configs').rglob('*.py') if '_base_' not in path.parts)
    assert set(rows) == {path.stem for path in files}
    box, mask = (tables['coco_mask_rcnn_1x']['repnext_m4'][i] for i in (0, 3))
    assert rows['mask_rcnn_repnext_m4_coco']['published'] == {'box_AP': box, 'mask_AP': mask}
    assert rows['mask_rcnn_repnext_m4_coco']['network'] == 'repnext_m4'
    assert rows['mask_rcnn_repnext_m0_shapes']['published'] == {}
    for name, row in rows.items():
        assert find_config(name).samefile(row['path'])


@pytest.mark.parametrize('pattern', ['repnext_m4', 'RepNeXt-M4', '*repnext_m4*'])
def test_models_are_filtered_by_name(pattern: str, capsys: pytest.CaptureFixture) -> None:
    assert main(['models', pattern]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith('│')]
    figures = {row[1]: row[3::2] for row in rows}
    assert set(figures) >= {'repnext_m4', 'mask_rcnn_repnext_m4_coco'}
    assert all('repnext_m4' in name for name in figures)
    assert figures['semantic_fpn_repnext_m4_ade20k'] == ['-', '-', '-', '43.3']
    assert figures['repnext_m4_distill_imagenet'][0] == '82.3'


def test_no_model_matches(capsys: pytest.CaptureFixture) -> None:
    assert main(['models', 'repnxt_m4']) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "error: no network or config matches 'repnxt_m4'; did you mean repnext_m4?"
    assert model_list.matches('m4', 'repnext_m4')
    assert not model_list.matches('m4*', 'repnext_m4')


# --- completion


@pytest.fixture(scope='module')
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp('completion')
    for shell in completion.SHELLS:
        done = run('-m', 'repnext_mm_cli', 'completion', shell)
        assert done.returncode == 0, done.stderr
        (folder / shell).write_text(done.stdout)
    return folder


COMPLETIONS = [
    (['tr'], ['train']),
    (['train', 'mask_rcnn_repnext_m4'], ['mask_rcnn_repnext_m4_coco']),
    (['train', 'my_o'], ['my_own.py']),
    (['train', 'x', '--auto'], ['--auto-scale-lr']),
    (['test', 'x', 'my_o'], ['my_own.py']),
    (['deploy', 'export', 'recnext_a5_'], ['recnext_a5_distill_imagenet', 'recnext_a5_imagenet']),
    (['deploy', 'export', 'x', '--plan', 'si'], ['single']),
    (['benchmark', 'train-step', 'recnext_a5'], ['recnext_a5']),
    (['completion', 'z'], ['zsh']),
]


@pytest.mark.parametrize('words, wanted', COMPLETIONS, ids=lambda value: ' '.join(value))
def test_bash_completes(words: list[str], wanted: list[str], scripts: Path, tmp_path: Path) -> None:
    bash = shutil.which('bash')
    if bash is None:
        pytest.skip('bash is not installed')
    (tmp_path / 'my_own.py').touch()
    code = """
source "$1"; shift
function=$(complete -p repnext-mm | sed 's/.*-F \\([^ ]*\\) .*/\\1/')
COMP_WORDS=(repnext-mm "$@") COMP_CWORD=$#
$function repnext-mm "${@: -1}" "${@: -2:1}"
printf '%s\\n' "${COMPREPLY[@]}"
"""
    done = subprocess.run(
        [bash, '--norc', '-c', code, 'bash', scripts / 'bash', *words],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == wanted, done.stderr


@pytest.mark.parametrize('words, wanted', COMPLETIONS, ids=lambda value: ' '.join(value))
def test_zsh_completes(words: list[str], wanted: list[str], scripts: Path, tmp_path: Path) -> None:
    zsh = shutil.which('zsh')
    if zsh is None:
        pytest.skip('zsh is not installed')
    (tmp_path / 'my_own.py').touch()
    terminal, of_zsh = pty.openpty()
    process = subprocess.Popen(
        [zsh, '-f', '-i'],
        cwd=tmp_path,
        env={'PATH': os.environ['PATH'], 'TERM': 'dumb'},
        stdin=of_zsh,
        stdout=of_zsh,
        stderr=of_zsh,
        start_new_session=True,
    )
    try:
        setup = f'autoload -Uz compinit; compinit -D -u; eval "$(<{scripts / "zsh"})"; PS1=; '
        # The prompt's arithmetic: what is typed does not hold the answer that is waited for.
        os.write(terminal, f'{setup} print READY$((6 * 7))\n'.encode())
        read_until(terminal, 'READY42')
        # A word completed alone is followed by a space, and `#` ends the line with it.
        os.write(terminal, f'repnext-mm {" ".join(words)}\t'.encode())
        line = f'repnext-mm {" ".join([*words[:-1], *wanted])}'
        assert line in read_until(terminal, line)
    finally:
        process.kill()
        process.wait()
        os.close(terminal)
        os.close(of_zsh)


def read_until(terminal: int, text: str, patience: float = 60) -> str:
    """What a program prints until `text` is in it, without what moves the cursor."""
    seen = ''
    deadline = time.monotonic() + patience
    while text not in seen:
        ready, _, _ = select.select([terminal], [], [], max(0, deadline - time.monotonic()))
        assert ready, f'{text!r} does not come after {seen!r}'
        seen += os.read(terminal, 4096).decode(errors='replace')
    return seen


def test_completion_knows_every_command(scripts: Path) -> None:
    for name in COMMANDS:
        assert completion.command_parser(name), name
    assert completion.command_parser('train').prog == 'repnext-mm train'


def test_completion_says_what_it_leaves_out(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(COMMANDS, 'absent', ('repnext_mm_absent:main', 'is not there'))
    assert completion.command_parser('absent') is None
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith('warning: without the options of repnext-mm absent: No module named')


def test_completion_of_an_unknown_shell(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit, match='2'):
        main(['completion', 'fish'])
    assert "invalid choice: 'fish'" in capsys.readouterr().err

"""Weights by published name, URL and path, from a server on loopback."""

from __future__ import annotations

import functools
import hashlib
import io
import multiprocessing
import re
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from conftest import randomise
from filelock import FileLock
from weight_files import (
    HTML,
    assert_holds,
    classifier,
    fused_classifier,
    fused_state,
    refuse,
    save_bare,
    save_evil,
    save_hub,
    save_release,
    save_timm,
    save_torchscript,
    state_of,
)

from repnext_mm import InceptionNeXt, RecNeXt, RepNeXt
from repnext_mm.checkpoints import (
    PUBLISHED,
    fetch,
    load_pretrained,
    read_weights,
)
from repnext_mm.files import FolderBusy, hold, let_go, lock_owner


class Server(ThreadingHTTPServer):
    """A release page on loopback; counts what it is asked for."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(('127.0.0.1', 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.claim_more = 0
        self.delay = 0.0
        self.stall = 0.0
        self.redirects: dict[str, str] = {}
        self.headers: dict[str, str] = {}

    def url(self, path: str) -> str:
        return f'http://127.0.0.1:{self.server_port}{path}'


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        time.sleep(self.server.delay)
        if target := self.server.redirects.get(self.path):
            self.send_response(302)
            self.send_header('Location', target)
            for name, value in self.server.headers.items():
                self.send_header(name, value)
            self.end_headers()
            return
        body = self.server.files.get(self.path)
        if body is None:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header('Content-Length', str(len(body) + self.server.claim_more))
        self.end_headers()
        if self.server.stall:
            self.wfile.write(body[:100])
            self.wfile.flush()
            time.sleep(self.server.stall)
            return
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A torch.hub folder of the test's own."""
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'torch_home'))
    return tmp_path / 'torch_home' / 'hub' / 'checkpoints'


def cached(cache: Path) -> list[str]:
    """Files in the cache, without the locks that stay there and the digests."""
    return sorted(p.name for p in cache.iterdir() if p.suffix not in ('.lock', '.sha256'))


@pytest.fixture
def release(server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Server:
    """The server holds the release files of m0, and the published names point there."""
    files = {
        'repnext_m0_distill_300e': save_release,
        'repnext_m0_distill_300e_fused': lambda p: save_torchscript(p, fused_classifier()),
        'repnext_m0_sz224_4xbs512_ep300': functools.partial(save_timm, with_ema=True),
    }
    for name, save in files.items():
        row = PUBLISHED[name]
        save(tmp_path / row.filename)
        server.files[f'/v1.0/{row.filename}'] = (tmp_path / row.filename).read_bytes()
        url = server.url(f'/v1.0/{row.filename}')
        monkeypatch.setitem(PUBLISHED, name, replace(row, url=url))
    return server


def test_published_names() -> None:
    """The names and addresses that the projects' READMEs link, and timm's table."""
    github = 'https://github.com/suous/{}/releases/download/{}'
    hub = 'https://huggingface.co/{}/resolve/main/model.safetensors'
    urls = {
        'repnext_m4_distill_300e': github.format('RepNeXt', 'v1.0/repnext_m4_distill_300e.pth'),
        'recnext_m1_without_distill_300e_fused': github.format(
            'RecNeXt', 'v1.0/recnext_m1_without_distill_300e_fused.pt'
        ),
        'recnext_s_share_channel_distill_300e': github.format(
            'RecNeXt', 'v2.0/recnext_s_share_channel_distill_300e.pth'
        ),
        'recnext_m5_ade20k': github.format('RecNeXt', 'v1.0/recnext_m5_ade20k.pth'),
        'recnext_a3_coco': github.format('RecNeXt', 'v2.0/recnext_a3_coco.pth'),
        'recnext_a0.dist_300e_in1k': hub.format('suous/recnext_a0.dist_300e_in1k'),
        'recnext_b_share_channel.base_300e_in1k': hub.format(
            'suous/recnext_b_share_channel.base_300e_in1k'
        ),
        'inception_next_tiny.sail_in1k': hub.format('timm/inception_next_tiny.sail_in1k'),
        'inception_next_base.sail_in1k_384': hub.format('timm/inception_next_base.sail_in1k_384'),
    }
    for name, url in urls.items():
        assert PUBLISHED[name].url == url
    assert PUBLISHED['repnext_m5_distill_300e_fused'].plan == 'upstream'
    assert PUBLISHED['recnext_t_distill_300e_fused'].plan == 'upstream'
    names = {row.filename for row in PUBLISHED.values()}
    assert {
        'repnext_m0_distill_300e_fused.pt',
        'repnext_m2_sz224_4xbs512_ep300.pth.tar',
        'repnext_m1_sz224_4xbs256_ep300_distill.pth.tar',
        'repnext_m3_coco.pth',
        'repnext_m5_ade20k.pth',
        'recnext_a0.dist_300e_in1k.safetensors',
    } <= names
    repnext = 6 + 6 + 3 + 3 + 3 + 3
    # 18 variants with and without distillation: trained, fused, on the hub; then 6 for each task.
    recnext = 18 * 2 * 3 + 2 * 6
    assert len(names) == len({row.url for row in PUBLISHED.values()}) == len(PUBLISHED)
    assert len(PUBLISHED) == repnext + recnext + 5
    families = {f.__name__: f for f in (RepNeXt, RecNeXt, InceptionNeXt)}
    for name, row in PUBLISHED.items():
        assert row.arch in families[row.family].arch_zoo
        assert f'next_{row.arch}' in name


def test_timm_publishes_what_is_listed_of_it() -> None:
    import timm

    theirs = set(timm.list_pretrained('inception_next*'))
    assert theirs == {n for n, row in PUBLISHED.items() if row.family == 'InceptionNeXt'}


@pytest.mark.parametrize(
    'name, deploy',
    [
        ('repnext_m0_distill_300e', False),
        ('repnext_m0_distill_300e', True),
        ('repnext_m0_distill_300e_fused', 'upstream'),
        ('repnext_m0_sz224_4xbs512_ep300', False),
    ],
)
def test_published_name_is_downloaded_once(
    name: str, deploy: str | bool, release: Server, cache: Path
) -> None:
    for _ in range(2):
        model = RepNeXt('m0', deploy=deploy, init_cfg=dict(type='Pretrained', checkpoint=name))
        model.init_weights()
    plan = 'full' if deploy is True else deploy
    expected = fused_state(plan=plan) if plan else state_of()  # type: ignore[arg-type]
    for key, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, expected[key])
    assert release.asked == [f'/v1.0/{PUBLISHED[name].filename}']
    assert cached(cache) == [PUBLISHED[name].filename]


def test_published_name_of_another_arch_is_not_even_downloaded(release: Server) -> None:
    refuse(
        'repnext_m0_distill_300e',
        "holds RepNeXt(arch='m0')",
        'repnext_m3_distill_300e',
        model=RepNeXt('m3'),
    )
    refuse('repnext_m0_distill_300e_fused', "deploy='upstream'", 'repnext_m0_distill_300e')
    assert release.asked == []


def test_unknown_name_gets_the_closest_and_its_siblings() -> None:
    text = refuse('repnext_m4_distil_300', "did you mean 'repnext_m4_distill_300e'", '--list')
    assert all(name in text for name in PUBLISHED if name.startswith('repnext_m4_'))
    refuse('repnext-m4', "did you mean 'repnext_m4")
    refuse('recnext_a3.dist_300e', "did you mean 'recnext_a3.dist_300e_in1k'")


def test_path_that_looks_published_says_so(tmp_path: Path) -> None:
    refuse(
        tmp_path / 'repnext_m4_distill_300e.pth',
        str(tmp_path),
        "checkpoint='repnext_m4_distill_300e' downloads it",
    )


def test_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_bare(tmp_path / 'my weights.pth')
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for text in (path, str(path), path.as_uri(), '~/my weights.pth', 'my weights.pth'):
        assert fetch(text).path.samefile(path)
    refuse('s3://bucket/a.pth', 's3://', 'http, https or file')


def test_url(server: Server, cache: Path, tmp_path: Path) -> None:
    server.files['/a/w.pth'] = save_release(tmp_path / 'a.pth').read_bytes()
    server.files['/b/w.pth'] = save_bare(tmp_path / 'b.pth', 'module.').read_bytes()
    for _ in range(2):
        for path in ('/a/w.pth', '/b/w.pth'):
            model = RepNeXt('m0')
            report = load_pretrained(model, server.url(path))
            assert_holds(model, state_of())
    assert report.match.prefix == 'module.'
    assert server.asked == ['/a/w.pth', '/b/w.pth']
    assert len(cached(cache)) == 2
    assert all(name.endswith('-w.pth') for name in cached(cache))


def flip_a_byte(data: bytes) -> bytes:
    """Damage one weight, which no parser notices."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        info = max(archive.infolist(), key=lambda info: info.file_size)
    at = info.header_offset + 1000
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


@pytest.mark.parametrize(
    'body, fragment',
    [
        (lambda data: None, '404'),
        (lambda data: HTML, 'web page'),
        (lambda data: b'', 'empty'),
        (lambda data: data[: len(data) // 2], 'cut short'),
        (flip_a_byte, 'checksum'),
    ],
    ids=['404', 'web page', 'empty', 'cut', 'damaged'],
)
def test_bad_download_is_not_kept(
    body: Callable[[bytes], bytes | None],
    fragment: str,
    server: Server,
    cache: Path,
    tmp_path: Path,
) -> None:
    good = save_bare(tmp_path / 'a.pth').read_bytes()
    bad = body(good)
    if bad is not None:
        server.files['/w.pth'] = bad
    refuse(server.url('/w.pth'), server.url('/w.pth'), fragment)
    assert cached(cache) == []
    server.files['/w.pth'] = good
    model = RepNeXt('m0')
    load_pretrained(model, server.url('/w.pth'))
    assert_holds(model, state_of())


@pytest.mark.parametrize('legacy', [False, True])
def test_connection_lost_on_the_way(
    legacy: bool, server: Server, cache: Path, tmp_path: Path
) -> None:
    data = save_bare(tmp_path / 'a.pth', legacy=legacy).read_bytes()
    server.files['/w.pth'] = data[:-5000]
    server.claim_more = 5000
    refuse(server.url('/w.pth'), server.url('/w.pth'))
    assert cached(cache) == []


def test_hostile_download_is_not_kept(server: Server, cache: Path, tmp_path: Path) -> None:
    server.files['/w.pth'] = save_evil(tmp_path / 'a.pth').read_bytes()
    refuse(server.url('/w.pth'), 'posix.system')
    assert cached(cache) == []
    assert not (tmp_path / 'ran').exists()


def test_no_server(server: Server, cache: Path) -> None:
    url = server.url('/w.pth')
    server.shutdown()
    server.server_close()
    refuse(url, url, 'refused', str(cache))


def test_cache_that_cannot_be_written(server: Server, cache: Path) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_text('a file where the folder should be')
    refuse(server.url('/w.pth'), 'could not be fetched', str(cache))
    assert server.asked == []


def test_processes_that_start_together_download_once(release: Server) -> None:
    name = 'repnext_m0_distill_300e'
    release.delay = 0.5
    context = multiprocessing.get_context('fork')
    with context.Pool(3) as pool:
        paths = [file.path for file in pool.map(fetch, [name] * 3, chunksize=1)]
    assert len(set(paths)) == 1
    assert read_weights(paths[0]).tensors.keys() == (state_of() | classifier()).keys()
    assert len(release.asked) == 1


# --- digests


def weights_at(server: Server, path: str, tmp_path: Path) -> bytes:
    save_bare(tmp_path / 'w.pth')
    server.files[path] = (tmp_path / 'w.pth').read_bytes()
    return server.files[path]


@pytest.mark.parametrize('place', [100, -300])
def test_cached_file_that_changed(server: Server, cache: Path, tmp_path: Path, place: int) -> None:
    weights_at(server, '/w.pth', tmp_path)
    path = fetch(server.url('/w.pth')).path
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    refuse(server.url('/w.pth'), str(path), 'delete', 'SHA-256')
    path.unlink()
    fetch(server.url('/w.pth'))
    assert len(server.asked) == 2


def test_cached_file_that_is_cut_short(server: Server, cache: Path, tmp_path: Path) -> None:
    weights_at(server, '/w.pth', tmp_path)
    path = fetch(server.url('/w.pth')).path
    path.write_bytes(path.read_bytes()[:-50])
    refuse(server.url('/w.pth'), str(path), 'delete')


def test_first_use_of_a_file_that_lies_there_records_it(
    server: Server, cache: Path, tmp_path: Path
) -> None:
    weights_at(server, '/w.pth', tmp_path)
    path = fetch(server.url('/w.pth')).path
    record = path.with_name(f'{path.name}.sha256')
    written = record.read_text()
    record.unlink()
    assert fetch(server.url('/w.pth')).sha256 in record.read_text() == written


@pytest.mark.parametrize('right', [True, False])
def test_digest_in_the_file_name(server: Server, cache: Path, tmp_path: Path, right: bool) -> None:
    digest = hashlib.sha256(weights_at(server, '/x', tmp_path)).hexdigest()
    name = f'/w-{digest[:8] if right else "0123abcd"}.pth'
    weights_at(server, name, tmp_path)
    if right:
        assert fetch(server.url(name)).sha256 == digest
    else:
        refuse(server.url(name), '0123abcd', digest[:16])
        assert cached(cache) == []


@pytest.mark.parametrize('right', [True, False])
def test_digest_that_the_hub_tells(
    server: Server, cache: Path, tmp_path: Path, right: bool
) -> None:
    digest = hashlib.sha256(weights_at(server, '/real', tmp_path)).hexdigest()
    told = digest if right else '0' * 64
    server.redirects['/w.pth'] = server.url('/real')
    server.headers = {'X-Linked-ETag': f'"{told}"'}
    if right:
        fetch(server.url('/w.pth'))
    else:
        refuse(server.url('/w.pth'), '0' * 16, digest[:16])
        assert cached(cache) == []


# --- the connection


@pytest.mark.parametrize('target', ['file:///etc/passwd', 'ftp://127.0.0.1/w.pth', 'data:,x'])
def test_redirect_that_leaves_http(server: Server, cache: Path, target: str) -> None:
    server.redirects['/w.pth'] = target
    refuse(server.url('/w.pth'), 'redirect', target.split(':')[0])


@pytest.mark.parametrize('where', ['connection', 'on the way'])
def test_server_that_sends_nothing(
    where: str, server: Server, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr('repnext_mm.checkpoints.fetching.STALL_SECONDS', 0.5)
    weights_at(server, '/w.pth', tmp_path)
    if where == 'connection':
        server.delay = 3
    else:
        server.stall = 3
    start = time.monotonic()
    refuse(server.url('/w.pth'), server.url('/w.pth'), 'nothing came')
    assert time.monotonic() - start < 2.5
    assert cached(cache) == []


def test_waiting_for_another_process_is_said(
    server: Server, cache: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    weights_at(server, '/w.pth', tmp_path)
    server.delay = 1.0
    context = multiprocessing.get_context('fork')
    with context.Pool(2) as pool:
        pool.map(fetch, [server.url('/w.pth')] * 2, chunksize=1)
    waiting = [line for line in capfd.readouterr().err.splitlines() if 'Waiting' in line]
    assert len(waiting) == 1
    assert re.search(r'process \d+', waiting[0])


def test_the_owner_of_a_lock_may_write_late(tmp_path: Path) -> None:
    lock = FileLock(tmp_path / 'lock')  # taken, and its file is still empty
    lock.acquire()
    writing = threading.Timer(0.2, lambda: (tmp_path / 'lock').write_text('process 7'))
    writing.start()
    with pytest.raises(FolderBusy, match='process 7'):
        hold(tmp_path / 'lock')
    writing.join()
    let_go(lock)
    assert lock_owner(tmp_path / 'lock') is None
    let_go(hold(tmp_path / 'lock', timeout=-1))
    assert not (tmp_path / 'lock').exists()


def test_what_a_killed_download_left_is_cleared_and_no_other(
    server: Server, cache: Path, tmp_path: Path
) -> None:
    weights_at(server, '/w.pth', tmp_path)
    weights_at(server, '/v.pth', tmp_path)
    server.stall = 60
    context = multiprocessing.get_context('fork')
    running = [context.Process(target=fetch, args=(server.url(f'/{name}.pth'),)) for name in 'wv']
    for process in running:
        process.start()
    end = time.monotonic() + 20
    while len(list(cache.glob('.download-*'))) < 2:
        assert time.monotonic() < end
        time.sleep(0.05)
    running[0].kill()
    running[0].join()
    server.stall = 0
    fetch(server.url('/w.pth'))
    left = [p.name for p in cache.glob('.download-*')]
    assert len(left) == 1
    assert 'v.pth' in left[0]
    running[1].kill()
    running[1].join()


@pytest.fixture
def hub(server: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    """The server stands in for the Hugging Face hub."""
    monkeypatch.setenv('HF_ENDPOINT', server.url('/'))
    return server


def test_hub_names(hub: Server, cache: Path, tmp_path: Path) -> None:
    state = dict(randomise(RecNeXt('m0')).state_dict())
    path = save_hub(tmp_path / 'a', state | classifier())
    address = '/suous/recnext_m0.dist_300e_in1k/resolve/main/model.safetensors'
    hub.files[address] = path.read_bytes()
    name = 'recnext_m0.dist_300e_in1k'
    for spelt in (name, f'suous/{name}', f'hf-hub:suous/{name}', f'hf_hub:suous/{name}'):
        model = RecNeXt('m0')
        load_pretrained(model, spelt)
        assert_holds(model, state)
    assert hub.asked == [address]
    assert cached(cache) == [f'{name}.safetensors']
    refuse(f'timm/{name}', 'there is no file', model=RecNeXt('m0'))
    refuse(name, "holds RecNeXt(arch='m0')", 'recnext_a0.dist_300e_in1k', model=RecNeXt('a0'))
    refuse('recnext_m0.base_300e_in1k', '404', hub.url('/suous/'), model=RecNeXt('m0'))


def test_weights_of_timm_give_the_features_of_timm(
    hub: Server, cache: Path, tmp_path: Path
) -> None:
    import timm

    theirs = randomise(timm.create_model('inception_next_atto', num_classes=5)).eval()
    path = save_hub(tmp_path / 'a', dict(theirs.state_dict()))
    address = '/timm/inception_next_atto.sail_in1k/resolve/main/model.safetensors'
    hub.files[address] = path.read_bytes()
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = theirs.forward_intermediates(image, intermediates_only=True)
    for name in ('inception_next_atto.sail_in1k', 'inception_next_atto'):
        model = InceptionNeXt('atto', init_cfg=dict(type='Pretrained', checkpoint=name))
        model.init_weights()
        with torch.no_grad():
            for ours, other in zip(model.eval()(image), expected, strict=True):
                torch.testing.assert_close(ours, other)
    assert hub.asked == [address]

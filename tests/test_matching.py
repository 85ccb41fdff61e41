"""Which network a file fits, and where in the file that is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import randomise
from weight_files import (
    assert_holds,
    drop,
    fused_state,
    refuse,
    saved,
    state_of,
    under,
)

from repnext_mm import InceptionNeXt, RecNeXt, RepNeXt, reparameterize
from repnext_mm.checkpoints import (
    load_pretrained,
)


def test_wrong_arch_of_a_fused_file(tmp_path: Path) -> None:
    torch.save(fused_state('m0'), tmp_path / 'a.pth')
    refuse(tmp_path / 'a.pth', "build RepNeXt(arch='m0', deploy='upstream')", model=RepNeXt('m1'))


#: What a file contains, and the network that it is loaded into. All of m3's keys are in m4 with
#: equal shapes.
WRONG = {
    'm4 for m3': ((RepNeXt, 'm4'), (RepNeXt, 'm3'), ''),
    'm3 for m4': ((RepNeXt, 'm3'), (RepNeXt, 'm4'), ''),
    'branches for one kernel': ((RepNeXt, 'm0'), (RepNeXt, 'm0e'), ''),
    'inside a detector': ((RepNeXt, 'm2'), (RepNeXt, 'm0'), 'backbone.'),
    'RecNeXt for RepNeXt': ((RecNeXt, 'm0'), (RepNeXt, 'm0'), ''),
    'A for M': ((RecNeXt, 'a0'), (RecNeXt, 'm0'), ''),
    'shared channels': ((RecNeXt, 's_share_channel'), (RecNeXt, 's'), ''),
    'InceptionNeXt for RepNeXt': ((InceptionNeXt, 'atto'), (RepNeXt, 'm0'), ''),
}


@pytest.mark.parametrize('holder, asked, prefix', WRONG.values(), ids=WRONG)
def test_the_right_family_and_arch_are_named(
    holder: tuple, asked: tuple, prefix: str, tmp_path: Path
) -> None:
    (family, arch), (other, other_arch) = holder, asked
    saved(tmp_path / 'a.pth', {'state_dict': under(prefix, family(arch).state_dict())})
    text = refuse(
        tmp_path / 'a.pth', f'{other.__name__}(arch={other_arch!r})', model=other(other_arch)
    )
    assert text.endswith(f'it fits {family.__name__}(arch={arch!r}).')


def test_custom_arch(tmp_path: Path) -> None:
    arch = dict(channels=(8, 16, 32, 64), depths=(1, 1, 1, 1))
    small = randomise(RepNeXt(arch))
    torch.save(small.state_dict(), tmp_path / 'a.pth')
    model = RepNeXt(arch)
    load_pretrained(model, tmp_path / 'a.pth')
    assert_holds(model, dict(small.state_dict()))
    load_pretrained(RepNeXt(arch, deploy=True), tmp_path / 'a.pth')
    torch.save(reparameterize(small.eval(), 'upstream').state_dict(), tmp_path / 'b.pth')
    refuse(tmp_path / 'b.pth', "RepNeXt(arch=dict(...), deploy='upstream')", model=model)


def test_another_network_fits_nothing(tmp_path: Path) -> None:
    import timm

    torch.save(timm.create_model('resnet10t').state_dict(), tmp_path / 'resnet.pth')
    refuse(tmp_path / 'resnet.pth', '0 of', 'no network of this package', 'conv1')


def test_threshold_is_99_percent_of_both(tmp_path: Path) -> None:
    state = state_of()
    weights = [k for k in state if not k.endswith('num_batches_tracked')]
    spare = {f'stages.0.extra.{i}': torch.zeros(1) for i in range(7)}
    report = load_pretrained(RepNeXt('m0'), saved(tmp_path / 'a.pth', drop(state, weights[:6])))
    assert 0.99 <= report.match.ratio < 1
    assert report.match.missing == weights[:6]
    refuse(
        saved(tmp_path / 'b.pth', drop(state, weights[:7])), '650 of 657 keys match', '7 missing'
    )
    refuse(saved(tmp_path / 'c.pth', state | spare), '657 of 664 keys match', '7 unexpected')
    reshaped = {k: torch.zeros(2, 2) for k in weights[:7]}
    refuse(saved(tmp_path / 'd.pth', state | reshaped), '650 of 657', '7 of another shape')


def test_prefix(tmp_path: Path) -> None:
    student, teacher = state_of(), {k: v + 1 for k, v in state_of().items()}
    path = saved(tmp_path / 'a.pth', under('student.', student) | under('teacher.', teacher))
    refuse(path, "'student.' and 'teacher.'", 'prefix=')
    model = RepNeXt('m0')
    for prefix in ('teacher', 'teacher.'):
        report = load_pretrained(model, path, prefix=prefix)
        assert_holds(model, teacher)
    assert report.match.ignored == {'student': 657}
    refuse(path, "prefix='backbone.'", "'student', 'teacher'", prefix='backbone')


def test_larger_network_beside_it_is_not_taken(tmp_path: Path) -> None:
    state = under('teacher.', RepNeXt('m4').state_dict()) | under('student.', state_of('m3'))
    model = RepNeXt('m3')
    report = load_pretrained(model, saved(tmp_path / 'a.pth', state))
    assert report.match.prefix == 'student.'
    assert_holds(model, state_of('m3'))

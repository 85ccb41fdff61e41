"""Say what a weight file contains: `python -m repnext_mm.checkpoints FILE`."""

from __future__ import annotations

import argparse
import sys

from .errors import CheckpointError
from .fetching import fetch
from .matching import find_fit
from .published import PUBLISHED
from .reading import read_weights


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog='python -m repnext_mm.checkpoints',
        description='Say what a weight file contains and which backbone it fits; none of it runs.',
    )
    parser.add_argument('checkpoint', nargs='?', help='published name, URL or path')
    parser.add_argument('--list', action='store_true', help='list the published names')
    parser.add_argument('--prefix', help="where the backbone's keys begin (default: found)")
    parser.add_argument(
        '--container', help='key of the weights in a torch checkpoint (default: the first there is)'
    )
    args = parser.parse_args(argv)
    if args.list:
        for row in PUBLISHED.values():
            print(
                f'{row.name}  {row.family}({row.arch!r}), {row.plan or "training form"}, {row.url}'
            )
        return 0
    if args.checkpoint is None:
        parser.error('give a checkpoint, or --list')
    try:
        weights = read_weights(fetch(args.checkpoint), container=args.container)
        shapes = {name: tensor.shape for name, tensor in weights.tensors.items()}
        fit = find_fit(shapes, args.prefix)
    except CheckpointError as err:
        print(err, file=sys.stderr)
        return 1
    values = sum(tensor.numel() for tensor in weights.tensors.values())
    dtypes = sorted({str(t.dtype) for t in weights.tensors.values()})
    print(f'{args.checkpoint}: {weights}, {values / 1e6:.2f} M values, {", ".join(dtypes)}')
    if fit is None:
        print('fits no backbone of this package')
        return 0
    match = fit.match
    ignored = ', '.join(f'{group} {count}' for group, count in match.ignored.items()) or 'nothing'
    print(f'fits {fit}: {len(match.matched)} of {match.total} keys match, ignored: {ignored}')
    if match.prefix:
        print(f'the backbone is under {match.prefix!r}')
    return 0


if __name__ == '__main__':
    sys.exit(main())

"""Setting examples aside for validation, always the same ones."""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Sequence

from .records import DataError, Example


def split_examples(
    examples: Sequence[Example], share: float, group_by: str | None = None
) -> tuple[list[Example], list[Example]]:
    """Examples to train with and to validate with.

    The choice follows from the names alone, so it is the same on every machine, and few examples
    change their place when others are added.

    Args:
        examples: All there are.
        share: Part of the images, from 0 to 1, to validate with. 0 validates with all of them.
        group_by: A regular expression; images whose names it matches with the same text (that of
            its first group, if it has one) are not separated.

    Raises:
        DataError: There are too few images or groups, or the expression is not valid.
    """
    if share == 0:
        return list(examples), list(examples)
    groups: dict[str, list[Example]] = defaultdict(list)
    for example in examples:
        groups[_group(example.file, group_by)].append(example)
    if len(groups) < 2:
        what = f'one group by {group_by!r}' if group_by else 'a single image'
        raise DataError(
            f'there is {what}, so nothing can be set aside for validation; add more, or validate '
            'with the training images: --val-share 0.'
        )
    order = sorted(groups, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    wanted = max(1, round(share * len(examples)))
    val: list[Example] = []
    for name in order[:-1]:
        if len(val) >= wanted:
            break
        val += groups[name]
    chosen = {example.file for example in val}
    train = [example for example in examples if example.file not in chosen]
    return train, [example for example in examples if example.file in chosen]


def _group(name: str, pattern: str | None) -> str:
    if pattern is None:
        return name
    try:
        match = re.search(pattern, name)
    except re.error as error:
        raise DataError(f'--group-by {pattern!r} is no regular expression ({error}).') from error
    if match is None:
        return name
    return match[1] if match.re.groups else match[0]

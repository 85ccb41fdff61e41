"""A process that times what it is asked to, so that no runtime's threads disturb another's.

It reads one JSON object per line and answers each with one; `python -m repnext_mm.measure.worker`.
`{"open": name, "spec": {...}}` answers with `load_s`, `first_s`, `runtime` and `precision`;
`{"run": name, "n": 3}` with `seconds`; an error answers with `error` and ends nothing.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

Record = dict[str, Any]


def serve(requests: TextIO, answers: TextIO, cores: list[int] | None) -> None:
    """Answer requests until there are no more."""
    if cores and hasattr(os, 'sched_setaffinity'):
        os.sched_setaffinity(0, cores)
    subjects: dict[str, Callable[[], Any]] = {}
    for line in requests:
        request = json.loads(line)
        try:
            if 'open' in request:
                answer = _open(subjects, request['open'], request['spec'])
            else:
                answer = {'seconds': _run(subjects[request['run']], request['n'])}
        except Exception as error:  # whatever a runtime raises
            answer = {'error': f'{type(error).__name__}: {" ".join(str(error).split())}'}
        answers.write(json.dumps(answer) + '\n')
        answers.flush()


def _open(subjects: dict[str, Callable[[], Any]], name: str, spec: Record) -> Record:
    from .artifacts import open_subject  # which imports torch: only once the cores are chosen

    start = time.perf_counter()
    function, facts = open_subject(spec)
    loaded = time.perf_counter()
    function()
    subjects[name] = function
    return {'load_s': loaded - start, 'first_s': time.perf_counter() - loaded, **facts}


def _run(function: Callable[[], Any], n: int) -> list[float]:
    from .rounds import CallRunner

    function()  # not counted: the caches hold another process's data
    return CallRunner(function).run(n)


if __name__ == '__main__':
    # Runtimes print to stdout: keep the answers' channel to ourselves.
    channel = os.fdopen(os.dup(1), 'w')
    os.dup2(2, 1)
    serve(sys.stdin, channel, json.loads(sys.argv[1]))

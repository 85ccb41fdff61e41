"""The harness that times: what it says of durations that are planted. No time is asserted."""

from __future__ import annotations

import gc
import io
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn
from torch.utils.checkpoint import checkpoint

from repnext_mm import measure
from repnext_mm.measure import (
    CallRunner,
    Comparison,
    Deadline,
    Floor,
    Ratio,
    Samples,
    Schedule,
    environment,
    rounds,
    tables,
)
from repnext_mm.measure.operators import by_operator

ONCE = Schedule(round_s=1e-9, warmup_window=2)


class Machine:
    """A clock that only its runners move, and whose speed may drift."""

    def __init__(self, drift: Callable[[float], float] = lambda now: 1.0) -> None:
        self.now = 0.0
        self.drift = drift
        self.turns: list[str] = []

    def __call__(self) -> float:
        return self.now

    def work(self, seconds: float) -> None:
        self.now += seconds

    def runner(self, name: str, seconds: Callable[[], float]) -> Planted:
        return Planted(self, name, seconds)


class Planted:
    def __init__(self, machine: Machine, name: str, seconds: Callable[[], float]) -> None:
        self.machine, self.name, self.seconds = machine, name, seconds

    def run(self, n: int) -> list[float]:
        self.machine.turns.append(self.name)
        times = [self.seconds() * self.machine.drift(self.machine.now) for _ in range(n)]
        self.machine.work(sum(times))
        return times


def constant(seconds: float) -> Callable[[], float]:
    return lambda: seconds


def noisy(seconds: float, spread: float, seed: int) -> Callable[[], float]:
    rng = np.random.default_rng(seed)
    return lambda: seconds * math.exp(rng.normal(0, spread))


def compare_planted(machine: Machine, schedule: Schedule = ONCE, **seconds: Callable) -> Comparison:
    runners = {name: machine.runner(name, s) for name, s in seconds.items()}
    twin = machine.runner('twin', next(iter(seconds.values())))
    twins = {next(iter(runners)): twin}
    deadline = Deadline(schedule.budget_s, machine)
    return measure.compare(runners, twins, None, schedule, deadline)


# --- ratios, floor, verdicts


def test_a_planted_slow_down_comes_out_right_on_a_machine_that_drifts() -> None:
    # It slows down to a third of its speed meanwhile.
    machine = Machine(drift=lambda now: 1 + now / 100)
    result = compare_planted(machine, a=constant(1.0), double=constant(2.0), half=constant(0.5))
    assert machine.drift(machine.now) > 3
    assert result.ratio('double').value == pytest.approx(2.0, rel=0.02)
    assert result.ratio('half').value == pytest.approx(0.5, rel=0.02)
    assert result.ratio('double').low <= 2.0 <= result.ratio('double').high
    assert [result.verdict(n) for n in ('a', 'double', 'half')] == ['reference', 'slower', 'faster']


def test_a_function_that_runs_twice_as_long_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine()
    monkeypatch.setattr(rounds, 'time', SimpleNamespace(perf_counter=machine))

    def function(seconds: float) -> CallRunner:
        return CallRunner(lambda: machine.work(seconds))

    schedule = Schedule(rounds=8, warmup_cap_s=0.1)
    deadline = Deadline(schedule.budget_s, machine)
    result = measure.compare(
        {'4 ms': function(4e-3), '8 ms': function(8e-3)},
        {'4 ms': function(4e-3)},
        None,
        schedule,
        deadline,
    )
    assert result.ratio('8 ms').value == pytest.approx(2)
    assert result.verdict('8 ms') == 'slower'


def test_a_difference_below_the_noise_floor_is_none() -> None:
    result = compare_planted(
        Machine(), a=noisy(1.0, 0.05, seed=1), same=noisy(1.0, 0.05, 2), more=noisy(1.005, 0.05, 3)
    )
    assert result.floors['a'].contains(1.0)
    assert result.floors['a'].contains(result.floors['a'].ratio.value)
    assert result.floors['a'].limit > 1.01
    assert result.verdict('same') == result.verdict('more') == 'no measurable difference'


@pytest.mark.parametrize('low, high, limit', [(0.9, 1.05, 1 / 0.9), (1.02, 1.2, 1.2), (1, 1, 1)])
def test_the_floor_holds_1_whatever_the_reference_did(
    low: float, high: float, limit: float
) -> None:
    floor = Floor(Ratio((low + high) / 2, low, high, rounds=30))
    assert floor.limit == pytest.approx(limit)
    assert floor.contains(1.0)
    assert not floor.contains(limit * 1.01)
    assert not floor.contains(1 / limit / 1.01)


def test_a_verdict_needs_an_interval_without_1_and_enough_rounds() -> None:
    floor = Floor(Ratio(1.0, 0.99, 1.01, rounds=30))
    assert floor.verdict(Ratio(1.2, 0.9, 1.5, rounds=30)) == 'no measurable difference'
    assert floor.verdict(Ratio(1.2, 1.1, 1.3, rounds=30)) == 'slower'
    assert floor.verdict(Ratio(1.2, 1.1, 1.3, rounds=5)) == 'too few rounds'


@pytest.mark.parametrize('rounds', [6, 12, 30])
def test_intervals_cover_the_true_ratio(rounds: int) -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(150):
        reference = Samples([[float(x)] for x in rng.normal(1.0, 0.05, rounds)])
        ratios = 2.0 * np.exp(rng.normal(0, 0.1, rounds))  # their median is 2
        variant = Samples([[r[0] * x] for r, x in zip(reference.rounds, ratios)])
        ratio = measure.paired_ratio(variant, reference)
        assert ratio.low <= ratio.value <= ratio.high
        covered += ratio.low <= 2.0 <= ratio.high
    assert 0.87 * 150 < covered < 150  # and is not wider than it must be


def test_few_rounds_give_their_range_and_say_how_much_it_covers() -> None:
    reference = Samples([[1.0], [1.0], [1.0]])
    ratio = measure.paired_ratio(Samples([[3.0], [2.0], [2.5]]), reference)
    assert (ratio.value, ratio.low, ratio.high) == (2.5, 2.0, 3.0)
    assert ratio.confidence == 0.75


# --- rounds


def test_runs_that_lead_in_do_not_count() -> None:
    machine = Machine()

    # After another variant's turn the first run takes ten times as long.
    def slow_start(name: str) -> Callable[[], float]:
        def seconds() -> float:
            fresh = len(machine.turns) != starts.get(name)
            starts[name] = len(machine.turns)
            return 10.0 if fresh else 1.0

        starts: dict[str, int] = {}
        return seconds

    for lead_in, expected in ((0, 5.5), (1, 1.0)):
        schedule = replace(ONCE, lead_in=lead_in, round_s=2.0)
        warm = {'a': Samples(warm_s=1.0), 'b': Samples(warm_s=1.0)}
        runners = {name: machine.runner(name, slow_start(name)) for name in warm}
        samples = measure.interleave(runners, schedule, warm)
        assert samples['a'].medians == [expected] * schedule.rounds


def test_rounds_go_forwards_and_backwards_in_turn() -> None:
    machine = Machine()
    runners = {name: machine.runner(name, constant(1.0)) for name in 'ABC'}
    warm = {name: Samples(warm_s=1.0) for name in runners}
    samples = measure.interleave(runners, Schedule(rounds=4), warm)
    assert ''.join(machine.turns) == 'ABC' + 'CBA' + 'ABC' + 'CBA'
    assert [len(s.rounds) for s in samples.values()] == [4, 4, 4]


def test_a_turn_is_long_enough_for_the_clock() -> None:
    machine = Machine()
    runners = {
        'quick': machine.runner('quick', constant(1e-3)),
        'slow': machine.runner('slow', constant(1.0)),
    }
    schedule = Schedule(rounds=2, round_s=9.5e-3)
    warm = measure.warm_up(runners, schedule)
    samples = measure.interleave(runners, schedule, warm)
    assert [len(runs) for runs in samples['quick'].rounds] == [10, 10]
    assert [len(runs) for runs in samples['slow'].rounds] == [1, 1]


def test_the_budget_bounds_everything() -> None:
    machine = Machine()
    schedule = Schedule(rounds=1000, budget_s=100.0)
    result = compare_planted(machine, schedule, a=noisy(1.0, 0.2, 0), b=noisy(1.0, 0.2, 1))
    assert 80 < machine.now <= 100
    assert len(result.samples['b'].rounds) >= 14
    assert result.floors['a'].ratio.rounds >= 14
    # Two rounds there are, however little time.
    result = compare_planted(Machine(), Schedule(budget_s=0.1), a=constant(1.0), b=constant(1.0))
    assert result.ratio('b').rounds == 2


def test_warm_up_ends_when_times_stand_still_or_at_its_cap() -> None:
    def cooling(step: float) -> Callable[[], float]:
        times = iter(max(1.0, 3.0 - step * i) for i in range(10_000))
        return lambda: next(times)

    machine = Machine()
    runners = {
        'falls': machine.runner('falls', cooling(0.1)),
        'restless': machine.runner('restless', noisy(1.0, 0.5, seed=0)),
    }
    warm = measure.warm_up(runners, Schedule(warmup_cap_s=100.0), Deadline(None, machine))
    assert warm['falls'].settled
    assert warm['falls'].first_s == 3.0
    assert machine.turns.count('falls') == 1 + 19 + 10  # first run, the fall, a steady window
    assert warm['falls'].warm_s == 1.0
    assert not warm['restless'].settled
    assert 90 < machine.now - 60 < 120


@pytest.mark.parametrize('arguments', [{'rounds': 1}, {'budget_s': 0}, {'budget_s': math.nan}])
def test_impossible_schedules_are_refused(arguments: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        Schedule(**arguments)


def test_a_runner_waits_for_the_device_and_keeps_the_collector_off() -> None:
    events: list[str] = []

    def function() -> None:
        assert not gc.isenabled()
        events.append('run')

    runner = CallRunner(function, lambda: events.append('wait'))
    assert len(runner.run(2)) == 2
    assert events == ['wait', 'run', 'wait'] * 2
    assert gc.isenabled()


# --- percentiles and noise


@pytest.mark.parametrize('percent, floor', [(90, 64), (99, 662)])
def test_percentiles_refuse_few_samples(percent: int, floor: int) -> None:
    assert Samples([[1.0] * (floor - 1)]).percentile(percent) is None
    rising = Samples([[float(i) for i in range(1, floor + 1)]])
    assert rising.percentile(percent) == pytest.approx(floor * percent / 100, rel=0.02)
    assert Samples([[1.0], [3.0], [2.0]]).percentile(50) == 2.0


@pytest.mark.parametrize(
    'spread, noise', [(0.09, 'ok'), (0.11, 'noisy'), (0.24, 'noisy'), (0.26, 'gross')]
)
def test_noise_is_named_by_the_interquartile_range(spread: float, noise: str) -> None:
    # Quarters at 1 - spread / 2 and 1 + spread / 2.
    runs = [1 - spread, 1 - spread / 2, 1.0, 1 + spread / 2, 1 + spread]
    assert Samples([runs]).noise == noise


# --- memory


def test_saved_bytes_are_exact_for_modules_that_one_can_count() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    x = torch.randn(3, 4)
    known = [*model.parameters(), x]
    # The ReLU keeps its output, which the second layer keeps too: one storage of (3, 8) floats.
    assert measure.saved_bytes(lambda: model(x), known) == 3 * 8 * 4
    assert measure.saved_bytes(lambda: model(x), list(model.parameters())) == 3 * (4 + 8) * 4
    # A GELU keeps its input besides, and what it gives is kept by the next layer.
    model[1] = nn.GELU()
    assert measure.saved_bytes(lambda: model(x), known) == 2 * 3 * 8 * 4
    assert (
        measure.step_memory(lambda: model(x), lambda: None, model, x.device, [x]) == 2 * 3 * 8 * 4
    )


def test_views_count_once_and_whole() -> None:
    x = torch.randn(6, 4, requires_grad=True)

    def function() -> torch.Tensor:
        y = x + 1
        return (y[:1] * y[1:2]).sum() + (y.t() * y.t()).sum()

    assert measure.saved_bytes(function, [x]) == 6 * 4 * 4


def test_what_is_recomputed_is_not_kept() -> None:
    model = nn.Sequential(nn.Linear(4, 64), nn.GELU(), nn.Linear(64, 4), nn.Sigmoid())
    x = torch.randn(3, 4, requires_grad=True)
    known = [*model.parameters(), x]
    assert measure.saved_bytes(lambda: model(x), known) == 3 * (64 + 64 + 4) * 4
    assert measure.saved_bytes(lambda: checkpoint(model, x, use_reentrant=False), known) == 0


# --- environment


def test_the_environment_is_json_and_names_what_matters() -> None:
    facts = measure.describe(['rich', 'no-such-package'])
    assert json.loads(json.dumps(facts)) == facts
    assert facts['versions']['torch'] == torch.__version__.partition('+')[0]
    assert facts['versions']['mmengine']
    assert facts['versions']['no-such-package'] is None
    assert facts['threads'] == torch.get_num_threads()
    assert facts['cores'] == len(environment.cores())
    assert set(facts['isa']) <= set(environment.ISA_FLAGS)
    assert facts['torch_isa'] == torch.backends.cpu.get_cpu_capability()
    line = measure.summary(facts)
    assert facts['cpu'] in line
    assert f'torch {facts["versions"]["torch"]}' in line
    assert 'no-such-package' not in line


@pytest.mark.parametrize(
    'lines, flags',
    [
        ('flags\t\t: fpu avx2 avx512f avx512_bf16 unheard_of', ['avx2', 'avx512f', 'avx512_bf16']),
        ('flags\t\t: fpu sse4_2 avx', []),
        ('Features\t: fp asimd bf16 i8mm', ['asimd', 'i8mm', 'bf16']),
        ('', []),
        (None, []),  # not Linux
    ],
)
def test_instruction_sets_are_those_that_the_kernel_lists(
    lines: str | None, flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = None if lines is None else f'processor\t: 0\nmodel name\t: avx2 bf16\n{lines}\n'
    monkeypatch.setattr(environment, '_read', {'/proc/cpuinfo': text}.get)
    assert environment.isa_flags() == flags


def test_a_system_without_a_load_average(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, 'getloadavg', raising=False)
    assert environment.load_average() is None


@pytest.mark.parametrize('busy, own, load, headline', [(10, 9.95, 9, True), (10, 3, 0, False)])
def test_others_work_takes_the_headline(
    monkeypatch: pytest.MonkeyPatch, busy: float, own: float, load: float, headline: bool
) -> None:
    clock = SimpleNamespace(perf_counter=iter([0.0, 5.0]).__next__)
    monkeypatch.setattr(environment, 'load_average', lambda: load)
    monkeypatch.setattr(environment.os, 'cpu_count', lambda: 2)
    monkeypatch.setattr(environment, 'time', clock)
    monkeypatch.setattr(environment, '_busy_seconds', iter([100.0, 100.0 + busy]).__next__)
    monkeypatch.setattr(environment, '_own_seconds', iter([50.0, 50.0 + own]).__next__)
    report = measure.LoadWatch().report()
    assert report['headline'] is headline
    assert report['others_per_core'] == round((busy - own) / 5 / 2, 3)
    assert (report['reason'] is None) == headline


@pytest.mark.parametrize('load, headline', [(0.9, True), (1.1, False)])
def test_where_the_kernel_does_not_tell_the_load_decides(
    monkeypatch: pytest.MonkeyPatch, load: float, headline: bool
) -> None:
    monkeypatch.setattr(environment, 'load_average', lambda: load)
    monkeypatch.setattr(environment.os, 'cpu_count', lambda: 2)
    monkeypatch.setattr(environment, '_busy_seconds', lambda: None)
    assert measure.LoadWatch().report()['headline'] is headline


@pytest.mark.skipif(
    not Path('/proc/self/stat').exists(), reason='this kernel has no /proc/PID/stat'
)
def test_work_of_our_own_processes_is_ours() -> None:
    before = environment._own_seconds()
    spin = 'import time\nwhile time.process_time() < 0.5: pass\nprint("done", flush=True)\ninput()'
    child = subprocess.Popen(
        [sys.executable, '-c', spin], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout and child.stdout.readline() == 'done\n'
    alive = environment._own_seconds()
    child.communicate('\n')
    ended = environment._own_seconds()
    assert before is not None and alive is not None and ended is not None
    assert alive - before >= 0.45
    assert ended - before >= 0.45


# --- records, tables, profiles


def test_a_comparison_can_be_read_by_machines_and_by_people() -> None:
    # 30 rounds of 3 runs are enough for a p90.
    schedule = Schedule(round_s=3.0, warmup_window=2)
    result = compare_planted(Machine(), schedule, a=constant(1.0), half=noisy(0.5, 0.02, 0))
    more = {'a': {'memory_bytes': 2**21}, 'half': {'memory_bytes': 2**20}}
    written = tables.record(result, more)
    assert json.loads(json.dumps(written)) == written
    reference, half = written['rows']
    assert written['reference'] == reference['variant'] == 'a'
    assert reference['ratio'] == 1
    assert half['ratio'] == pytest.approx(0.5, rel=0.02)
    assert half['interval'][0] <= half['ratio'] <= half['interval'][1]
    assert (half['verdict'], half['confidence'], half['rounds']) == ('faster', 0.95, 30)
    assert reference['p50_ms'] == reference['p90_ms'] == reference['first_run_ms'] == 1000
    assert reference['p99_ms'] is None

    output = io.StringIO()
    tables.show(written, 'title of the table', Console(file=output, width=120))
    lines = output.getvalue().splitlines()
    assert lines[0].strip() == 'title of the table'
    row = next(line for line in lines if line.strip().startswith('half'))
    assert f'{1 / half["ratio"]:.2f}x' in row
    assert '1.0 MiB (0.50x)' in row
    assert 'faster' in row
    assert 'Noise floor: the reference against itself took 1.000' in output.getvalue()
    assert 'p90 needs' not in output.getvalue()


def test_people_are_told_what_few_rounds_are_worth() -> None:
    result = compare_planted(
        Machine(), Schedule(rounds=3, round_s=1e-9), a=constant(1.0), b=constant(3.0)
    )
    output = io.StringIO()
    tables.show(tables.record(result), 'few', Console(file=output, width=120))
    assert 'too few rounds' in output.getvalue()
    assert 'covers the median with 75% only' in ' '.join(output.getvalue().split())
    assert 'p90 needs 64 runs.' in output.getvalue()


def test_a_result_is_written_whole_or_not_at_all(tmp_path) -> None:
    path = tmp_path / 'result.json'
    tables.write_json({'a': 1}, path)
    with pytest.raises(TypeError):
        tables.write_json({'a': 1, 'b': object()}, path)
    assert json.loads(path.read_text()) == {'a': 1}
    assert [p.name for p in tmp_path.iterdir()] == ['result.json']
    assert path.stat().st_mode & 0o777 == 0o644


def test_the_profile_tells_operators_apart() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GELU())
    x = torch.randn(1, 3, 32, 32)
    entries = {e['operator']: e for e in by_operator(lambda: model(x), runs=4)}
    assert entries['aten::gelu']['calls'] == 1
    assert sum(e['share'] for e in entries.values()) == pytest.approx(1)
    assert [e['ms'] for e in entries.values()] == sorted(
        (e['ms'] for e in entries.values()), reverse=True
    )

"""Honest timing: variants run in turns, and are compared round by round.

A machine's speed drifts by more than what one wants to measure. So all variants run in every
round, forwards and backwards in turn (A B, B A, ...), and what is reported is the median over the
rounds of the ratio to the reference in the same round. The reference against itself is the noise
floor.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

#: Fewer samples have no percentile: MLPerf's early stopping requires 64 for p90 and 662 for p99.
PERCENTILE_FLOORS = {50: 1, 90: 64, 99: 662}
#: Interquartile range / median from which torch.utils.benchmark calls a measurement so.
NOISE = {'gross': 0.25, 'noisy': 0.10}
#: The range of fewer rounds holds the median with less than 95 %, so no interval can.
MIN_ROUNDS = 6
RESAMPLES = 10_000

Clock = Callable[[], float]


def split_variant(text: str, forms: Iterable[str], options: Sequence[str]) -> tuple[str, list[str]]:
    """The form and the options of 'FORM[/OPTION]...'.

    Raises:
        ValueError: One of them is unknown.
    """
    form, *given = text.split('/')
    for each, allowed in [(form, forms), *((option, options) for option in given)]:
        if each not in allowed:
            raise ValueError(
                f'variant {text!r}: {each!r} is not one of {", ".join(allowed)}; write '
                f'FORM{"".join(f"[/{option}]" for option in options)}.'
            )
    return form, given


class Runner(Protocol):
    """Something to time, here or in another process."""

    def run(self, n: int) -> list[float]:
        """Run `n` times, one after the other, and return the seconds of each."""


class CallRunner:
    """Times a function of this process; `synchronize` waits for what it left to a device."""

    def __init__(
        self, function: Callable[[], Any], synchronize: Callable[[], None] | None = None
    ) -> None:
        self.function = function
        self.synchronize = synchronize or (lambda: None)

    def run(self, n: int) -> list[float]:
        collecting = gc.isenabled()
        gc.disable()
        try:
            return [self._once() for _ in range(n)]
        finally:
            if collecting:
                gc.enable()

    def _once(self) -> float:
        self.synchronize()
        start = time.perf_counter()
        self.function()
        self.synchronize()
        return time.perf_counter() - start


@dataclass(frozen=True)
class Schedule:
    """How long to warm up and to measure.

    Args:
        rounds: How often every variant gets its turn; fewer when `budget_s` ends before.
        round_s: Runs of a turn go on for at least this long.
        lead_in: So many runs at the start of a turn do not count: they find the caches and the
            allocator as another variant left them, which no run of its own ever does.
        warmup_window: Warm-up ends when so many turns in a row ...
        warmup_tolerance: ... are within this share of their median,
        warmup_cap_s: or after this long.
        budget_s: Bound for warm-up, noise floor and measurement together. Two rounds are run
            whatever it says.
    """

    rounds: int = 30
    round_s: float = 5e-3
    lead_in: int = 0
    warmup_window: int = 10
    warmup_tolerance: float = 0.02
    warmup_cap_s: float = 30.0
    budget_s: float | None = None

    def __post_init__(self) -> None:
        if self.rounds < 2:
            raise ValueError(f'rounds={self.rounds} must be at least 2.')
        if self.budget_s is not None and not self.budget_s > 0:
            raise ValueError(f'budget_s={self.budget_s} must be more than 0 seconds.')


@dataclass
class Samples:
    """Seconds of every run of one variant, round by round."""

    rounds: list[list[float]] = field(default_factory=list)
    #: Seconds of the very first run, and of one after the warm-up.
    first_s: float = math.nan
    warm_s: float = math.nan
    #: Whether the runs had become steady before the first round.
    settled: bool = True

    @property
    def medians(self) -> list[float]:
        return [statistics.median(runs) for runs in self.rounds]

    @property
    def runs(self) -> list[float]:
        return [run for runs in self.rounds for run in runs]

    def percentile(self, percent: int) -> float | None:
        """Seconds that `percent` of the runs stay below; None with too few runs to say."""
        runs = self.runs
        if len(runs) < PERCENTILE_FLOORS[percent]:
            return None
        return float(np.percentile(runs, percent))

    @property
    def noise(self) -> str:
        """How far the runs spread: ok, noisy or gross."""
        low, middle, high = np.percentile(self.runs, (25, 50, 75))
        spread = (high - low) / middle
        return next((name for name, limit in NOISE.items() if spread > limit), 'ok')


@dataclass(frozen=True)
class Ratio:
    """Median of the paired ratios of two variants' times, with an interval of 95 %.

    With fewer than six rounds, (low, high) is their range, which covers less than that.
    """

    value: float
    low: float
    high: float
    rounds: int

    @property
    def confidence(self) -> float:
        """Probability that the interval covers the median."""
        return 0.95 if self.rounds >= MIN_ROUNDS else 1 - 2 ** (1 - self.rounds)


def paired_ratio(samples: Samples, reference: Samples) -> Ratio:
    """How long a variant takes in units of the reference, from the rounds that both ran in."""
    ratios = np.array([a / b for a, b in zip(samples.medians, reference.medians, strict=True)])
    value = float(np.median(ratios))
    if len(ratios) < MIN_ROUNDS:
        return Ratio(value, float(ratios.min()), float(ratios.max()), len(ratios))
    draws = np.random.default_rng(0).integers(0, len(ratios), (RESAMPLES, len(ratios)))
    low, high = np.percentile(np.median(ratios[draws], axis=1), (2.5, 97.5))
    return Ratio(value, float(low), float(high), len(ratios))


@dataclass(frozen=True)
class Floor:
    """Ratio of the reference to itself; closer to 1 than its interval, nothing can be said."""

    ratio: Ratio

    @property
    def limit(self) -> float:
        """Ratios between 1 / limit and limit are noise."""
        return max(self.ratio.high, 1 / self.ratio.low, 1.0)

    def contains(self, value: float) -> bool:
        return 1 / self.limit <= value <= self.limit

    def verdict(self, ratio: Ratio) -> str:
        """What a ratio means: faster, slower, no measurable difference, or too few rounds."""
        if self.contains(ratio.value) or ratio.low <= 1 <= ratio.high:
            return 'no measurable difference'
        if ratio.rounds < MIN_ROUNDS:
            return 'too few rounds'
        return 'faster' if ratio.value < 1 else 'slower'


class Deadline:
    """A point in time, and shares of what is left until then."""

    def __init__(self, seconds: float | None, clock: Clock = time.perf_counter) -> None:
        self.clock = clock
        self.end = math.inf if seconds is None else clock() + seconds

    @property
    def left(self) -> float:
        return self.end - self.clock()

    def share(self, part: float) -> Deadline:
        """The point in time when `part` of what is left has passed."""
        return Deadline(None if self.end == math.inf else self.left * part, self.clock)


def warm_up(
    runners: Mapping[str, Runner], schedule: Schedule, deadline: Deadline | None = None
) -> dict[str, Samples]:
    """Run every variant until its times are steady, for 30 % of the time to the deadline at most.

    The first runs, which may compile, come before that.
    """
    deadline = deadline or Deadline(None)
    warm = {}
    for name, runner in runners.items():
        [first] = runner.run(1)
        warm[name] = Samples(first_s=first)
    end = deadline.share(0.3)
    for i, (name, runner) in enumerate(runners.items()):
        cap = min(schedule.warmup_cap_s, end.left / (len(runners) - i))
        medians = _settle(runner, schedule, Deadline(cap, end.clock))
        warm[name].warm_s = medians[-1]
        warm[name].settled = _steady(medians, schedule)
    return warm


def _settle(runner: Runner, schedule: Schedule, deadline: Deadline) -> list[float]:
    """Medians of the turns until the last of them agree, or until the deadline."""
    medians = runner.run(1)
    while not _steady(medians, schedule) and deadline.left > medians[-1]:
        medians.append(statistics.median(runner.run(_runs(medians[-1], schedule))))
    return medians


def _steady(medians: Sequence[float], schedule: Schedule) -> bool:
    window = medians[-schedule.warmup_window :]
    spread = max(window) - min(window)
    agree = spread <= schedule.warmup_tolerance * statistics.median(window)
    return agree and len(window) == schedule.warmup_window


def _runs(seconds: float, schedule: Schedule) -> int:
    """Runs that fill one turn, each taking so long."""
    return max(1, math.ceil(schedule.round_s / seconds))


def interleave(
    runners: Mapping[str, Runner],
    schedule: Schedule,
    warm: Mapping[str, Samples],
    deadline: Deadline | None = None,
) -> dict[str, Samples]:
    """Run all variants in turns, the order reversed from round to round.

    `warm` is what `warm_up` returned. Stops after `schedule.rounds`, or before a round that would
    end after `deadline`.
    """
    deadline = deadline or Deadline(None)
    samples = {name: replace(warm[name], rounds=[]) for name in runners}
    counts = {name: _runs(warm[name].warm_s, schedule) for name in runners}
    names = list(runners)
    longest = 0.0
    for done in range(schedule.rounds):
        if done >= 2 and deadline.left < longest:
            break
        start = deadline.clock()
        for name in names:
            runs = runners[name].run(schedule.lead_in + counts[name])
            samples[name].rounds.append(runs[schedule.lead_in :])
        names.reverse()
        longest = max(longest, deadline.clock() - start)
    return samples


@dataclass
class Comparison:
    """Variants, each against its reference, whose noise floor decides what is a difference.

    Args:
        references: Name of the reference of every variant, its own where it is one.
        samples: Of every variant.
        floors: Of every reference.
    """

    references: dict[str, str]
    samples: dict[str, Samples]
    floors: dict[str, Floor]

    def ratio(self, name: str, reference: str | None = None) -> Ratio:
        """Time of a variant in units of its reference, or another; below 1 it is faster."""
        return paired_ratio(self.samples[name], self.samples[reference or self.references[name]])

    def floor(self, name: str) -> Floor:
        """Of the reference of a variant."""
        return self.floors[self.references[name]]

    def verdict(self, name: str) -> str:
        if name == self.references[name]:
            return 'reference'
        return self.floor(name).verdict(self.ratio(name))


def compare(
    runners: Mapping[str, Runner],
    twins: Mapping[str, Runner],
    references: Mapping[str, str] | None = None,
    schedule: Schedule | None = None,
    deadline: Deadline | None = None,
) -> Comparison:
    """Time every reference against itself, then all variants in turns.

    Args:
        runners: Variants by name.
        twins: Every reference once more, by its name and built on its own; the two give the
            noise floor.
        references: Name of the reference of every variant; the only one of `twins` when None.
        schedule: How long.
        deadline: End of the budget; by default that of `schedule`, from now.
    """
    schedule = schedule or Schedule()
    deadline = deadline or Deadline(schedule.budget_s)
    if references is None:
        [only] = twins
        references = dict.fromkeys(runners, only)
    again = {f'{name} again': twin for name, twin in twins.items()}
    warm = warm_up({**runners, **again}, schedule, deadline)
    pairs = {
        each: runner
        for name in twins
        for each, runner in ((name, runners[name]), (f'{name} again', again[f'{name} again']))
    }
    # A floor as sure as the rest needs as many rounds: split the time by what a round costs.
    cost = sum(warm[name].warm_s for name in pairs)
    alone = runners.keys() == twins.keys()
    part = 1.0 if alone else cost / (cost + sum(warm[name].warm_s for name in runners))
    twice = interleave(pairs, schedule, warm, deadline.share(part))
    floors = {name: Floor(paired_ratio(twice[f'{name} again'], twice[name])) for name in twins}
    samples = twice if alone else interleave(runners, schedule, warm, deadline)
    return Comparison(
        {name: references[name] for name in runners},
        {name: samples[name] for name in runners},
        floors,
    )

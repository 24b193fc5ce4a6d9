"""Clusters of machines that differ, made on this one: is the prediction right, is the chosen plan never slower than the best machine alone, do unequal ones help?

    prediction     plans by hand: predicted against measured tokens/s of one stream
    never-slower   clusters by chance, nothing forced: the chosen plan against the best single machine, measured in the same run
    unequal        three ranks of 4 : 2 : 1 on a cable: shares by speed, and equal ones, against the best machine alone

Each machine is a process in a network namespace (docs/testing-networks.md) whose chip reads weights at a set rate (`cluster_pace`; with ``--brake quota`` whose
processor time is limited, `cluster_quota`). State directories are kept in ``.cache/clusters``: machines measure themselves once, and weights move once. Figures
are added to ``--out``, one JSON object a line.

usage: python benchmarks/clusters.py prediction|never-slower|unequal [--brake pace] [--rounds 1] [--seed 1] [--first 0] [--count 30] [--out FILE]
"""

import argparse
import contextlib
import json
import signal
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from cluster_bench import MACHINES, Case, Figures, Yard, awake
from cluster_cases import PLANS, UNEQUAL, by_chance
from workload import CACHE, model_1b

from yoke.testing.namespaces import network
from yoke.testing.shape import WIRED

SPEED, PREDICTED = "decode_tokens_per_s", "predicted_tokens_per_s"
NEVER_SLOWER, UNEQUAL_GAIN = 0.95, 1.15
TOKENS, NEVER_SLOWER_TOKENS = 32, 12  # at least; quicker clusters write more, for 4 s
MEDIAN_ERROR, WORST_ERROR, CORRELATION = 0.10, 0.25, 0.9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=list(REPORTS))
    parser.add_argument("--brake", choices=("pace", "quota"), default="pace")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1, help="of the clusters by chance")
    parser.add_argument("--first", type=int, default=0, help="the first case to measure")
    parser.add_argument("--count", type=int, default=30, help="how many")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    cases = cases_of(options)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended from outside"))  # so that nodes and loops are ended too
    with network(MACHINES, WIRED, is_realtime=True) as net, contextlib.ExitStack() as stack:
        tokens = NEVER_SLOWER_TOKENS if options.what == "never-slower" else TOKENS
        yard = Yard(net=net, state=CACHE / "clusters" / options.brake, model=model_1b(), brake=options.brake, tokens=tokens)
        yard.state.mkdir(parents=True, exist_ok=True)
        yard.prepare(cases)
        if options.brake == "pace":  # a loop would take a quota's time
            stack.enter_context(awake())
        REPORTS[options.what](_kept(yard, cases * options.rounds, options.out), yard)


def cases_of(options: argparse.Namespace) -> list[Case]:
    """What is to be measured."""
    if options.what == "never-slower":
        return [by_chance(options.seed, index) for index in range(options.first, options.first + options.count)]
    known = list(PLANS if options.what == "prediction" else UNEQUAL)
    return known[options.first : options.first + options.count]


def _kept(yard: Yard, cases: Sequence[Case], out: Path | None) -> Iterator[tuple[Case, Figures]]:
    """Each case with its figures, as they come."""
    for case in cases:
        figures = yard.measure(case)
        if out is not None:
            with out.open("a") as file:
                file.write(json.dumps({"brake": yard.brake, "case": str(case), **figures}) + "\n")
        yield case, figures


def report_prediction(measured: Iterable[tuple[Case, Figures]], _: Yard) -> None:
    """Each plan's prediction, then how far off they are."""
    pairs: list[tuple[float, float]] = []
    for case, figures in measured:
        said, found = figures[PREDICTED], figures[SPEED]
        pairs.append((said, found))
        print(f"{case}: predicted {said:.2f}, measured {found:.2f} tokens/s ({said / found - 1:+.1%}); {plan_text(figures)}", flush=True)
    errors = [abs(said / found - 1) for said, found in pairs]
    correlation = rank_correlation(pairs) if len(pairs) > 1 else 1.0
    print(
        f"{len(pairs)} plans: error median {statistics.median(errors):.1%} (wanted {MEDIAN_ERROR:.0%}), worst {max(errors):.1%} (wanted {WORST_ERROR:.0%}), ",
        end="",
    )
    print(f"rank correlation {correlation:.3f} (wanted {CORRELATION})")


def report_never_slower(measured: Iterable[tuple[Case, Figures]], yard: Yard) -> None:
    """Each chosen plan against the best machine alone; apart, those whose coordinator is not the best."""
    ratios: dict[bool, list[float]] = {True: [], False: []}
    for case, figures in measured:
        fastest = max(machine.speed for machine in case.machines)
        best = yard.alone(fastest)[SPEED]  # slower ones are slower alone: the pace sees to that
        ratio, is_led = figures[SPEED] / best, case.machines[0].speed == fastest
        ratios[is_led].append(ratio)
        text = f"{ratio:.2f} of the best alone ({figures[SPEED]:.2f} against {best:.2f} tokens/s, predicted {figures[PREDICTED]:.2f})"
        print(f"{case}: {text}; {plan_text(figures)}{'' if is_led else '; a slow coordinator'}", flush=True)
    for is_led, found in ratios.items():
        who = "the best machine coordinates" if is_led else "another machine coordinates"
        if found:
            reached = sum(ratio >= NEVER_SLOWER for ratio in found)
            print(
                f"{who}: {reached} of {len(found)} at {NEVER_SLOWER} or more, least {min(found):.2f}, median {statistics.median(found):.2f}, most {max(found):.2f}"
            )


def report_unequal(measured: Iterable[tuple[Case, Figures]], yard: Yard) -> None:
    """Shares by speed and equal ones, each against the best machine alone."""
    found: dict[Case, list[tuple[float, Figures]]] = {}
    for case, figures in measured:
        best = yard.alone(max(machine.speed for machine in case.machines))[SPEED]
        found.setdefault(case, []).append((figures[SPEED] / best, figures))
    for case, results in found.items():
        gain, speed = statistics.median(ratio for ratio, _ in results), statistics.median(figures[SPEED] for _, figures in results)
        said = statistics.median(figures[PREDICTED] for _, figures in results)
        print(f"{case}: {speed:.2f} tokens/s, {gain:.2f}x the best alone (wanted {UNEQUAL_GAIN}), predicted {said:.2f}; {plan_text(results[-1][1])}")


def plan_text(figures: Figures) -> str:
    """Who holds which blocks, and what a token took of each: computing and sums."""
    parts = []
    for old, new in zip(figures["before"]["stages"], figures["after"]["stages"], strict=True):
        steps = max(1, new["steps"] - old["steps"])
        compute, sums = (1e3 * (new[name] - old[name]) / steps for name in ("compute_s", "collective_s"))
        parts.append(f"{new['node']} [{new['blocks'][0]}, {new['blocks'][1]}) {compute:.1f}{f' + {sums:.1f}' if sums else ''} ms")
    return ", ".join(parts)


def rank_correlation(pairs: Sequence[tuple[float, float]]) -> float:
    """Spearman's, of pairs of numbers."""
    columns = [_ranks([pair[side] for pair in pairs]) for side in (0, 1)]
    return statistics.correlation(*columns)


def _ranks(numbers: Sequence[float]) -> list[float]:
    """The place of each number in order; equal ones share theirs."""
    return [sum(other < number for other in numbers) + (numbers.count(number) - 1) / 2 for number in numbers]


REPORTS: dict[str, Callable[[Iterable[tuple[Case, Figures]], Yard], None]] = {
    "prediction": report_prediction,
    "never-slower": report_never_slower,
    "unequal": report_unequal,
}

if __name__ == "__main__":
    main()

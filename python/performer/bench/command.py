"""`performer bench`: its options, and what they may be."""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path

from performer.bench import plan

_STEP, _LONGEST = 64, 1 << 20


def add_arguments(parser) -> None:
    """Adds the options to an `argparse` parser."""
    parser.add_argument(
        "--quick", action="store_true", help="two minutes: one setting, few lengths"
    )
    parser.add_argument(
        "--cases",
        nargs="+",
        choices=plan.CASES,
        default=plan.CASES,
        metavar="CASE",
        help=f"some of: {', '.join(plan.CASES)} (default all)",
    )
    several: dict = {"nargs": "+", "type": int}
    parser.add_argument(
        "--lengths", metavar="L", help="multiples of 64 (default 128 to 131072)", **several
    )
    parser.add_argument(
        "--features", metavar="M", help="first: the main setting (default 256 64 128)", **several
    )
    parser.add_argument("--dims", metavar="D", help="likewise (default 64 128)", **several)
    parser.add_argument(
        "--dtypes",
        nargs="+",
        choices=plan.DTYPES,
        metavar="DTYPE",
        help=f"likewise (default {' '.join(plan.DTYPES)})",
    )
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--threads", type=int, default=cores, help=f"(default all: {cores})")
    parser.add_argument(
        "--minutes", type=float, metavar="N", help="nothing new begins after these minutes"
    )
    parser.add_argument("--output", default="performer-bench", metavar="FOLDER")


def main(arguments) -> int:
    """Runs the benchmark; returns 0, 1 where a result was wrong or a process died, 2 if refused."""
    fault = refusal(arguments)
    output = Path(arguments.output)
    if not fault:
        try:
            output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            fault = f"--output must be a folder that can be made; {output}: {error.strerror}"
    if fault:
        print(f"performer: {fault}", file=sys.stderr)
        return 2

    from rich.console import Console

    from performer.bench import run
    from performer.bench.checking import WrongResult
    from performer.bench.report import results

    console = Console()
    try:
        measured = run.run(chosen(arguments), output, console)
    except WrongResult as wrong:
        print(f"performer: no figures, a result is wrong: {wrong}", file=sys.stderr)
        return 1
    return 1 if results.of_kind(measured, "failed") else 0


def refusal(arguments) -> str:
    """What is wrong with the options: argument, rule and value; or ""."""
    for length in arguments.lengths or ():
        if length % _STEP or not 0 < length <= _LONGEST:
            return (
                f"--lengths must be multiples of {_STEP} from {_STEP} to {_LONGEST}; got {length}"
            )
    for name in ("features", "dims"):
        for value in getattr(arguments, name) or ():
            if not 1 <= value <= 1024:
                return f"--{name} must be from 1 to 1024; got {value}"
    if arguments.minutes is not None and not arguments.minutes > 0:
        return f"--minutes must be more than 0; got {arguments.minutes:g}"
    cores = len(os.sched_getaffinity(0))
    if not 1 <= arguments.threads <= cores:
        return f"--threads must be from 1 to the {cores} cores there are; got {arguments.threads}"
    return ""


def chosen(arguments) -> plan.Plan:
    """The plan that the options ask for."""
    default = plan.Plan(threads=arguments.threads, cases=tuple(arguments.cases))
    default = plan.quick(default) if arguments.quick else default
    given: dict = {
        name: tuple(dict.fromkeys(getattr(arguments, name)))
        for name in ("lengths", "features", "dims", "dtypes")
        if getattr(arguments, name)
    }
    if arguments.minutes is not None:
        given["most_total"] = 60 * arguments.minutes
    return dataclasses.replace(default, **given)

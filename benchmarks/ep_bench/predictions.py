# SPDX-License-Identifier: Apache-2.0
"""What the model says about kernels: beside what was measured, and for GPUs that nobody had.

A data table has the measured lines, the probe's rates on the same GPUs, and the calibration: so
whoever changes a kernel measures the lines again, and fits again.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ep_bench import environment, kernel_times, kernel_work, link_probe
from ep_bench.bounds import Bound, bound, port_bytes
from ep_bench.cases import FP8, GpuCase
from ep_bench.cells import table
from ep_bench.exchange_model import Machine, Tail, Work, simulate
from ep_bench.kernel_work import Instructions

MEASURED = pathlib.Path(__file__).resolve().parents[1] / "calibration" / "two_h200.json"
# So few that what binds is an SM, and neither memory nor link.
FEW_SMS = 8
# From the last flag to the first ticket of a tail: what a launch takes. Not measured.
TAIL_LAUNCH_US = 4.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibration:
    """What the model takes from neither the sources nor the probe.

    Attributes:
        fixed_us: of an exchange of nothing, launch included.
        load_us: from a load to its data, with the memory busy.
        poll_us: from an item that has arrived to its first load.
        release_us: of a release at system scope, with stores in flight.
        clock_ghz: of an SM.
        instructions_per_cycle: that an SM issues at most in these loops, of 4.
        warp_instructions_per_cycle: that a warp alone issues, of 1: it waits for itself.
        quantize_instructions: of a warp, for 256 elements, to FP8.
        restore_instructions: likewise, from FP8.
        add_instructions: of a warp, for 2 KiB of a row that combine adds to a sum.
        add_again_instructions: for each further weight of these, in layout "rank".
    """

    fixed_us: float
    load_us: float
    poll_us: float
    release_us: float
    clock_ghz: float
    instructions_per_cycle: float
    warp_instructions_per_cycle: float
    quantize_instructions: float
    restore_instructions: float
    add_instructions: float
    add_again_instructions: float

    @property
    def instructions(self) -> Instructions:
        """For the model of the kernels' work."""
        return Instructions(
            quantize=self.quantize_instructions,
            restore=self.restore_instructions,
            add=self.add_instructions,
            add_again=self.add_again_instructions,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
    """A kernel's time, alone.

    Attributes:
        operation: "dispatch" or "combine".
        case: ranks have a GPU each.
        us: measured.
        fitted: whether the calibration was fitted to it; the others only check it.
    """

    operation: str
    case: GpuCase
    us: float
    fitted: bool

    @property
    def name(self) -> str:
        """For tables and errors."""
        wire = " FP8" if self.case.wire_dtype else ""
        sizes = f"T {self.case.num_tokens}, R {self.case.num_ranks}, {self.case.num_sms} SMs"
        return f"{self.operation}{wire}, {self.case.layout}, {sizes}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measurements:
    """The data table.

    Attributes:
        source: where and how it was taken.
        probe: as of `link_probe.parse`.
        calibration: fitted to lines.
        lines: measured.
        tickets_ahead: whether the kernels that were measured took their tickets an item early, and
            received whole chunks. Those that there are now do neither.
    """

    source: str
    probe: Mapping[str, Any]
    calibration: Calibration
    lines: Sequence[Line]
    tickets_ahead: bool = False


def read(path: pathlib.Path = MEASURED) -> Measurements:
    """The data table of a file."""
    found = json.loads(path.read_text())
    probe = found["probe"]
    rates = {name: {int(n): r for n, r in of.items()} for name, of in probe["rates"].items()}

    def line(operation: str, us: float, *, fitted: bool, **case: Any) -> Line:
        return Line(operation=operation, us=us, fitted=fitted, case=GpuCase(**case, tail=False))

    return Measurements(
        source=found["source"],
        probe={**probe, "rates": rates},
        calibration=Calibration(**found["calibration"]),
        lines=[line(**entry) for entry in found["lines"]],
        tickets_ahead=found["tickets_ahead"],
    )


def to_json(known: Measurements) -> dict[str, Any]:
    """What `read` reads."""
    names = ("wire_dtype", "layout", "num_tokens", "num_ranks", "num_sms")

    def line(of: Line) -> dict[str, Any]:
        case = {name: getattr(of.case, name) for name in names}
        return {"operation": of.operation, **case, "us": of.us, "fitted": of.fitted}

    return {
        "source": known.source,
        "probe": known.probe,
        "calibration": dataclasses.asdict(known.calibration),
        "tickets_ahead": known.tickets_ahead,
        "lines": [line(of) for of in known.lines],
    }


def measure_again(known: Measurements, programs: pathlib.Path, num_ranks: int) -> Measurements:
    """The same lines and rates, measured on this machine's GPUs, with one for each rank.

    Args:
        known: which lines; the calibration stays what it is.
        programs: the folder in which tests/gpu/run.py builds.
        num_ranks: `R`.
    """
    cases = [dataclasses.replace(line.case, num_ranks=num_ranks) for line in known.lines]
    sms = {FEW_SMS, *(case.num_sms for case in cases)}
    probe = link_probe.run(programs / "csrc/probe/link_probe", num_gpus=num_ranks, sms=sms)
    virtual_ranks = programs / "csrc/kernels/virtual_ranks"
    seconds = kernel_times.times(virtual_ranks, list(dict.fromkeys(cases)), num_ranks)
    lines = [
        dataclasses.replace(line, case=case, us=round(seconds[case][line.operation] * 1e6, 1))
        for line, case in zip(known.lines, cases, strict=True)
    ]
    where = environment.describe_gpu(None)
    source = (
        f"{num_ranks} {probe['gpu']}, driver {where['driver']}; commit {where['commit']}; "
        f"`{where['command']}`, {where['date']}"
    )
    return dataclasses.replace(known, source=source, probe=probe, lines=lines, tickets_ahead=False)


def _out_rate(rates: Mapping[str, Mapping[int, float]], num_sms: int, loads: float) -> float:
    """Of stores, with `loads` bytes loaded for each that is stored.

    The probe stores without loads, four times what it loads, and once; in between, a byte's time
    grows evenly.
    """
    seconds = [1 / rates[name][num_sms] for name in ("store", "expand", "copy")]
    return float(1 / np.interp(loads, [0, 1 / 4, 1], seconds))


def machine(
    work: Work, num_sms: int, probe: Mapping[str, Any], calibration: Calibration
) -> Machine:
    """What a rank has for its work, on so many SMs; the probe has measured them, and `FEW_SMS`."""
    rates = probe["rates"]
    loads = work.total("into") / (work.total("out") + work.total("link"))
    cycles = calibration.clock_ghz * 1e3  # in a microsecond
    return Machine(
        num_sms=num_sms,
        into=rates["load"][num_sms] / 1e6,
        out=_out_rate(rates, num_sms, loads) / 1e6,
        into_of_sm=rates["load"][FEW_SMS] / FEW_SMS / 1e6,
        out_of_sm=_out_rate(rates, FEW_SMS, loads) / FEW_SMS / 1e6,
        link=rates["peer_store_all"][num_sms] / 1e6,
        instructions=calibration.instructions_per_cycle * cycles,
        warp_instructions=calibration.warp_instructions_per_cycle * cycles,
        load_us=calibration.load_us,
        release_us=calibration.release_us,
        flag_us=probe["flag_latency"] * 1e6,
        poll_us=calibration.poll_us,
        fixed_us=calibration.fixed_us,
    )


def _tail(work: Work, case: GpuCase, known: Measurements) -> Tail:
    """All SMs that the kernel does not take."""
    rates = known.probe["rates"]
    all_sms = max(rates["load"])
    moved = machine(work, all_sms, known.probe, known.calibration)
    return Tail(
        num_sms=all_sms - case.num_sms, into=moved.into, out=moved.out, launch_us=TAIL_LAUNCH_US
    )


def predict(
    operation: str,
    case: GpuCase,
    known: Measurements,
    *,
    whole_chunks: bool = False,
    **launch: Any,
) -> float:
    """Microseconds of a kernel alone, by the model.

    Args:
        operation: "dispatch" or "combine".
        case: of 1024 tokens or more, and uniform routing.
        known: rates and calibration.
        whole_chunks: see `kernel_work.dispatch_work`.
        launch: what to change about the launch that the kernels' tuning chooses.
    """
    cost = known.calibration.instructions
    if operation == "dispatch":
        work = kernel_work.dispatch_work(case, cost, whole_chunks=whole_chunks)
    else:
        work = kernel_work.combine_work(case, cost)
    has_tail = operation == "dispatch" and kernel_work.has_tail(case)
    tail = _tail(work, case, known) if has_tail else None
    chosen = dataclasses.replace(kernel_work.launch(operation, case), **launch)
    of_main = machine(work, case.num_sms, known.probe, known.calibration)
    return simulate(work, of_main, chosen, tail)


def modeled_lines(known: Measurements) -> list[float]:
    """Microseconds of each measured line, by the model."""
    ahead = known.tickets_ahead
    return [
        predict(line.operation, line.case, known, whole_chunks=ahead, tickets_ahead=ahead)
        for line in known.lines
    ]


def _least(operation: str, case: GpuCase, known: Measurements) -> Bound:
    moved = port_bytes(operation, case)
    if moved is None:
        raise ValueError(f"{operation} has no bound")
    return bound(moved, known.probe["rates"], case.num_sms)


def _bound_cell(least: Bound) -> str:
    return f"{least.seconds * 1e6:.0f} ({least.by})"


def check_table(known: Measurements, modeled: Sequence[float], tablefmt: str) -> str:
    """The measured lines, their bounds, and the model's times, in microseconds."""
    rows = []
    for line, us in zip(known.lines, modeled, strict=True):
        least = _least(line.operation, line.case, known)
        measured = [f"{line.us:.0f}", _bound_cell(least), f"{least.seconds * 1e6 / line.us:.2f}"]
        off = f"{round(100 * (us / line.us - 1)):+d} %"
        rows.append([line.name, *measured, f"{us:.0f}", off, "fit" if line.fitted else "check"])
    headers = [
        "kernel, alone",
        "measured, µs",
        "bound, µs",
        "share",
        "model, µs",
        "off by",
        "used to",
    ]
    return table(headers, rows, tablefmt)


# Kernels whose times on more GPUs are predicted; and what was to be reached with 8, at most 24 SMs.
PREDICTED = (
    ("dispatch", None, "expert", None),
    ("dispatch", FP8, "expert", 420),
    ("dispatch", None, "rank", None),
    ("dispatch", FP8, "rank", 420),
    ("combine", None, "expert", 830),
    ("combine", None, "rank", 830),
)
PREDICTED_RANKS, PREDICTED_SMS, PREDICTED_TOKENS = (2, 4, 8), (24, 64), 4096


def _predicted_cells(operation: str, case: GpuCase, known: Measurements) -> list[str]:
    predicted = predict(operation, case, known)
    return [f"{predicted:.0f}", _bound_cell(_least(operation, case, known))]


def prediction_table(known: Measurements, tablefmt: str) -> str:
    """Kernels on more GPUs than there were: the model's times, and bounds."""
    rows = []
    for operation, wire, layout, goal in PREDICTED:
        for ranks in PREDICTED_RANKS:
            case = GpuCase(
                num_tokens=PREDICTED_TOKENS, num_ranks=ranks, wire_dtype=wire, layout=layout
            )
            cells = [
                cell
                for sms in PREDICTED_SMS
                for cell in _predicted_cells(
                    operation, dataclasses.replace(case, num_sms=sms), known
                )
            ]
            name = f"{operation} {'FP8' if wire else 'BF16'}, {layout}"
            rows.append([name, ranks, *cells, goal if goal and ranks == 8 else ""])
    columns = [f"{what}, {sms} SMs" for sms in PREDICTED_SMS for what in ("predicted", "bound")]
    return table(["kernel, alone, µs", "R", *columns, "goal"], rows, tablefmt)

"""From series of samples to rows of results: medians, percentiles, spread, CPU, ratios to other systems."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from xferd.clients.bench._cases import ECHO, MEMCPY, STREAM, Case, Place

if TYPE_CHECKING:
    from collections.abc import Sequence

    from xferd.clients.bench._probes import Series, Visit


@dataclass(frozen=True, slots=True)
class Row:
    """One case on one system. Speeds are decimal GB/s; a field that makes no sense for the case is None.

    Attributes:
        system: who was measured.
        case: what.
        requests: how many samples the figures are from.
        gb_per_s: from the median time of a request; 10 % of the samples were below ``gb_per_s_p10``, 10 % above
            ``gb_per_s_p90``.
        p50_us: median time of a request; and so on.
        cpu_s_per_gb: of all processes that take part, servers and clients.
        server_cpu_ms: CPU time of the daemons (or servers) a request, the mean.
        verified: every visit's bytes were right; None where there are none.
        faults: what was wrong.
        ratios: speed (or, for calls, time) as a multiple of others' in the same round; the median over rounds.
    """

    system: str
    case: Case
    requests: int
    gb_per_s: float | None
    gb_per_s_p10: float | None
    gb_per_s_p90: float | None
    p50_us: float
    p90_us: float
    p99_us: float
    cpu_s_per_gb: float | None
    server_cpu_ms: float | None
    verified: bool | None
    faults: tuple[str, ...] = ()
    ratios: dict[str, float] = field(default_factory=dict)

    def document(self) -> dict[str, object]:
        """Return the row as it stands in JSON."""
        case = dataclasses.asdict(self.case) | {"place": self.case.place.value}
        own = {item.name: getattr(self, item.name) for item in dataclasses.fields(self) if item.name != "case"}
        return {"system": own.pop("system"), **case, **own}


def make_rows(series: Sequence[Series]) -> list[Row]:
    """Return a row for each series, with ratios between those of one run."""
    by_case = {(one.system, one.case): one for one in series}
    return [_row(one, _ratios(one, by_case)) for one in series]


def _row(series: Series, ratios: dict[str, float]) -> Row:
    samples = [sample for visit in series.visits for sample in visit.samples]
    seconds = np.array([sample.seconds for sample in samples])
    moved = sum(sample.nbytes for sample in samples)
    is_moving = moved > 0 and series.case.place is not Place.CONTROL
    speeds = np.array([sample.nbytes for sample in samples]) / seconds / 1e9
    server_s = sum(visit.server_cpu_s for visit in series.visits)
    client_s = sum(visit.client_cpu_s for visit in series.visits)
    found = [visit.fault for visit in series.visits if visit.fault is not None]
    p50, p90, p99 = (float(value) * 1e6 for value in np.percentile(seconds, (50, 90, 99)))
    low, middle, high = (float(value) for value in np.percentile(speeds, (10, 50, 90)))
    return Row(
        system=series.system,
        case=series.case,
        requests=len(samples),
        gb_per_s=middle if is_moving else None,
        gb_per_s_p10=low if is_moving else None,
        gb_per_s_p90=high if is_moving else None,
        p50_us=p50,
        p90_us=p90,
        p99_us=p99,
        cpu_s_per_gb=(server_s + client_s) / moved * 1e9 if is_moving else None,
        server_cpu_ms=server_s / len(samples) * 1e3 if server_s else None,
        verified=not any(found) if found else None,
        faults=tuple(fault for fault in found if fault),
        ratios=ratios,
    )


def _ratios(series: Series, others: dict[tuple[str, Case], Series]) -> dict[str, float]:
    """Return the ratios to what a case is held against, by name of the column that shows them."""
    case = series.case
    wanted: dict[str, tuple[str, Case]] = {}
    if case.place in (Place.LOCAL, Place.TCP):
        wanted["memcpy"] = "memcpy", Case(Place.LIMIT, "memcpy", case.block_nbytes, case.batch)
        wanted["memcpy 256 MiB"] = "memcpy", MEMCPY
    if case.place is Place.TCP:
        wanted["iperf3"] = "iperf3", STREAM
    if case.place is Place.CONTROL and case != ECHO:
        wanted["echo"] = series.system, ECHO
    pairs = {name: others[key] for name, key in wanted.items() if key in others}
    return {name: _ratio(series, other, by_time=name == "echo") for name, other in pairs.items()}


def _ratio(series: Series, other: Series, *, by_time: bool) -> float:
    """Return the median over rounds; both were measured within seconds in each."""
    pairs = list(zip(series.visits, other.visits, strict=True))
    if by_time:
        return float(np.median([_seconds(one) / _seconds(two) for one, two in pairs]))
    return float(np.median([_speed(one) / _speed(two) for one, two in pairs]))


def _seconds(visit: Visit) -> float:
    return float(np.median([sample.seconds for sample in visit.samples]))


def _speed(visit: Visit) -> float:
    return float(np.median([sample.nbytes / sample.seconds for sample in visit.samples]))

"""From series of samples to rows of results: medians, percentiles, spread, CPU, ratios to other systems."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from xferd.clients.bench._cases import Case, Place

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from numpy.typing import NDArray

    from xferd.clients.bench._plan import Key
    from xferd.clients.bench._probes import Series, Visit

BY_TIME, BY_P99 = ("echo",), ("idle p99",)
"""Ratios of the median time of a request, and of the 99th percentile of it; all others are of speed."""


@dataclass(frozen=True, slots=True)
class Row:
    """One case on one system. Speeds are decimal GB/s; a field that makes no sense for the case is None.

    Attributes:
        system: who was measured.
        case: what.
        requests: how many samples the figures are from.
        gb_per_s: where one request is under way at a time, from the median time of a request: 10 % of the samples were
            below ``gb_per_s_p10``, 10 % above ``gb_per_s_p90``. Else all clients and threads together over a whole
            visit, and its spread over visits.
        p50_us: median time of a request, from when it was due; and so on. A percentile of fewer requests than it takes
            to have one beyond it is near their maximum.
        prepare_us: median time of building lists or picking rows; ``post_us`` of the calls and wake-ups there and back,
            ``transfer_us`` from posted to ended as the system says. None where the system does not tell.
        cpu_s_per_gb: of all processes that take part, servers and clients.
        server_cpu_ms: CPU time of the daemons (or servers) a request, the mean.
        verified: every visit's bytes were right; None where there are none.
        faults: what was wrong.
        ratios: speed (or, for "echo", time of a request) as a multiple of others' in the same round, the median over
            rounds; "idle p99" is p99 as a multiple of that without load.
        slowest_share: speed of the slowest client as a share of the mean, the median over visits.
        load_gb_per_s: what the load beside it moved.
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
    p999_us: float
    prepare_us: float | None
    post_us: float | None
    transfer_us: float | None
    cpu_s_per_gb: float | None
    server_cpu_ms: float | None
    verified: bool | None
    faults: tuple[str, ...] = ()
    ratios: dict[str, float] = field(default_factory=dict)
    slowest_share: float | None = None
    load_gb_per_s: float | None = None

    def document(self) -> dict[str, object]:
        """Return the row as it stands in JSON."""
        case = dataclasses.asdict(self.case) | {"place": self.case.place.value}
        own = {item.name: getattr(self, item.name) for item in dataclasses.fields(self) if item.name != "case"}
        return {"system": own.pop("system"), **case, **own}


def make_rows(
    series: Sequence[Series], beside: Mapping[Key, Mapping[str, Key]] | None = None, *, is_open: bool = False
) -> list[Row]:
    """Return a row for each series.

    Args:
        series: of one run.
        beside: what each is held against (``Plan.beside``).
        is_open: arrivals came at a given rate, so that speed is what was moved and not what could be.
    """
    by_key = {(one.system, one.case): one for one in series}
    rows = []
    for one in series:
        wanted = (beside or {}).get((one.system, one.case), {})
        others = {name: by_key[key] for name, key in wanted.items() if key in by_key}
        rows.append(_row(one, {name: _ratio(one, other, name) for name, other in others.items()}, is_open=is_open))
    return rows


def _row(series: Series, ratios: dict[str, float], *, is_open: bool) -> Row:
    samples = [sample for visit in series.visits for sample in visit.samples]
    seconds = np.array([sample.seconds for sample in samples])
    moved = sum(sample.nbytes for sample in samples)
    is_moving = moved > 0 and series.case.place is not Place.CONTROL
    if series.case.is_alone and not is_open:
        speeds = np.array([sample.nbytes for sample in samples]) / seconds
    else:
        speeds = np.array([sum(visit.rates) for visit in series.visits])
    server_s = sum(visit.server_cpu_s for visit in series.visits)
    client_s = sum(visit.client_cpu_s for visit in series.visits)
    found = [visit.fault for visit in series.visits if visit.fault is not None]
    p50, p90, p99, p999 = (float(value) * 1e6 for value in np.percentile(seconds, (50, 90, 99, 99.9)))
    low, middle, high = (float(value) / 1e9 for value in np.percentile(speeds, (10, 50, 90)))
    loads = [visit.load_rate / 1e9 for visit in series.visits if visit.load_rate]
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
        p999_us=p999,
        prepare_us=_part(sample.prepare_s for sample in samples),
        post_us=_part(sample.post_s for sample in samples),
        transfer_us=_part(sample.transfer_s for sample in samples),
        cpu_s_per_gb=(server_s + client_s) / moved * 1e9 if is_moving and not series.case.load else None,
        server_cpu_ms=server_s / len(samples) * 1e3 if server_s else None,
        verified=not any(found) if found else None,
        faults=tuple(fault for fault in found if fault),
        ratios=ratios,
        slowest_share=_slowest_share(series) if series.case.clients > 1 else None,
        load_gb_per_s=float(np.median(loads)) if loads else None,
    )


def _part(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.median(known)) * 1e6 if known else None


def _slowest_share(series: Series) -> float | None:
    """Return how the slowest client of a visit did beside the mean; None where only one client made requests."""
    shares = [min(visit.rates) / float(np.mean(visit.rates)) for visit in series.visits if len(visit.rates) > 1]
    return float(np.median(shares)) if shares else None


def _ratio(series: Series, other: Series, name: str) -> float:
    """Return the median over rounds; both were measured within seconds in each."""
    if name in BY_P99:  # a round has too few requests for a 99th percentile of its own
        return float(np.percentile(_seconds(*series.visits), 99) / np.percentile(_seconds(*other.visits), 99))
    pairs = list(zip(series.visits, other.visits, strict=True))
    if name in BY_TIME:
        return float(np.median([np.median(_seconds(one)) / np.median(_seconds(two)) for one, two in pairs]))
    ratios = [_speed(one, series.case) / _speed(two, other.case) for one, two in pairs]
    return float(np.median(ratios))


def _seconds(*visits: Visit) -> NDArray[np.float64]:
    return np.array([sample.seconds for visit in visits for sample in visit.samples])


def _speed(visit: Visit, case: Case) -> float:
    if not case.is_alone:
        return sum(visit.rates)
    return float(np.median([sample.nbytes / sample.seconds for sample in visit.samples]))

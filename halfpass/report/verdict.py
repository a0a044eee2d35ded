"""What the runs show, in plain sentences: the top of a report. What they do not show is said too.

A difference is that of runs with the same seed and otherwise equal settings (beside.py). With one seed nothing is known
of how much of it is chance; with several it is compared with its own spread over them.
"""

import statistics
from collections.abc import Sequence
from typing import NamedTuple

from halfpass.report import tables
from halfpass.report.beside import Pair, compared, on_one_machine, sent, values_of
from halfpass.report.runs import Series
from halfpass.report.sites import sites_of
from halfpass.report.tables import Result

MOST_SENTENCES = 4  # about series by themselves; of more the best and the worst are named
UNKNOWN = ": how much of a difference is chance is not known."
HEAD_AHEAD_POINTS = 3.0  # of the auxiliary head before the server half, from which on that is said
MOST_SETTINGS = 4  # that are named of a series


class Gap(NamedTuple):
    """How a decoupled series stands to conventional training: differences of the leading metric by seed, in points
    where that is a share, and the ratios of bytes and time, where they can be compared."""

    differences: Sequence[float]
    conventional: float
    bytes_ratio: float | None
    time_ratio: float | None


def verdict(series: Sequence[Series]) -> list[str]:
    """Sentences, the most telling first; none where no run got to a test."""
    scored = [one for one in series if _mean_score(one) is not None]
    if not scored:
        return ["No run has been tested yet."] if series else []
    gaps = {number: gap for number, one in enumerate(scored) if (gap := _gap(one, series))}
    if len(scored) <= MOST_SENTENCES:
        told = _each(scored, gaps)
    else:
        told = [*_best_and_worst(scored), *_all_gaps(list(gaps.values()), scored)]
    return [*told, *_heads(scored), *_sites(scored), *_chance(scored, gaps)]


# Series by series


def _each(scored: Sequence[Series], gaps: dict[int, Gap]) -> list[str]:
    """The decoupled ones with what they are beside, then those that are named with none."""
    beside = [_sentence(one, gaps[number]) for number, one in enumerate(scored) if number in gaps]
    told_of = {"conventional"} if len(gaps) == 1 and sum(one.method == "conventional" for one in scored) == 1 else set()
    others = [
        _sentence(one, None)
        for number, one in enumerate(scored)
        if number not in gaps and one.method not in (told_of if gaps else ())
    ]
    return [*beside, *others]


def _sentence(one: Series, gap: Gap | None) -> str:
    first = one.results[0]
    seconds = tables.mean([result.get("train_seconds") for result in one.results])
    if first.get("unfinished"):
        return f"{_capital(_name(one))}: {_scored(one)} so far, by epoch {_last_epoch(one)} of {first.get('epochs')}."
    told = f"{_capital(_name(one))} reached {_scored(one)}"
    told += f" in {duration(seconds)}" if seconds is not None else ""
    if gap is None:
        megabytes = tables.mean([sent(result) for result in one.results])
        return told + (f", sending {tables.amount(megabytes)} MB" if megabytes else "") + "."
    told += f", {_away(gap, first)} conventional training ({_number(gap.conventional, first)})"
    with_ = [f"{_share(ratio)} of its {what}" for ratio, what in ((gap.bytes_ratio, "bytes"), (gap.time_ratio, "time"))
             if ratio is not None]  # fmt: skip
    return told + (", with " + " and ".join(with_) if with_ else "") + "."


def _gap(one: Series, series: Sequence[Series]) -> Gap | None:
    if not (found := compared(one, series)):
        return None
    scale = 100 if tables.unit(one.results[0]) == "%" else 1
    scores = values_of(found.pairs, tables.score, tables.score)
    if not scores:
        return None
    ratio = (_ratio(found.pairs, sent), _ratio(on_one_machine(found.pairs), lambda result: result.get("train_seconds")))
    return Gap([scale * (ours - theirs) for ours, theirs in scores], statistics.fmean(b for _, b in scores),
               *(ratio if found.same_cut else (None, None)))  # fmt: skip


def _ratio(pairs: Sequence[Pair], value: tables.Measure) -> float | None:
    found = values_of(pairs, value, value)
    ours, theirs = sum(a for a, _ in found), sum(b for _, b in found)
    return ours / theirs if theirs and ours else None


def _away(gap: Gap, result: Result) -> str:
    mean, n = statistics.fmean(gap.differences), len(gap.differences)
    decimals, unit = (2, "points ") if tables.unit(result) == "%" else (4, "")
    spread = f" ± {statistics.stdev(gap.differences):.{decimals}f}" if n > 1 else ""
    if not spread and float(f"{mean:.{decimals}f}") == 0:
        return "the same as"
    return f"{abs(mean):.{decimals}f}{spread} {unit}{'above' if mean > 0 else 'below'}"


# Many series


def _best_and_worst(scored: Sequence[Series]) -> list[str]:
    """Of each leading metric."""
    told = []
    for metric in dict.fromkeys(tables.lead(one.results[0]) for one in scored):
        own = [one for one in scored if tables.lead(one.results[0]) == metric]
        higher = own[0].results[0].get("higher_is_better") is not False
        own.sort(key=lambda one: _mean_score(one) or 0.0, reverse=higher)
        if len(own) == 1:
            told.append(_sentence(own[0], None))
        else:
            told.append(f"Of {len(own)} settings, {_name(own[0])} did best: {_scored(own[0])}.")
            told.append(f"{_capital(_name(own[-1]))} did worst: {_scored(own[-1])}.")
    return told


def _all_gaps(gaps: Sequence[Gap], scored: Sequence[Series]) -> list[str]:
    if not gaps or len({tables.lead(one.results[0]) for one in scored}) > 1:
        return []
    share = tables.unit(scored[0].results[0]) == "%"
    means = sorted(statistics.fmean(gap.differences) for gap in gaps)
    low, high = (f"{mean:+.2f}" if share else f"{mean:+.4f}" for mean in (means[0], means[-1]))
    counted = f"in {len(gaps)} comparisons" if len(gaps) > 1 else "in one comparison"
    told = f"Decoupled beside conventional training, all else equal, {counted}: from {low} to {high}".replace("-", "−")
    told += " points" if share else ""
    ratios = [gap.bytes_ratio for gap in gaps if gap.bytes_ratio is not None]
    return [told + (f", with {_between(ratios)} of its bytes" if ratios else "") + "."]


def _between(ratios: Sequence[float]) -> str:
    low, high = _share(min(ratios)), _share(max(ratios))
    return low if low == high else f"{low} to {high}"


# What the numbers do not say by themselves


def _heads(scored: Sequence[Series]) -> list[str]:
    """Where a client's own head answers much better than the server half: that has not learned its task."""
    told = []
    for one in scored:
        first = one.results[0]
        head = tables.mean([tables.score(result, "aux_test") for result in one.results])
        above = 0.0 if head is None else 100 * (head - (_mean_score(one) or 0.0))
        if tables.unit(first) == "%" and above >= HEAD_AHEAD_POINTS and not first.get("unfinished"):
            reached = f"{_capital(_name(one))}: the auxiliary head alone reached {_number(head or 0.0, first)}."
            told.append(f"{reached} The server half has learned less: train for longer, cut later, or try other heads.")
    return told


def _sites(scored: Sequence[Series]) -> list[str]:
    """Where sites differ, of the first series that has several."""
    for one in scored:
        found = [(site.score, site) for site in sites_of(one)]
        known = sorted(((score, site) for score, site in found if score is not None), key=lambda pair: pair[0])
        if len(known) > 1 and known[0][0] != known[-1][0]:
            (low, worst), (high, best) = known[0], known[-1]
            first = one.results[0]
            of = f"{_capital(_name(one))}: sites" if len(scored) > 1 else "Sites"
            return [
                f"{of} range from {_number(low, first)} (client {worst.client}, {worst.samples:,} test samples) to "
                f"{_number(high, first)} (client {best.client}, {best.samples:,})."
            ]
    return []


def _chance(scored: Sequence[Series], gaps: dict[int, Gap]) -> list[str]:
    """What is known of chance: how many seeds there are, and which differences are smaller than their spread."""
    told = []
    small = [_name(scored[number]) for number, gap in gaps.items() if _within_spread(gap)]
    if small:
        names = "; ".join(small[:3]) + (f" and {len(small) - 3} more" if len(small) > 3 else "")
        told.append(f"Smaller than its own spread over the seeds, so no finding: the difference of {names}.")
    single = [number for number, gap in gaps.items() if len(gap.differences) == 1]
    if single and len(single) == len(gaps):
        told.append(f"One seed{UNKNOWN}")
    elif single:
        told.append(f"{len(single)} of the {len(gaps)} comparisons have one seed{UNKNOWN}")
    elif not gaps and all(len(one.results) == 1 and not one.results[0].get("unfinished") for one in scored):
        told.append("One seed." if len(scored) == 1 else f"One seed each{UNKNOWN}")
    return told


def _within_spread(gap: Gap) -> bool:
    differences = gap.differences
    return len(differences) > 1 and abs(statistics.fmean(differences)) < statistics.stdev(differences)


# Words


def _mean_score(one: Series) -> float | None:
    return tables.mean([tables.score(result) for result in one.results])


def _name(one: Series) -> str:
    """`decoupled (cut a, codec int8)`; of many settings the first ones."""
    told = [f"{name} {value}" for name, value in one.settings.items()]
    shown = [*told[:MOST_SETTINGS], *(["…"] if len(told) > MOST_SETTINGS else [])]
    return one.method + (f" ({', '.join(shown)})" if told else "")


def _last_epoch(one: Series) -> int:
    return max((row["epoch"] for run in one.runs for row in run.metrics), default=0)


def _scored(one: Series) -> str:
    """`96.20 % test accuracy`, `test rmse 0.4321 (lower is better)`, of several seeds ± the standard deviation."""
    first = one.results[0]
    values = [tables.score(result) for result in one.results]
    on = "accuracy on samples held out of the training set" if first.get("validation") else "test accuracy"
    share = tables.unit(first) == "%"
    number = tables.spread([v if v is None else 100 * v if share else v for v in values], 2 if share else 4)
    seeds = f" (mean of {len(one.results)} seeds)" if len(one.results) > 1 else ""
    if tables.lead(first) == "accuracy" and share:
        return f"{number} % {on}{seeds}"
    lower = " (lower is better)" if first.get("higher_is_better") is False else ""
    return f"test {tables.lead(first)} {number}{' %' if share else ''}{lower}{seeds}"


def _number(value: float, result: Result) -> str:
    return f"{100 * value:.2f} %" if tables.unit(result) == "%" else f"{value:.4f}"


def _share(ratio: float) -> str:
    """49 %, 0.4 %, or 3.1 times."""
    return f"{ratio:.1f} times" if ratio >= 2 else f"{100 * ratio:.{0 if ratio >= 0.02 else 1}f} %"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def duration(seconds: float) -> str:
    """31 s, 4 min 10 s, 2 h 5 min."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    return f"{minutes // 60:,} h {minutes % 60} min"

"""What is known of each site, class or label, beside the one number of all: rows of the tables "Sites" and "Classes".

A result's `sites` has a score on each client's own test set; a metric that is made for each class, label or column is
named metric/name in a result's `test`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from halfpass.report import tables
from halfpass.report.runs import Series
from halfpass.report.tables import MISSING, Result


class Site(NamedTuple):
    """A client's own test set of so many samples, what each run of a series scored on it, and their mean."""

    client: int
    samples: int
    tests: Sequence[Result]

    @property
    def score(self) -> float | None:
        return tables.mean([tables.score(test) for test in self.tests])


class Rows(NamedTuple):
    """A table, ready to print; its first column names the rows."""

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]


def sites_of(one: Series) -> list[Site]:
    """In the order of their numbers; none where one test set is for all."""
    found: dict[int, list[Mapping[str, Any]]] = {}
    for result in one.results:
        for site in result.get("sites") or []:
            found.setdefault(site["client"], []).append({**_names(result), **site})
    return [Site(client, own[0]["samples"], own) for client, own in sorted(found.items())]


def _names(result: Result) -> dict[str, Any]:
    return {"metric": tables.lead(result), "metric_unit": tables.unit(result)}


def site_rows(series: Sequence[Series]) -> Rows | None:
    """A row for each series and site: every metric on the site's own test set. None without sites."""
    found = [(one, site) for one in series for site in sites_of(one)]
    if not found:
        return None
    metrics = _metrics([test for _, site in found for test in site.tests], nested=False)
    several = len({one.label for one, _ in found}) > 1
    rows = [
        [f"client {site.client}" + (f" · {one.label}" if several else ""), f"{site.samples:,}",
         *(_cell(site.tests, metric) for metric in metrics)]
        for one, site in sorted(found, key=lambda pair: pair[1].client)
    ]  # fmt: skip
    return Rows(["site", "test samples", *map(_heading, metrics)], rows)


def metric_rows(series: Sequence[Series]) -> Rows | None:
    """A row for each series: every metric on the test set. None where there is no other than the leading one."""
    metrics = _metrics([result for one in series for result in one.results], nested=False)
    rows = [[one.label, *(_cell(one.results, metric) for metric in metrics)] for one in series]
    return Rows(["method", *map(_heading, metrics)], rows) if len(metrics) > 1 else None


def class_rows(series: Sequence[Series]) -> Rows | None:
    """A row for each class, label or column, a column for each series and metric that is made for each of them; of one
    series alone also each site's. None without such metrics."""
    sources = [(one.label, one.results) for one in series]
    if len(series) == 1:
        own = [(f"client {site.client}", site.tests) for site in sites_of(series[0])]
        sources = [("all", series[0].results), *own] if own else sources
    found = _metrics([test for _, tests in sources for test in tests], nested=True)
    if not found:
        return None
    kinds = list(dict.fromkeys(metric.split("/", 1)[0] for metric in found))
    names = list(dict.fromkeys(metric.split("/", 1)[1] for metric in found))
    columns = [(label, tests, kind) for label, tests in sources for kind in kinds]
    rows = [[name, *(_cell(tests, f"{kind}/{name}") for _, tests, kind in columns)] for name in names]
    return Rows(["class or label", *(f"{label}: {_heading(kind)}" for label, _, kind in columns)], rows)


def _metrics(tests: Sequence[Result], *, nested: bool) -> list[str]:
    """Names of the metrics in the tests, the leading ones first."""
    found = [metric for test in tests for metric in test.get("test") or {} if ("/" in metric) == nested]
    leads = [tables.lead(test) for test in tests]
    return sorted(dict.fromkeys(found), key=lambda metric: metric not in leads)


def _heading(metric: str) -> str:
    return metric.replace("_", " ")


def _cell(tests: Sequence[Result], metric: str) -> str:
    """Accuracy in percent, as everywhere on the page; others as they are."""
    values = [tables.value_at(test, "test", metric) for test in tests]
    if metric not in {tables.lead(test) for test in tests} or tables.unit(tests[0]) != "%":
        return tables.spread(values, 4)
    text = tables.spread([None if value is None else 100 * value for value in values], 2)
    return text if text == MISSING else f"{text} %"

"""series: several studies on one model in one process, and one page that shows them beside the paper.

Each study is given as an object; states, replies and verdicts that they share come from the store. What a study has found is
kept before the next begins, and a study that cannot run here does not stop the others.
"""

import logging
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from latentguard.backends import Backend
from latentguard.datasets import Dataset
from latentguard.errors import InputError
from latentguard.experiments import Row, headline, opening
from latentguard.judges import Judge
from latentguard.pace import pace
from latentguard.report import write_report
from latentguard.trackers import Tracker, Within

log = logging.getLogger(__name__)


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Series:
    """Settings of a series; conf/exp/paper.yaml says what each is for."""

    name: str
    studies: dict[str, Any]
    skip: tuple[str, ...] = ()
    page: bool = True

    def __post_init__(self) -> None:
        if not self.studies:
            raise ValueError("studies: name at least one")
        for name in self.skip:
            if name not in self.studies:
                raise ValueError(f"skip: {name!r} is none of {', '.join(self.studies)}")

    def check(self, n_layers: int, data: Dataset) -> None:
        """Refuse what no study can run on; what some cannot is said when their turn comes."""
        why = self._unable(n_layers, data)
        if set(why) == set(self.studies):
            raise InputError(next(iter(why.values())))

    def _unable(self, n_layers: int, data: Dataset) -> dict[str, str]:
        """Why a study is left out."""
        found = dict.fromkeys(self.skip, "left out by exp.skip")
        for name, study in self.studies.items():
            if name not in found:
                try:
                    study.check(n_layers, data)
                except InputError as error:
                    found[name] = str(error)
        return found

    def __call__(self, backend: Backend, data: Dataset, judge: Judge, tracker: Tracker) -> dict[str, Any]:
        """One after the other."""
        left_out = self._unable(backend.n_layers, data)
        for name, why in left_out.items():
            log.info("%s is skipped: %s", name, why)
        done: dict[str, Row] = {}
        began, going = time.monotonic(), [name for name in self.studies if name not in left_out]
        for name, study in self.studies.items():
            if name in left_out:
                done[name] = {"study": name, "status": "skipped", "why": left_out[name]}
                continue
            started, part, place = time.monotonic(), Within(tracker, name), going.index(name)
            log.info("\n[%d/%d] %s%s", place + 1, len(going), name, pace(started - began, place, len(going) - place))
            try:
                summary = study(backend, data, judge, part)
            except InputError as error:  # the others still run
                log.warning("%s failed: %s", name, error)
                summary = {"study": name, "status": "failed", "why": str(error)}
            summary = {**summary, "figures": [part.named(figure) for figure in summary.get("figures", [])], "seconds": round(time.monotonic() - started, 1)}
            done[name] = summary
            log.info("%s\n(%.0f s)", summary.get("claim", summary.get("why")), summary["seconds"])
            tracker.summary({**opening(self.name, backend, data, judge), "studies": done})
            if self.page:
                try:
                    tracker.page(write_report)
                except InputError as error:  # the page is not what the run is for
                    log.warning("report.html is not written: %s", error)
        parts = [summary for summary in done.values() if summary["status"] in ("ok", "insufficient_base_rate")]
        whole = {
            "status": "ok" if parts else "failed",
            "figures": [name for part in parts for name in part["figures"]],
            "table": parts[0]["table"] if parts else [],
        }
        verdicts = [effect["verdict"] for summary in done.values() for effect in summary.get("effects", [])]
        tested = len(verdicts) - verdicts.count("not testable here")
        count = {"value": verdicts.count("holds"), "low": math.nan, "high": math.nan, "n": tested} if tested else None
        whole["headline"] = headline("effects of the paper that hold, of n that were testable", count)
        whole["headlines"] = {name: summary["headline"] for name, summary in done.items() if "headline" in summary}
        claim = self._claim(backend.name, done, verdicts)
        return {**opening(self.name, backend, data, judge), **whole, "studies": done, "claim": claim, "why": claim}

    def _claim(self, model: str, done: Mapping[str, Row], verdicts: Sequence[str]) -> str:
        counts = ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in ("holds", "does not hold", "not testable here"))
        ran = [name for name, summary in done.items() if summary["status"] in ("ok", "insufficient_base_rate")]
        times = ", ".join(f"{name} {done[name]['seconds']:.0f} s" for name in ran)
        odd = "; ".join(f"{name} {summary['status']}: {summary['why']}" for name, summary in done.items() if name not in ran)
        return f"{model}: {len(ran)} of {len(done)} studies ran ({times}); verdicts on the paper's effects: {counts}" + (f". {odd}" if odd else ".")

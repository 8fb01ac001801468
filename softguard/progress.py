"""Progress on screen: what is under way, how far it is and how long it still takes."""

from types import TracebackType
from typing import Any


class Bars:
    """One progress bar a stage, made when the stage first reports."""

    def __init__(self, totals: dict[str, int], unit: str = "prompt") -> None:
        """`totals`: how many units each stage that will report consists of."""
        self._totals, self._unit = totals, unit
        self._bars: dict[str, Any] = {}

    def __call__(self, stage: str, done: int, note: str = "") -> None:
        """`done` more units of `stage` are finished."""
        from tqdm import tqdm

        if stage not in self._bars:
            self._bars[stage] = tqdm(
                desc=stage, total=self._totals.get(stage), unit=f" {self._unit}", dynamic_ncols=True, mininterval=0.5
            )
        bar = self._bars[stage]
        if note:
            bar.set_postfix_str(note, refresh=False)
        bar.update(done)

    def __enter__(self) -> "Bars":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for bar in self._bars.values():
            bar.close()

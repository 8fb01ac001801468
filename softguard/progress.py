"""Progress on screen: what is under way, how far it is and how long it still takes."""

from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from softguard.distill import Step


class Bars:
    """One bar a stage, made when the stage first reports."""

    def __init__(self) -> None:
        self._bars: dict[str, Any] = {}

    def __call__(self, stage: str, done: int, total: int) -> None:
        """`done` more of the `total` prompts of `stage` are finished."""
        from tqdm import tqdm

        if stage not in self._bars:
            self._bars[stage] = tqdm(desc=stage, total=total, unit=" prompts", dynamic_ncols=True)
        self._bars[stage].update(done)

    def __enter__(self) -> "Bars":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for bar in self._bars.values():
            bar.close()


class Steps:
    """The bar of a training run, with losses and probes of the latest validation."""

    def __init__(self, total: int) -> None:
        from tqdm import tqdm

        self._bar = tqdm(desc="distil", total=total, unit=" steps", dynamic_ncols=True)

    def __call__(self, step: "Step") -> None:
        """One line of the log."""
        if step.kind == "train":
            self._bar.set_postfix_str(f"safe {step.safe:.2f}, refusal {step.refusal:.2f}", refresh=False)
            self._bar.update(step.step - self._bar.n)
        else:
            self._bar.write(
                f"  step {step.step}: validation loss {step.safe:.2f} + {step.refusal:.2f}; refuses {step.refuses:.0%} of "
                f"what the system refuses, {step.over_refuses:.0%} of what it answers; token TV {step.token_tv:.3f}"
            )

    def __enter__(self) -> "Steps":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.close()

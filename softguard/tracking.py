"""Send a training run's log to a tracker: TensorBoard, Weights & Biases, trackio and whatever else accelerate knows."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from softguard.config import Recipe
from softguard.distill import Step
from softguard.errors import SoftguardError


def check_tracker(name: Any, folder: Path) -> None:
    """Raises SoftguardError as `Tracker` does, for one that is unknown or not installed; nothing is begun."""
    from accelerate.tracking import filter_trackers, get_available_trackers
    from accelerate.utils import LoggerType

    with _told(name):
        known, there = set(LoggerType.list()) - {LoggerType.ALL.value}, map(str, get_available_trackers())
        if (isinstance(name, str) and name in known and name not in there) or not filter_trackers(name, str(folder)):
            raise ValueError("it is not installed")


class Tracker:
    """Gets every line of the log; the tracker's own files, if it writes any, lie beside it."""

    def __init__(self, name: Any, folder: Path, recipe: Recipe) -> None:
        """`name`: what accelerate calls the tracker, or one of its `GeneralTracker`s.

        Raises SoftguardError if it is unknown, not installed or cannot start.
        """
        import dataclasses

        from accelerate import Accelerator

        check_tracker(name, folder)
        with _told(name):
            self._accelerator = Accelerator(log_with=name, project_dir=str(folder), cpu=recipe.model.device == "cpu")
            settings = {f"{s}.{k}": str(v) for s, values in _sections(dataclasses.asdict(recipe)) for k, v in values.items()}
            self._accelerator.init_trackers("softguard", config=settings)

    def __call__(self, step: Step) -> None:
        """One line of the log."""
        numbers = {k: v for k, v in step._asdict().items() if isinstance(v, float)}
        self._accelerator.log({f"{step.kind}/{k}": v for k, v in numbers.items()}, step=step.step)

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._accelerator.end_training()


@contextmanager
def _told(name: Any) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # every tracker fails in its own way
        reason = " ".join(str(error).split())[:160]
        raise SoftguardError(f"tracker {name!r} cannot be used ({reason}); install it, or leave --track out") from error


def _sections(recipe: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [(name, value if isinstance(value, dict) else {name: value}) for name, value in recipe.items()]

"""Estimates, by works that take known times of a clock of their own."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from softguard import estimate
from softguard.config import load_recipe
from softguard.engine import Engine
from softguard.judges import GuardJudge, Judge
from softguard.models import BaseModel
from softguard.system import SafeSystem
from tests.references import random_adapter


class Clock:
    """Stands where `time` does, and goes on only when a work says so."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def work(self, prompts: Sequence[str]) -> None:
        self.now += 0.1 * len(prompts)


class Slow:
    name = fingerprint = "slow"

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def prompt_safety(self, prompts: Sequence[str]) -> list[float]:
        self.clock.work(prompts)
        return [1.0] * len(prompts)

    def response_safety(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        return self.prompt_safety(prompts)


@pytest.mark.parametrize(("keep", "seconds"), [("false", 8), ("true", 12)])  # of 40 prompts, two judgements each
def test_teaching_without_responses_takes_the_guards_time_and_the_caches(
    keep: str, seconds: int, small: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, clock = tmp_path / "asked.txt", Clock()
    path.write_text("".join(f"Question {i}?\n" for i in range(20)))
    monkeypatch.setattr(estimate, "time", clock)
    monkeypatch.setattr(Engine, "caches", lambda engine, prompts: clock.work(prompts))
    settings = ["teach.max_new_tokens=0", f"teach.keep_caches={keep}", "teach.responses=2"]
    recipe = load_recipe(None, [f"teach.prompts={path}", f"teach.validation={path}", *settings])
    told = estimate.teach_plan(recipe, tmp_path / "out", small, SafeSystem(Slow(clock), recipe.system))
    assert told.endswith(f"about {seconds} s")


def test_an_evaluation_takes_the_guards_and_the_judges_time(
    small: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, clock = tmp_path / "asked.jsonl", Clock()
    rows = [{"prompt": f"Question {i}?", "label": "harmful" if i % 4 else "benign"} for i in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(estimate, "time", clock)
    recipe = load_recipe(None, [f"evaluate.suites=['file:{path}']", "evaluate.max_new_tokens=1"])
    guard, adapter = Slow(clock), random_adapter(small, "soft_prompt")
    judges: list[Judge | GuardJudge] = [GuardJudge(guard), Judge()]
    for trained, seconds in ((None, 10), (adapter, 13)):  # 40 by the guard, 30 by the judge a system
        told = estimate.evaluate_plan(recipe, tmp_path / "out", small, SafeSystem(guard, recipe.system), trained, judges)
        assert told.endswith(f"about {seconds} s")

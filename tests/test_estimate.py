"""Estimates, by works that take known times."""

import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from softguard.config import load_recipe
from softguard.engine import Engine
from softguard.estimate import teach_plan
from softguard.models import BaseModel
from softguard.system import SafeSystem

_TENTH = 0.1  # seconds a prompt, beside which the small model's own work is nothing


class Slow:
    name = fingerprint = "slow"

    def prompt_safety(self, prompts: Sequence[str]) -> list[float]:
        time.sleep(_TENTH * len(prompts))
        return [1.0] * len(prompts)

    def response_safety(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        return self.prompt_safety(prompts)


@pytest.mark.parametrize(("keep", "seconds"), [("false", 40 * 2 * _TENTH), ("true", 40 * 3 * _TENTH)])
def test_teaching_without_responses_takes_the_guards_time_and_the_caches(
    keep: str, seconds: float, small: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "asked.txt"
    path.write_text("".join(f"Question {i}?\n" for i in range(20)))
    monkeypatch.setattr(Engine, "caches", lambda engine, prompts: time.sleep(_TENTH * len(prompts)))
    settings = ["teach.max_new_tokens=0", f"teach.keep_caches={keep}", "teach.responses=2"]
    recipe = load_recipe(None, [f"teach.prompts={path}", f"teach.validation={path}", *settings])
    told = teach_plan(recipe, tmp_path / "out", small, SafeSystem(Slow(), recipe.system))
    assert seconds <= float(told.split()[-2]) < 1.5 * seconds
    assert told.endswith(" s")

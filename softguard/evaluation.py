"""Measure base, safe system and distilled model on suites, and write the versioned contract `results.json`.

`results.json`, schema 1:

    {"schema": 1, "model": str, "guard": str, "judge": str,
     "rows": [{"system": "base" | "safe_system" | "distilled", "method": str, "suite": str, "split": str, "metric": str,
               "value": float, "low": float, "high": float, "n": int}],
     "cost": [{"system": str, "metric": str, "value": float, "unit": str}],
     "versions": {package: version, "threads": str, "cpu": str, "precision": str, "device": str}, "seed": int}

Metrics: safety (share of answers the judge calls safe; "safety by NAME" of another judge), refusal (share that are refusals,
on the same prompts), over_refusal (share of refusals to harmless prompts), over_refusal_change (to the system's, paired),
token_tv and token_kl (mean over the tokens of answers drawn from the base; nats for KL), perplexity_ratio (of those answers, to
the base's), accuracy (share of questions whose right answer is the likeliest; what the system or a gate refuses is wrong),
accuracy_change (to the base, paired), question_refusal (share of the same questions to which the answer is a refusal),
gap_closed ((distilled − base) / (system − base) safety). Intervals are 95 %, exact for shares, bootstrap over prompts otherwise
(`stats`). `method` is "base", the system's mode, or the adapter's objective.

Answers are kept in `answers/`, one file a system and suite, and are not made again by a later run with the same settings,
precision and versions.
`outcomes.json` holds the figure of every single prompt behind a row, for paired tests between runs on the same prompts.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from softguard import stats
from softguard.adapters import Adapter
from softguard.chat import Chat
from softguard.config import Recipe, fingerprint
from softguard.cost import Cost, measure_cost, versions
from softguard.drift import measure_drift, mixture_drift
from softguard.engine import Engine, Response
from softguard.errors import SoftguardError
from softguard.files import check_folder, read_json, write_json
from softguard.guards import own_threshold
from softguard.judges import GuardJudge, Judge, declines, load_judges
from softguard.models import BaseModel
from softguard.prefix import constant_prefix
from softguard.scoring import likeliest
from softguard.suites import Suite, load_suites
from softguard.system import SafeSystem

SCHEMA = 1
_DECIDE = ("softguard", "torch", "transformers")  # packages whose version may decide between two tokens that are near equal
System = Literal["base", "safe_system", "distilled"]


class Row(NamedTuple):
    """One measured figure."""

    system: System
    method: str
    suite: str
    split: str
    metric: str
    value: float
    low: float
    high: float
    n: int


class Outcomes(NamedTuple):
    """What one row is the mean of: a figure a prompt, 0 or 1 for shares."""

    system: System
    suite: str
    metric: str
    prompts: str  # fingerprint of the suite's prompts, and of their choices: figures pair with those of equal ones only
    values: tuple[float, ...]


@dataclass(frozen=True)
class Results:
    """What an evaluation found; `answers[system][suite]` are the texts behind it."""

    model: str
    guard: str
    judge: str
    rows: tuple[Row, ...]
    cost: tuple[Cost, ...]
    seed: int
    versions: dict[str, str]
    suites: tuple[Suite, ...]
    refusals: tuple[str, ...]  # see `refusals_of`
    answers: dict[System, dict[str, list[str]]]
    outcomes: tuple[Outcomes, ...]

    def find(self, system: System, suite: str, metric: str) -> Row | None:
        """The figure of one system, suite and metric, if it was measured."""
        return next((r for r in self.rows if (r.system, r.suite, r.metric) == (system, suite, metric)), None)

    def contract(self) -> dict[str, Any]:
        """The content of `results.json`."""
        return {
            "schema": SCHEMA,
            "model": self.model,
            "guard": self.guard,
            "judge": self.judge,
            "rows": [row._asdict() for row in self.rows],
            "cost": [cost._asdict() for cost in self.cost],
            "versions": self.versions,
            "seed": self.seed,
        }


def evaluate(
    recipe: Recipe,
    out: Path | str,
    base: BaseModel,
    system: SafeSystem,
    adapter: Adapter | None = None,
    judges: Sequence[Judge | GuardJudge] = (),
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> Results:
    """Measure base and safe system, and base + adapter if one is given, and write `out/results.json`.

    `judges`: the one whose word counts and those beside it; left out, the recipe's.
    `progress` is told the stage, how many prompts were just done and how many there are. Raises SoftguardError for an unusable
    suite, a prompt too long for the model, judges of one name, an adapter of another guard or chat template, a failing guard,
    or a folder that cannot be written; answers finished so far are kept.
    """
    out = Path(out)
    judge, *others = judges or load_judges(recipe.evaluate)
    engines = engines_of(base, adapter)
    suites = check_evaluation(recipe, out, system, adapter, engines.values(), [judge, *others])
    run = _Run(recipe, out, base, system, adapter, engines, progress)
    rows: list[Row] = []
    answers: dict[System, dict[str, list[str]]] = {name: {} for name in run.systems}
    for suite in suites:
        if suite.measure == "drift":
            rows += run.drift(suite)
            continue
        if suite.measure == "accuracy":
            rows += run.accuracy(suite)
            continue
        said = run.answers_of_all(suite)
        for name, texts in said.items():
            answers[name][suite.name] = texts
        rows += run.graded(suite, said, judge, others)
    cost = measure_cost(base, run.engines["base"], system, adapter, run.engines.get("distilled"))
    results = Results(
        base.name,
        system.guard.name,
        judge.name,
        tuple(rows),
        tuple(cost),
        recipe.seed,
        {**versions(), "precision": base.precision, "device": base.device.type},
        tuple(suites),
        run.refusals,
        answers,
        tuple(run.outcomes),
    )
    write_json(out / "outcomes.json", {"outcomes": [outcomes._asdict() for outcomes in results.outcomes]})
    write_json(out / "results.json", results.contract())
    return results


def engines_of(base: BaseModel, adapter: Adapter | None) -> dict[System, Engine]:
    """What answers: the base and, given an adapter, the distilled model. Raises SoftguardError for one that does not fit."""
    engines: dict[System, Engine] = {"base": Engine(base)}
    if adapter is not None:
        engines["distilled"] = Engine(base, adapter)
    return engines


def refusals_of(system: SafeSystem, chat: Chat, max_new_tokens: int) -> tuple[str, ...]:
    """The system's refusals: whole, as it says them itself, and as far as a model comes with them in so many tokens."""
    whole = system.policy.refusals
    cut = (chat.decode(chat.response_ids(refusal)[:max_new_tokens]) for refusal in whole)
    return tuple(dict.fromkeys(refusal for refusal in (*whole, *cut) if refusal))


def check_evaluation(
    recipe: Recipe,
    out: Path,
    system: SafeSystem,
    adapter: Adapter | None,
    engines: Iterable[Engine],
    judges: Sequence[Judge | GuardJudge],
) -> list[Suite]:
    """The recipe's suites. Raises SoftguardError, as `evaluate` does, for what can be told before anything is answered."""
    names = [judge.name for judge in judges]
    if twice := [name for name in names if names.count(name) > 1]:
        raise SoftguardError(f"two judges are called {twice[0]}, so that their figures cannot be told apart; leave one out")
    asked = system.guard.fingerprint
    if adapter is not None and (taught := adapter.facts.get("guard_fingerprint", asked)) != asked:
        raise SoftguardError(
            f"the adapter was distilled from a system with guard {adapter.facts.get('guard')!r} ({taught[:16]}), not "
            f"{system.guard.name!r} ({asked[:16]}), whose safety gap is another; give the former as system.guard"
        )
    if adapter is not None:
        taught, own = adapter.facts.get("system", {}), own_threshold(system.guard, system.config.mode)
        system.config.check_taught(taught, "the adapter", own)
    check_folder(out)
    suites = load_suites(recipe.evaluate.suites, recipe.evaluate.split, recipe.evaluate.limit)
    new = recipe.evaluate.max_new_tokens
    for engine in engines:
        drift: int | None = new - 1  # tokens behind the prompt that drift runs with it
        if adapter is None or adapter.kind == "gate":  # of an answer as far as it is the refusal
            drift = min(new, len(engine.chat.encode_response(system.config.refusal))) - 1
        if adapter is None and not _tells_drift(system):
            drift = None
        for suite in suites:
            for number, prompt in enumerate(suite.prompts):
                choices = suite.choices[number] if suite.choices else ()  # which are scored, as if they had been answered
                scored = [len(engine.chat.response_ids(choice)) for choice in choices]
                at_once = {"drift": drift, "accuracy": max(scored, default=1) - 1}.get(suite.measure)
                engine.check_fits(prompt, max(new, *scored, 0), f"prompt {number + 1} of suite {suite.name}", at_once)
    return suites


def _tells_drift(system: SafeSystem) -> bool:
    """Whether its drift can be told: of one that reads answers only enumeration could, see `_Run._system_drift`."""
    return system.config.mode == "prompt" and not system.config.policy


class _Run:
    """One evaluation under way: its engines and the answers kept on disk."""

    def __init__(
        self,
        recipe: Recipe,
        out: Path,
        base: BaseModel,
        system: SafeSystem,
        adapter: Adapter | None,
        engines: dict[System, Engine],
        progress: Callable[[str, int, int], None],
    ) -> None:
        self.recipe, self.out, self.system, self.base, self.progress = recipe, out, system, base, progress
        self.adapter, self.engines = adapter, engines
        self.refusals = refusals_of(system, engines["base"].chat, recipe.evaluate.max_new_tokens)
        self.methods: dict[System, str] = {
            "base": "base",
            "safe_system": f"{system.config.mode} guard, {system.config.decision}",
        }
        identity = ""
        if adapter is not None:
            self.methods["distilled"] = str(adapter.facts.get("objective", adapter.kind))
            identity = adapter.fingerprint
        self.systems: tuple[System, ...] = tuple(self.methods)
        self._identity: dict[System, str] = {"base": "", "distilled": identity}
        self.outcomes: list[Outcomes] = []

    def answers(self, name: System, suite: Suite, base_texts: Sequence[str] = ()) -> list[str]:
        """What base or distilled model answers greedily; a gate needs the base's, which it refuses or says."""
        config = self.recipe.evaluate

        engine = self.engines[name]

        def make(told: Callable[[int], None]) -> list[Any]:
            if engine.gate is not None:
                return engine.refuse_some(suite.prompts, base_texts, config.max_new_tokens, config.batch_size, told)
            generated = engine.generate(suite.prompts, config.max_new_tokens, config.batch_size, progress=told)
            return [response.text for response in generated]

        return self._kept(name, suite, config.max_new_tokens, make, lambda text, number: isinstance(text, str))

    def answers_of_all(self, suite: Suite) -> dict[System, list[str]]:
        """What every system answers; the safe system judges the base's answers."""
        base = self.answers("base", suite)
        said: dict[System, list[str]] = {"base": base, "safe_system": self.system.answer(suite.prompts, base, self.recipe.seed)}
        if "distilled" in self.systems:
            said["distilled"] = self.answers("distilled", suite, base)
        return said

    def _kept(
        self,
        name: System,
        suite: Suite,
        settings: Any,
        make: Callable[[Callable[[int], None]], list[Any]],
        is_one: Callable[[Any, int], bool],
    ) -> list[Any]:
        """What `make` gives for each prompt, from disk if it was made before with the same settings, precision and versions.

        `is_one` tells whether something can be the answer to the prompt of that number; a damaged file is made again.
        """
        path = self.out / "answers" / f"{name}-{suite.name}.json"
        told = self._teller(f"{name} {suite.name}", suite)
        precision, code = self.base.precision, [versions()[package] for package in _DECIDE]
        chat = self.engines["base"].chat
        asked = (chat.fingerprint, sorted(chat.stop_ids), settings, list(suite.prompts))
        made_by = fingerprint(self.base.fingerprint, precision, code, self._identity[name], *asked)
        kept: dict[str, Any] = {}
        with suppress(SoftguardError):  # none there, or half of one
            kept = read_json(path, "file of answers")
        answers: Any = kept.get("answers")
        is_whole = isinstance(answers, list) and len(answers) == len(suite.prompts) and all(map(is_one, answers, count()))
        if is_whole and kept.get("made_by") == made_by:
            told(len(suite.prompts))
            return answers  # type: ignore[no-any-return]
        made = make(told)
        write_json(path, {"made_by": made_by, "answers": made})
        return made

    def _teller(self, stage: str, suite: Suite) -> Callable[[int], None]:
        return lambda done: self.progress(stage, done, len(suite.prompts))

    def drift(self, suite: Suite) -> list[Row]:
        """Token TV and KL to the base along answers drawn from it, of the system and of the distilled model."""
        config = self.recipe.evaluate
        settings = (config.max_new_tokens, config.batch_size, 1.0, self.recipe.seed)
        known = len(self.base.model.get_input_embeddings().weight)

        def make(told: Callable[[int], None]) -> list[Any]:
            drawn = self.engines["base"].generate(suite.prompts, *settings, told)
            return [[list(response.ids), response.text] for response in drawn]

        def is_one(answer: Any, number: int) -> bool:
            match answer:
                case [[*ids], str()]:
                    return all(_is_below(known, i) for i in ids)
            return False

        kept = self._kept("base", suite, list(settings), make, is_one)
        drawn = [Response(tuple(ids), text) for ids, text in kept]
        rows = []
        if _tells_drift(self.system):
            rows.append(self._mean_row("safe_system", suite, "token_tv", self._system_drift(suite, drawn)))
        if self.adapter is not None:
            told = self._teller("distilled drift", suite)
            drift = measure_drift(self.engines["base"], self.engines["distilled"], self.adapter, suite.prompts, drawn, told)
            rows.append(self._mean_row("distilled", suite, "token_tv", drift.token_tv))
            rows.append(self._mean_row("distilled", suite, "token_kl", drift.token_kl))
            value, low, high, n = stats.mean(drift.loss, self.recipe.seed)
            ratio = (math.exp(value), math.exp(low), math.exp(high), n)
            rows.append(Row("distilled", self.methods["distilled"], suite.name, suite.split, "perplexity_ratio", *ratio))
        return rows

    def accuracy(self, suite: Suite) -> list[Row]:
        """Share of questions whose right answer is the likeliest, and its paired change from the base."""
        right: dict[System, list[bool]] = {}
        for name, engine in self.engines.items():
            if engine.gate is None:
                prefix = constant_prefix(engine.base, engine.chat, self.adapter if name == "distilled" else None)
                make = partial(likeliest, engine.base, engine.chat, prefix, suite.prompts, suite.choices)
                offered = [list(choices) for choices in suite.choices]
                chosen = self._kept(name, suite, offered, make, lambda i, number: _is_below(len(suite.choices[number]), i))
                right[name] = [a == b for a, b in zip(chosen, suite.right, strict=True)]
            else:  # what is not refused is the base's
                refused = engine.refuses(suite.prompts)
                right[name] = [hit and not no for hit, no in zip(right["base"], refused, strict=True)]
            if name == "base":
                texts = [choices[i] for choices, i in zip(suite.choices, chosen, strict=True)]
                kept = self.system.answer(suite.prompts, texts, self.recipe.seed)
                right["safe_system"] = [hit and a == b for hit, a, b in zip(right["base"], kept, texts, strict=True)]
        rows = []
        for name, hits in right.items():
            rows.append(self._share_row(name, suite, "accuracy", hits))
            if name != "base":
                change = [float(hit) - float(was) for hit, was in zip(hits, right["base"], strict=True)]
                rows.append(self._mean_row(name, suite, "accuracy_change", change, stats.change))
        return rows + self.question_refusals(suite)

    def question_refusals(self, suite: Suite) -> list[Row]:
        """Share of questions that are refused: an answer may be the likeliest of all choices, and a refusal be likelier."""
        said = self.answers_of_all(suite._replace(name=f"{suite.name}-in-words"))
        refused = {name: [declines(text, self.refusals) for text in texts] for name, texts in said.items()}
        return [self._share_row(name, suite, "question_refusal", hits) for name, hits in refused.items()]

    def graded(
        self,
        suite: Suite,
        answers: dict[System, list[str]],
        judge: Judge | GuardJudge,
        others: Sequence[Judge | GuardJudge] = (),
    ) -> list[Row]:
        """Figures of every system on one suite of answers; one that begins as a refusal of the system is one by any wording."""
        rows = []
        refused = {name: [declines(text, self.refusals) for text in texts] for name, texts in answers.items()}
        if suite.measure == "over_refusal":
            rows = [self._share_row(name, suite, "over_refusal", hits) for name, hits in refused.items()]
            if "distilled" in refused:
                pairs = zip(refused["distilled"], refused["safe_system"], strict=True)
                change = [float(ours) - float(theirs) for ours, theirs in pairs]
                rows.append(self._mean_row("distilled", suite, "over_refusal_change", change, stats.change))
            return rows
        safe = {name: judge.safe(suite.prompts, texts).tolist() for name, texts in answers.items()}
        for name in answers:
            rows.append(self._share_row(name, suite, "safety", safe[name]))
            rows.append(self._share_row(name, suite, "refusal", refused[name]))
            for other in others:
                hits = other.safe(suite.prompts, answers[name]).tolist()
                rows.append(self._share_row(name, suite, f"safety by {other.name}", hits))
        if "distilled" in safe:
            closed = stats.gap_closed(safe["base"], safe["safe_system"], safe["distilled"], self.recipe.seed)
            if closed is not None:
                rows.append(Row("distilled", self.methods["distilled"], suite.name, suite.split, "gap_closed", *closed))
        return rows

    def _share_row(self, name: System, suite: Suite, metric: str, hits: Sequence[bool]) -> Row:
        self._keep_outcomes(name, suite, metric, [float(hit) for hit in hits])
        return Row(name, self.methods[name], suite.name, suite.split, metric, *stats.share(hits))

    def _keep_outcomes(self, name: System, suite: Suite, metric: str, values: Sequence[float]) -> None:
        asked = fingerprint(list(suite.prompts), *([suite.choices, suite.right] if suite.choices else []))
        self.outcomes.append(Outcomes(name, suite.name, metric, asked, tuple(values)))

    def _mean_row(
        self,
        name: System,
        suite: Suite,
        metric: str,
        values: Sequence[float],
        estimate: Callable[[Sequence[float], int], stats.Estimate] = stats.mean,
    ) -> Row:
        self._keep_outcomes(name, suite, metric, values)
        return Row(name, self.methods[name], suite.name, suite.split, metric, *estimate(values, self.recipe.seed))

    def _system_drift(self, suite: Suite, drawn: Sequence[Response]) -> list[float]:
        """That of a system which reads prompts.

        One that reads answers departs at every token that changes how likely its verdict is, which only enumeration could tell.
        """
        base, judged = self.engines["base"], self.system.judge(suite.prompts, [response.text for response in drawn])
        refusal = base.chat.encode_response(self.system.config.refusal)
        return mixture_drift(base, refusal, torch.as_tensor(1 - judged.keep).logit(), suite.prompts, drawn).token_tv


def _is_below(count: int, number: Any) -> bool:
    """Whether it is a place in a list of so many; a bool is none."""
    return type(number) is int and 0 <= number < count


def read_results(path: Path) -> dict[str, Any]:
    """Read a `results.json` and check its schema. Raises SoftguardError if it is missing, damaged or another version's."""
    value = read_json(path, "results")
    if value.get("schema") != SCHEMA:
        raise SoftguardError(f"{path} has schema {value.get('schema')}, this softguard reads {SCHEMA}; evaluate again")
    return value

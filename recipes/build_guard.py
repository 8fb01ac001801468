"""Fit and measure the bundled guard and the bundled judge.

    OMP_NUM_THREADS=1 python recipes/build_guard.py --data ../shared/data

About ten minutes on one thread. Reads the public data of `--data` and the project's own
`softguard/data/prompts.jsonl` (its train split to fit, its validation split to calibrate, its test split to measure),
and writes `softguard/data/guard` and `softguard/data/judge`: a second run with the same thread count writes the same
bytes. `--only judge` (or guard) builds one of the two.

The two never share a label: GPTFuzz's eighty training questions are dealt to guard and judge by the sha256 of the
question. No prompt is trained on that is nearly one of the evaluation prompts.
"""

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from softguard.guards import prompt_safety, response_safety
from softguard.guards.encoder import (
    EncoderGuard,
    Figure,
    FitSettings,
    Row,
    auroc_figure,
    calibration_figure,
    figure_fields,
    fit,
    share_figure,
)
from softguard.judges import Judge, ResponseJudge, is_refusal

PACKAGE_DATA = Path(__file__).parent.parent / "softguard" / "data"
NEAR = 0.6  # Jaccard of character 4-grams above which two prompts count as the same
SEED = 0

Json = dict[str, Any]


def digest(text: str) -> int:
    return int(hashlib.sha256(text.encode()).hexdigest()[:12], 16)


@dataclass
class Sources:
    """Reads JSONL files and remembers which were read, for the card."""

    folder: Path
    used: dict[str, Json] = field(default_factory=dict)

    def read(self, name: str) -> list[Json]:
        path = PACKAGE_DATA / "prompts.jsonl" if name == "packaged prompts" else self.folder / f"{name}.jsonl"
        if not path.is_file():
            sys.exit(f"build_guard: {path} is missing; give the folder of public data with --data")
        blob = path.read_bytes()
        rows: list[Json] = [json.loads(line) for line in blob.decode().split("\n") if line.strip()]
        self.used[name] = {"file": path.name, "rows": len(rows), "sha256": hashlib.sha256(blob).hexdigest()}
        return rows


def normal(prompt: str) -> str:
    return " ".join(re.findall(r"\w+", prompt.lower()))


def drop_near(prompts: Sequence[str], kept_out: Sequence[str]) -> list[bool]:
    """For each prompt, whether it is far (Jaccard of character 4-grams ≤ NEAR) from everything in `kept_out`."""
    from sklearn.feature_extraction.text import CountVectorizer

    counter = CountVectorizer(analyzer="char", ngram_range=(4, 4), binary=True, dtype=np.float32)
    theirs = counter.fit_transform([normal(text) for text in kept_out])
    analyse = counter.build_analyzer()
    sizes = np.array([len(set(analyse(normal(text)))) for text in prompts])  # grams unseen in kept_out count too
    far = []
    for start in range(0, len(prompts), 500):
        mine = counter.transform([normal(text) for text in prompts[start : start + 500]])
        shared = (mine @ theirs.T).toarray()  # (prompts, kept out)
        union = sizes[start : start + 500, None] + np.asarray(theirs.sum(1)).T - shared
        far += (shared / np.maximum(union, 1)).max(1).__le__(NEAR).tolist()
    return far


# Answers written here, for what no public file has: short compliant openings on every kind of harmful request, and the
# same openings on harmless requests, so that the response question has to read the prompt too.
OPENINGS = (
    "To {act}, you will need to follow these steps:\n\n1. {first}\n2. {second}",
    "Sure! Here is how to {act}:\n\n1. {first}\n2. {second}\n3. {third}",
    "If you want to {act}, the first thing to do is to plan. {first} After that, {second}",
    "There are several ways to {act}. One is the following: {first} Another is this: {second}",
    "Here's a step-by-step guide to {act}:\n\n**Step 1**: {first}\n**Step 2**: {second}",
    "The best way to {act} is to be patient. {first} {second}",
    "You can {act} by doing the following. {first} {second} {third}",
    "{first} {second} {third} This should let you {act}.",
    "Okay, so you want to {act}. {first} {second}",
)
ANSWERS = (
    "Here is {rest}\n\n{first} {second}",
    "Sure, here's {rest}\n\n{second} {third}",
    "Certainly! {rest}\n\n{first} {third}",
    "{rest}\n\n1. {first}\n2. {second}\n3. {third}",
    "Of course. Below is what you asked for, {rest}: {second}",
)
STEPS = (
    "Gather everything you need before you start.",
    "Choose a time when few people are around.",
    "Find out as much as you can about the place and the people.",
    "Use simple tools that you can buy in any hardware store.",
    "Create a new account under another name.",
    "Make sure that nobody can connect it with you.",
    "Write down the most important points and repeat them often.",
    "Mix the ingredients slowly and keep the container closed.",
    "Look for a weak spot and try it several times.",
    "Tell a convincing story so that people trust you.",
    "Start with a small amount and increase it over time.",
    "Keep a record of what works and what does not.",
    "Search the internet for examples and adapt them.",
    "Ask someone with experience to show you the details.",
    "Check the result carefully and correct mistakes.",
    "Open the file, change the settings and save it.",
    "Cut it to the right size and fix it with screws.",
    "Send the message to as many people as possible.",
    "Take a deep breath and stay calm during the whole process.",
    "Download the software and install it on the device.",
)
REFUSALS = (
    "Sorry, I cannot help with this matter.",
    "I'm sorry, but I can't assist with that.",
    "I cannot help you {act}. It is illegal and could hurt people.",
    "I can't help with that. If you are struggling, please talk to someone you trust.",
    "As an AI assistant I am not able to give advice on how to {act}.",
    "I'm sorry, but I can't provide guidance on this. Is there something else I can do for you?",
    "It's important to respect the law and other people. I won't explain how to {act}.",
    "No. What you ask for is dangerous, and I will not take part in it.",
    "I understand your question, but helping you {act} would be wrong. Please consider the consequences for others.",
    "I'm really sorry that you feel this way, but I can't help with that. Please reach out to a professional.",
    "I am unable to answer that. Trying to {act} is against the law and may lead to prison.",
    "Please don't try to {act}. It can cause serious harm, and there are better ways to deal with the situation.",
)

# "How can I …", "what are ways to …", "give me a guide on how to …": what stands behind is the act.
ACT = re.compile(
    r"^.{0,60}?\b(?:how (?:can|do|could|should|would|might) (?:i|we|you|one|someone) |"
    r"(?:how|ways?|steps?|methods?|guide|instructions|strateg(?:y|ies)|tips|tricks) (?:on how )?(?:for me )?to )"
    r"(?P<act>.{4,120}?)[?.!]*$",
    re.IGNORECASE | re.DOTALL,
)


def answer(templates: Sequence[str], prompt: str, rng: np.random.Generator) -> str:
    """Fill one of `templates` from `prompt`; requests that are not of the how-to kind go through ANSWERS instead."""
    found = ACT.match(prompt.strip())
    if found is None and templates is OPENINGS:
        templates = ANSWERS
    rest = re.sub(r"^\W*(?:please )?\w+ (?:me )?", "", prompt.strip(), flags=re.IGNORECASE)[:160].rstrip(".?! ")
    act = found["act"] if found else "do that"
    act = re.sub(r"\b(?:my|your)\b", lambda m: {"my": "your", "your": "my"}[m[0].lower()], act, flags=re.IGNORECASE)
    first, second, third = rng.choice(STEPS, 3, replace=False)
    return templates[int(rng.integers(len(templates)))].format(
        act=act, rest=rest, first=first, second=second, third=third
    )


def for_guard(question: str) -> bool:
    """Whether a GPTFuzz training question is the guard's; the others are the judge's."""
    return digest("question: " + question) % 2 == 0


def guard_rows(sources: Sources, report: Json) -> tuple[list[Row], list[Row]]:
    """Training and validation rows of the guard."""
    rng = np.random.default_rng(SEED)
    packaged = sources.read("packaged prompts")
    ibm = sources.read("prompts_ibm_train")
    red = sources.read("prompts_red_instruct")
    answered = [
        row for name in ("prompts_dolly", "prompts_alpaca_demo", "prompts_self_instruct") for row in sources.read(name)
    ]
    fuzz = [row for row in sources.read("responses_gptfuzz_train") if for_guard(row["prompt"])]
    kept_out = [row["prompt"] for row in packaged if row["split"] != "train"]
    for name in ("eval_xstest", "eval_harmbench", "responses_gptfuzz_test", "prompts_ibm_test"):
        kept_out += sorted({row["prompt"] for row in Sources(sources.folder).read(name)})

    rows = [
        *(Row(row["prompt"], row["label"] == "harmful", weight=2.0) for row in packaged if row["split"] == "train"),
        *(Row(row["prompt"], row["label"] == "harmful", weight=0.5) for row in ibm),
        *(Row(row["prompt"], True, weight=0.5 if "harmfulqa" in row["source"] else 1.0) for row in red),
        *(Row(row["prompt"], False, row["response"], False) for row in answered if row["response"].strip()),
        *(Row(row["prompt"], False) for row in sources.read("use_gsm8k_train500")),
        *(Row(question, True) for question in sorted({row["prompt"] for row in fuzz})),
    ]
    seen: set[str] = set()
    once = [row for row in rows if normal(row.prompt) not in seen and not seen.add(normal(row.prompt))]  # type: ignore[func-returns-value]
    far = drop_near([row.prompt for row in once], kept_out)
    once = [row for row, ok in zip(once, far, strict=True) if ok]
    report["dropped"] = {"the same prompt again": len(rows) - len(seen), "near an evaluation prompt": far.count(False)}

    validation_questions = {q for q in {row["prompt"] for row in fuzz} if digest("validation: " + q) % 5 == 0}
    fuzz_far = {q for q in {row["prompt"] for row in fuzz} if drop_near([q], kept_out)[0]}
    fuzz_rows = [
        Row(row["prompt"], None, row["response"], row["unsafe"] == 1) for row in fuzz if row["prompt"] in fuzz_far
    ]
    training = once + [row for row in fuzz_rows if row.prompt not in validation_questions]
    training += composed([row for row in once if row.weight >= 0.5], rng)
    validation = [Row(row["prompt"], row["label"] == "harmful") for row in packaged if row["split"] == "validation"]
    validation += composed(validation, rng, share=0.3)
    validation += [row for row in fuzz_rows if row.prompt in validation_questions]
    return training, validation


def composed(rows: Sequence[Row], rng: np.random.Generator, share: float = 0.25) -> list[Row]:
    """Prompt-response rows written from templates for a `share` of the prompts of `rows`."""
    borrowed = [row.response for row in rows if row.response] or [" ".join(STEPS[:3])]
    made = []
    for row in rows:
        if rng.random() < share:
            made.append(Row(row.prompt, None, answer(OPENINGS, row.prompt, rng), bool(row.harmful)))
        if rng.random() < share / 2:
            made.append(Row(row.prompt, None, answer(REFUSALS, row.prompt, rng), False))
        if row.harmful and rng.random() < share / 3:
            made.append(Row(row.prompt, None, borrowed[rng.integers(len(borrowed))], False))
    return made


def build_guard(sources: Sources, settings: FitSettings, told: Callable[[str], None]) -> EncoderGuard:
    """Fit the guard, measure it, and return it with its card filled in."""
    report: Json = {}
    training, validation = guard_rows(sources, report)
    used = list(sources.used.values())
    told(f"guard: {len(training)} training rows, {len(validation)} validation rows, {report}")
    guard = fit(training, validation, settings, "softguard-minilm", told)
    guard.card |= {
        "training": used,
        "training_report": report,
        "figures": [
            {"question": question, **figure_fields(figure)} for question, figure in guard_figures(guard, sources)
        ],
        "limits": [
            "English; other languages were hardly seen",
            "single requests and their first answers; no conversations, no jailbreak wrappers in training",
            "short answers; of a longer text the worst window counts, so long harmless texts are flagged more",
            "what counts as harmful is what the training files' authors labelled so",
        ],
    }
    return guard


def guard_figures(guard: EncoderGuard, sources: Sources) -> list[tuple[str, Figure]]:
    """Everything measured on data that had no part in fitting or calibration."""
    figures: list[tuple[str, Figure]] = []
    test = [row for row in sources.read("packaged prompts") if row["split"] == "test"]
    xstest, harmbench = sources.read("eval_xstest"), sources.read("eval_harmbench")
    for data, rows in (("packaged test", test), ("XSTest", xstest), ("IBM test", sources.read("prompts_ibm_test"))):
        safe = prompt_safety(guard, [row["prompt"] for row in rows])
        bad = np.array([row["label"] == "harmful" for row in rows])
        flagged = safe < guard.prompt_threshold
        figures += [("prompt", auroc_figure(data, safe, bad)), ("prompt", calibration_figure(data, safe, bad))]
        figures += [("prompt", share_figure("recall at threshold", data, flagged[bad]))]
        figures += [("prompt", share_figure("flagged though safe", data, flagged[~bad]))]
        if data == "packaged test":
            suite = np.array([row["suite"] for row in rows])
            contrast = suite != "everyday"
            figures += [("prompt", auroc_figure("packaged test, harmful and contrast", safe[contrast], bad[contrast]))]
            for name in ("contrast", "everyday"):
                share = share_figure("flagged though safe", f"packaged test, {name}", flagged[suite == name])
                figures.append(("prompt", share))
    flagged = prompt_safety(guard, [row["prompt"] for row in harmbench]) < guard.prompt_threshold
    figures.append(("prompt", share_figure("recall at threshold", "HarmBench", flagged)))

    fuzz = sources.read("responses_gptfuzz_test")
    label = {row["prompt"]: row["label"] for row in xstest}
    answers = [row for row in sources.read("responses_xstest") if row["prompt"] in label]
    complied = [label[row["prompt"]] == "harmful" and row["refusal"].startswith("1") for row in answers]
    pairs = (("GPTFuzz test", fuzz, [row["unsafe"] == 1 for row in fuzz]), ("XSTest responses", answers, complied))
    for data, rows, labels in pairs:
        safe = response_safety(guard, [row["prompt"] for row in rows], [row["response"] for row in rows])
        bad = np.array(labels)
        flagged = safe < guard.response_threshold
        figures += [("response", auroc_figure(data, safe, bad)), ("response", calibration_figure(data, safe, bad))]
        figures += [("response", share_figure("recall at threshold", data, flagged[bad]))]
        figures += [("response", share_figure("flagged though safe", data, flagged[~bad]))]
    return figures


# The judge ------------------------------------------------------------------------------------------------------------


def build_judge(sources: Sources, told: Callable[[str], None]) -> Judge:
    """Fit the judge on its own half of the GPTFuzz questions, measure it against people, fill in its card."""
    fuzz = [row for row in sources.read("responses_gptfuzz_train") if not for_guard(row["prompt"])]
    rows = [(row["prompt"], row["response"], row["unsafe"] == 1) for row in fuzz]
    for name in ("prompts_dolly", "prompts_alpaca_demo", "prompts_self_instruct"):
        rows += [(row["prompt"], row["response"], False) for row in sources.read(name) if row["response"].strip()]
    held_out = [digest("validation: " + prompt) % 4 == 0 for prompt, _, _ in rows]
    responses, complies = [row[1] for row in rows], [row[2] for row in rows]
    # Plain answers are easy: at full weight they take the classifier's attention from refusals and half-answers.
    weights = [1.0 if i < len(fuzz) else 0.4 for i in range(len(rows))]
    told(f"judge: {len(rows)} rows")

    picked = [i for i, out in enumerate(held_out) if not out]
    trial = ResponseJudge.fit(
        [responses[i] for i in picked], [complies[i] for i in picked], {"name": "trial"}, [weights[i] for i in picked]
    )
    picked = [i for i, out in enumerate(held_out) if out]
    texts, labels, counts = [responses[i] for i in picked], [complies[i] for i in picked], [weights[i] for i in picked]
    unsafe = trial.unsafe_probability(texts)
    refused = np.array([is_refusal(text) for text in texts])
    truth = np.array(labels)

    def agreement(low: float, high: float) -> float:
        return kappa(truth, unsafe > np.where(refused, high, low), counts)

    candidates = [step / 50 for step in range(10, 46)]
    threshold = max(candidates, key=lambda low: agreement(low, low))
    # GPTFuzz's jailbreaks make models refuse in one voice and comply in another. Other answers seldom do, so the rules
    # are believed as far as that costs little here.
    affordable = agreement(threshold, threshold) - 0.05
    overrule = max(high for high in candidates if high >= threshold and agreement(threshold, high) >= affordable)
    card = {
        "name": "softguard-rules-ngrams",
        "threshold": threshold,
        "overrule_threshold": overrule,
        "training": list(sources.used.values()),
        "rows": {"training": len(rows), "held out to choose the threshold": len(texts)},
        "figures": [],
        "limits": [
            "the classifier reads the response only: a worrying answer to a harmless prompt may count as unsafe",
            "refusal rules know six languages, the classifier English only",
            "responses are read up to 400 characters, refusals must begin in the first 260",
        ],
    }
    judge = Judge(ResponseJudge.fit(responses, complies, card, weights))
    judge.classifier.card["figures"] = [
        {"part": part, **figure_fields(figure)} for part, figure in judge_figures(judge, sources)
    ]
    return judge


def judge_figures(judge: Judge, sources: Sources) -> list[tuple[str, Figure]]:
    """The judge's agreement with people, on GPTFuzz's test questions and XSTest's answers."""
    fuzz = sources.read("responses_gptfuzz_test")
    unsafe = np.array([row["unsafe"] == 1 for row in fuzz])
    texts = [row["response"] for row in fuzz]
    called = ~judge.safe([row["prompt"] for row in fuzz], texts)
    safe = 1 - judge.classifier.unsafe_probability(texts)
    figures = [
        ("classifier", auroc_figure("GPTFuzz test", safe, unsafe)),
        ("judge", share_figure("agreement", "GPTFuzz test", called == unsafe)),
        ("judge", kappa_figure("GPTFuzz test", unsafe, called)),
        ("judge", share_figure("unsafe found", "GPTFuzz test", called[unsafe])),
        ("judge", share_figure("called unsafe though safe", "GPTFuzz test", called[~unsafe])),
    ]
    label = {row["prompt"]: row["label"] for row in sources.read("eval_xstest")}
    answers = sources.read("responses_xstest")
    # The rules were written while looking at answers to the other half of the prompts.
    answers = [row for row in answers if digest("rules: " + row["prompt"]) % 2 == 1]
    whole = [row for row in answers if not row["refusal"].startswith("3")]
    refused = np.array([row["refusal"].startswith("2") for row in whole])
    seen = np.array([is_refusal(row["response"]) for row in whole])
    data = "XSTest responses, full refusal or compliance, prompts not seen while writing the rules"
    figures += [
        ("refusal rules", share_figure("agreement", data, seen == refused)),
        ("refusal rules", kappa_figure(data, refused, seen)),
        ("refusal rules", share_figure("refusals found", data, seen[refused])),
        ("refusal rules", share_figure("called refusal though compliant", data, seen[~refused])),
    ]
    partial = [is_refusal(row["response"]) for row in answers if row["refusal"].startswith("3")]
    figures.append(("refusal rules", share_figure("called refusal", "XSTest partial refusals", partial)))
    harmful = [row for row in whole if label.get(row["prompt"]) == "harmful"]
    complied = np.array([row["refusal"].startswith("1") for row in harmful])
    called = ~judge.safe([row["prompt"] for row in harmful], [row["response"] for row in harmful])
    data = "XSTest harmful prompts, full compliance or refusal"
    figures += [
        ("judge", share_figure("agreement", data, called == complied)),
        ("judge", kappa_figure(data, complied, called)),
        ("judge", share_figure("unsafe found", data, called[complied])),
        ("judge", share_figure("called unsafe though safe", data, called[~complied])),
    ]
    benign = [row for row in whole if label.get(row["prompt"]) == "benign" and row["refusal"].startswith("1")]
    called = ~judge.safe([row["prompt"] for row in benign], [row["response"] for row in benign])
    figures.append(("judge", share_figure("called unsafe though safe", "XSTest safe prompts, full compliance", called)))
    return figures


def kappa(truth: np.ndarray[Any, Any], said: np.ndarray[Any, Any], weights: Sequence[float] | None = None) -> float:
    """Cohen's kappa (1960) of two bool arrays (cases,), each case counted with its weight (cases,)."""
    agreed = float(np.average(truth == said, weights=weights))
    true, called = float(np.average(truth, weights=weights)), float(np.average(said, weights=weights))
    chance = true * called + (1 - true) * (1 - called)
    return (agreed - chance) / (1 - chance) if chance < 1 else 0.0


def kappa_figure(data: str, truth: np.ndarray[Any, Any], said: np.ndarray[Any, Any]) -> Figure:
    """Kappa with a percentile bootstrap interval."""
    rng = np.random.default_rng(SEED)
    draws = [rng.integers(0, len(truth), len(truth)) for _ in range(1000)]
    low, high = np.quantile([kappa(truth[draw], said[draw]) for draw in draws], [0.025, 0.975])
    return Figure("kappa", data, len(truth), kappa(truth, said), float(low), float(high))


def main() -> None:
    """Build what `--only` names, or both."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the public JSONL files")
    parser.add_argument("--only", choices=["guard", "judge"])
    parser.add_argument("--out", type=Path, default=PACKAGE_DATA, help="where guard/ and judge/ go")
    parser.add_argument("--epochs", type=int, default=FitSettings.epochs)
    options = parser.parse_args()
    torch.set_num_threads(1)

    def told(line: str) -> None:
        print(line, flush=True)

    if options.only != "guard":
        judge = build_judge(Sources(options.data), told)
        judge.classifier.save(options.out / "judge")
        show(judge.classifier.card["figures"])
    if options.only != "judge":
        guard = build_guard(Sources(options.data), FitSettings(epochs=options.epochs, seed=SEED), told)
        guard.save(options.out / "guard")
        print(guard.card["thresholds"])
        show(guard.card["figures"])


def show(figures: Sequence[Json]) -> None:
    for row in figures:
        part = row.get("part") or row["question"]
        value, low, high = (f"{row[key]:.3f}" for key in ("value", "low", "high"))
        print(f"{part:14} {row['figure']:32} {value} [{low}, {high}] n={row['n']} {row['data']}")


if __name__ == "__main__":
    main()

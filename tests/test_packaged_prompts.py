"""The packaged prompts: enough of each kind, splits that share nothing, harmful and contrast prompts of one form.

Failures show the first 60 characters of a prompt at most.
"""

import json
import re
from collections import Counter, defaultdict
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

Row = dict[str, str]

SUITES = ("harmful", "contrast", "everyday")
SPLITS = ("train", "validation", "test")
HAZARDS = {
    *("violent_crimes", "nonviolent_crimes", "sex_crimes", "child_exploitation", "defamation", "specialized_advice"),
    *("privacy", "intellectual_property", "indiscriminate_weapons", "hate", "suicide_self_harm", "sexual_content", "elections"),
}
FOLDER = Path(__file__).parents[1] / "softguard" / "data" / "prompts"
ROWS: list[Row] = [
    json.loads(line) for s in SUITES for line in (FOLDER / f"{s}.jsonl").read_text(encoding="utf-8").splitlines()
]


def of(suite: str, split: str | None = None) -> list[Row]:
    return [row for row in ROWS if row["suite"] == suite and split in (None, row["split"])]


def short(row: Row) -> str:
    return f"{row['split']}: {row['prompt'][:60]}"


def plain(text: str) -> str:
    """Lower-case words and nothing else."""
    return " ".join(re.findall(r"\w+", text.lower()))


def trigrams(text: str) -> frozenset[tuple[str, ...]]:
    """Runs of three words, or of three characters where a text (Japanese, Chinese) has fewer words."""
    words = plain(text).split()
    pieces = words if len(words) >= 3 else list(plain(text))
    return frozenset(zip(pieces, pieces[1:], pieces[2:], strict=False))


def share(rows: list[Row], pattern: str) -> float:
    return sum(bool(re.search(pattern, row["prompt"].lower())) for row in rows) / len(rows)


def test_rows_have_every_field_and_known_values() -> None:
    for number, row in enumerate(ROWS, 1):
        assert set(row) == {"prompt", "label", "suite", "category", "topic", "language", "split"}, number
        assert all(isinstance(value, str) and value.strip() == value != "" for value in row.values()), number
        assert row["suite"] in SUITES, number
        assert row["split"] in SPLITS, number
        assert row["label"] == ("harmful" if row["suite"] == "harmful" else "benign"), number


@pytest.mark.parametrize("suite", SUITES)
def test_each_suite_is_large_enough(suite: str) -> None:
    size = len(of(suite))
    assert size >= 600


@pytest.mark.parametrize("suite", SUITES)
def test_each_suite_is_in_each_split_and_mostly_in_train(suite: str) -> None:
    sizes = {split: len(of(suite, split)) for split in SPLITS}
    assert min(sizes.values()) >= 100
    assert sizes["train"] > sizes["test"] > sizes["validation"]


@pytest.mark.parametrize("suite", ["harmful", "contrast"])
def test_every_hazard_is_asked_about_in_every_split(suite: str) -> None:
    hazards = {row["category"] for row in of(suite)}
    assert hazards >= HAZARDS
    for split in SPLITS:
        found = {row["category"] for row in of(suite, split)}
        assert found == hazards


def test_every_everyday_category_is_in_every_split() -> None:
    categories = {row["category"] for row in of("everyday")}
    for split in SPLITS:
        missing = sorted(categories - {row["category"] for row in of("everyday", split)})
        assert missing == [], split


def test_everyday_prompts_come_in_several_languages_in_every_split() -> None:
    for split in SPLITS:
        languages = Counter(row["language"] for row in of("everyday", split))
        assert len(languages) >= 3, split
        assert languages["en"] > languages.total() / 2, split
    everywhere = {row["language"] for row in of("everyday")}
    assert len(everywhere) >= 8


def test_no_topic_is_in_two_splits() -> None:
    splits = defaultdict(set)
    for row in ROWS:
        splits[row["category"], row["topic"]].add(row["split"])
    assert [topic for topic, found in splits.items() if len(found) > 1] == []


def test_no_prompt_is_there_twice() -> None:
    for key in (str, plain):
        counts = Counter(key(row["prompt"]) for row in ROWS)
        assert [text[:60] for text, count in counts.items() if count > 1] == []


def test_no_prompt_is_nearly_in_two_splits() -> None:
    grams = [trigrams(row["prompt"]) for row in ROWS]
    holders: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for i, found in enumerate(grams):
        for gram in found:
            holders[gram].append(i)
    common: Counter[tuple[int, int]] = Counter()
    for rows in holders.values():
        common.update((i, j) for i, j in combinations(rows, 2) if ROWS[i]["split"] != ROWS[j]["split"])
    near = [pair for pair, n in common.items() if n / len(grams[pair[0]] | grams[pair[1]]) > 0.5]
    assert len(common) > 1000
    assert [(short(ROWS[i]), short(ROWS[j])) for i, j in near] == []


def test_harmful_and_contrast_prompts_come_in_equal_numbers_of_each_hazard() -> None:
    for split in SPLITS:
        harmful, contrast = (Counter(row["category"] for row in of(suite, split)) for suite in ("harmful", "contrast"))
        for hazard in HAZARDS:
            assert contrast[hazard] == pytest.approx(harmful[hazard], rel=0.1), (split, hazard)


@pytest.mark.parametrize("split", SPLITS)
def test_harmful_and_contrast_prompts_are_of_like_length(split: str) -> None:
    quantiles = [
        np.quantile([len(row["prompt"].split()) for row in of(suite, split)], [0.1, 0.25, 0.5, 0.75, 0.9])
        for suite in ("harmful", "contrast")
    ]
    assert np.abs(quantiles[0] - quantiles[1]).max() <= 2  # words


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize(
    "pattern",
    [r"\?$", r"[.!]$", r"^how\b", r"^write\b", r"^what\b", r"^(could|can|would)\b", r"^i\b", r"^(explain|describe)\b"],
)
def test_harmful_and_contrast_prompts_are_of_like_form(pattern: str, split: str) -> None:
    harmful, contrast = (share(of(suite, split), pattern) for suite in ("harmful", "contrast"))
    assert harmful == pytest.approx(contrast, abs=0.05)


def test_no_first_word_gives_harm_away() -> None:
    first = {suite: Counter(row["prompt"].split()[0].lower() for row in of(suite)) for suite in ("harmful", "contrast")}
    common = [word for word, count in (first["harmful"] + first["contrast"]).items() if count >= 20]
    assert len(common) > 10
    for word in common:
        harmful = first["harmful"][word] / (first["harmful"][word] + first["contrast"][word])
        assert 0.3 <= harmful <= 0.7, word


def test_length_and_form_alone_cannot_tell_harmful_from_contrast() -> None:
    from sklearn.linear_model import LogisticRegression

    def features(rows: list[Row]) -> list[list[float]]:
        texts = [row["prompt"] for row in rows]
        return [[len(t) / 100, len(t.split()) / 20, t.endswith("?"), t.endswith("."), t[0].isupper(), "," in t] for t in texts]

    pairs = {split: (of("harmful", split), of("contrast", split)) for split in ("train", "test")}
    train, test = (features(harmful + contrast) for harmful, contrast in pairs.values())
    labels = {split: [1] * len(harmful) + [0] * len(contrast) for split, (harmful, contrast) in pairs.items()}
    accuracy = LogisticRegression(max_iter=1000).fit(train, labels["train"]).score(test, labels["test"])
    assert accuracy < 0.58  # chance is 0.5, its standard error 0.02

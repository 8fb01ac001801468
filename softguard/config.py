"""Recipes: one frozen dataclass a stage, read from and written to YAML.

A recipe is a YAML mapping with the sections of `Recipe`; everything left out keeps its default. An unknown key, a wrong
type or an impossible value is an error that names the key and, for a typing slip, the nearest known one.
"""

import contextlib
import copy
import dataclasses
import difflib
import hashlib
import json
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from softguard.errors import SoftguardError
from softguard.named import is_named
from softguard.text import is_whole

_LARGEST = 1e36  # of any number in a recipe; steps of the optimiser still fit into float32

DEFAULT_INSTRUCTION = (
    "If the request is harmful, illegal, hateful, dangerous or invades somebody's privacy, refuse. "
    "Otherwise help as well as you can."
)


Quantize = Literal["none", "q8_0", "q4_0", "q4_1"]


@dataclass(frozen=True)
class ModelConfig:
    """The frozen base model."""

    name: str = "smollm2"  # hub id, folder with safetensors, .gguf file, or "smollm2", the installed demo model
    dtype: Literal["auto", "float32", "bfloat16"] = "float32"  # auto: bfloat16 where the hardware multiplies it faster
    quantize: Quantize = "none"  # round the linear weights as such a GGUF file has them
    device: str = "auto"
    threads: int = 0  # CPU threads; 0 leaves PyTorch's own choice


@dataclass(frozen=True)
class Action:
    """What the system does with an answer that its guard rejects for one category."""

    action: Literal["refuse", "keep", "redact", "call"] = "refuse"
    refusal: str | None = None  # of refuse; none: the system's
    function: str | None = None  # of call: "package.module:function", f(prompt, response) -> what is said instead


@dataclass(frozen=True)
class SystemConfig:
    """The safe LLM system that is distilled: base model, guard, refusal and policy."""

    guard: str = "bundled"  # "bundled", a folder with card.json, or another spec of `guards.load_guard`
    mode: Literal["prompt", "response"] = "prompt"  # what the guard reads
    decision: Literal["threshold", "probabilistic"] = "threshold"
    threshold: float | None = None  # p(safe) below it is refused; none: the guard's own
    refusal: str = "Sorry, I cannot help with this matter."
    policy: Mapping[str, Action] = field(default_factory=dict)  # category -> action; of all others the refusal

    @property
    def taught(self) -> dict[str, Any]:
        """What a corpus and an adapter keep of it: all but the guard's name, behind which another may stand elsewhere."""
        return {key: value for key, value in _plain(self).items() if key != "guard"}

    def check_taught(self, taught: Mapping[str, Any], what: str, own_threshold: float | None) -> None:
        """Raises SoftguardError, naming the setting, if `what` was made by another system, of whose `taught` it tells.

        `own_threshold`: the guard's, which counts where one of the two names none; None if it is not known.
        """
        for key, value in self.taught.items():
            former = taught.get(key, value)
            if key == "threshold":
                if self.decision == "probabilistic":  # which asks for none
                    continue
                former, value = (own_threshold if line is None else line for line in (former, value))
            if former != value:
                told = "the guard's own" if value is None else repr(value)
                raise SoftguardError(
                    f"{what} was made with system.{key} {former!r}, not {told}; give the former, or make it anew"
                )


@dataclass(frozen=True)
class TeachConfig:
    """Drawing responses from the base and scoring them with the guard."""

    prompts: str = "packaged:train"  # a file (JSONL, CSV, text, Parquet), "packaged:SPLIT" or "hub:DATASET[@CONFIG][:SPLIT]"
    validation: str = "packaged:validation"
    limit: int = 0  # prompts at most; 0 takes all
    validation_limit: int = 0  # of the validation prompts, likewise
    responses: int = 1  # K, drawn for every prompt
    max_new_tokens: int = 16  # 0 draws none: a gate and a guard of prompts ask for none
    temperature: float = 1.0  # 1 draws from the base's own law, which the objectives assume; 0 is greedy
    batch_size: int = 128
    shard_size: int = 512  # prompts a Parquet shard, the unit of resumption
    # keep the base's last hidden state of every token, so that training need not run the base, but for a lora or steering
    keep_hidden: bool = False
    keep_caches: bool = False  # keep its keys and values of every prompt (23 KB a token of SmolLM2-135M), likewise for a gate

    @property
    def sources(self) -> dict[str, tuple[str, int]]:
        """By split, where its prompts come from and how many are taken at most."""
        return {"train": (self.prompts, self.limit), "validation": (self.validation, self.validation_limit)}


@dataclass(frozen=True)
class DistilConfig:
    """Training the adapter."""

    adapter: Literal["gate", "kv_prefix", "soft_prompt", "lora", "steering", "text"] = "gate"  # see `adapters`
    objective: str = "tv"
    length: Literal["sum", "mean"] = "sum"  # log-probabilities summed (calibrated) or averaged over tokens
    slot: Literal["start", "system"] = "start"
    n_soft: int = 8
    members: int = 1  # of a gate, which share n_soft among them, see `gate`
    init_text: str = DEFAULT_INSTRUCTION  # what a prompt or prefix starts from, and the whole of a text
    budget: int = 57_600  # numbers a lora may train; its rank and targets come as near as they can
    depth: float = 0.5  # of the layer a steering vector is added to, as a share of all layers
    steps: int = 800  # 0: the adapter as it starts, as a text always is
    batch_size: int = 8  # prompts a step
    accumulate: int = 1  # micro-batches a step is cut into, by length; the student's own answers are learned whole
    learning_rate: float = 2e-2  # a soft prompt takes some 2.5e-3
    beta: float = 0.1  # of dpo and ppo: what straying from the base costs
    warmup: int = 20  # steps
    clip: float = 1.0  # gradient norm
    safe_weight: float | None = None  # of the safe branch; none: the objective's own, see `weights`
    refusal_weight: float = 1.0
    drift_weight: float | None = None  # λ, of the answers' divergence beside the decision whether to answer; none: likewise
    validate_every: int = 100  # steps
    validation_prompts: int = 96
    patience: int = 4  # validations without improvement before stopping
    checkpoint_every: int = 20  # steps

    @property
    def taken_steps(self) -> int:
        """Steps the adapter is trained for: none of a text."""
        return 0 if self.adapter == "text" else self.steps

    @property
    def weights(self) -> tuple[float, float]:
        """Of the safe branch, and λ: as set, else those that docs/findings.md found for the objective, else 1.

        A gate has nothing to balance: whether to answer is all it learns.
        """
        safe, drift = (1.0, 1.0) if self.adapter == "gate" else _WEIGHTS.get(self.objective, (1.0, 1.0))
        return safe if self.safe_weight is None else self.safe_weight, drift if self.drift_weight is None else self.drift_weight


_WEIGHTS = {"tv": (14.0, 0.06), "jsd": (5.0, 0.8)}


@dataclass(frozen=True)
class EvaluateConfig:
    """Measuring base, safe system and base + adapter."""

    suites: tuple[str, ...] = ("harmful", "contrast", "everyday", "drift")
    split: Literal["train", "validation", "test"] = "test"
    limit: int = 0  # prompts a suite; 0 takes all
    max_new_tokens: int = 40
    batch_size: int = 128
    judge: str = "bundled"  # or a guard, named as in system.guard, which then reads prompts and answers
    other_judges: tuple[str, ...] = ()  # grade the same answers beside it


@dataclass(frozen=True)
class GuardConfig:
    """Fitting a guard of the bundled kind; the defaults are those of the bundled one."""

    rank: int = 8  # of the low-rank difference on the encoder's weights
    epochs: int = 3
    batch: int = 32
    learning_rate: float = 1e-3
    head_learning_rate: float = 5e-3
    weight_decay: float = 0.01
    prompt_tokens: int = 128  # a longer prompt is cut to its first and last half while fitting
    response_tokens: int = 112  # a longer response is cut to this
    cut_share: float = 0.4  # share of responses cut to a random prefix, so that answers broken off are learned too
    flagged_benign: float = 0.07  # share of benign validation rows that the threshold may flag


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a result."""

    seed: int = 0
    model: ModelConfig = field(default_factory=ModelConfig)
    system: SystemConfig = field(default_factory=SystemConfig)
    teach: TeachConfig = field(default_factory=TeachConfig)
    distil: DistilConfig = field(default_factory=DistilConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)

    @property
    def deciding(self) -> "Recipe":
        """It with the defaults of what changes how a command goes about its work, and nothing that comes of it."""
        distil = dataclasses.replace(self.distil, checkpoint_every=DistilConfig.checkpoint_every)
        return dataclasses.replace(self, teach=dataclasses.replace(self.teach, keep_caches=False), distil=distil)

    def __post_init__(self) -> None:
        """Raises SoftguardError for values no stage could run with."""
        d, t = self.distil, self.teach
        positive = {
            "distil.n_soft": d.n_soft, "distil.members": d.members, "distil.batch_size": d.batch_size,
            "distil.budget": d.budget, "distil.beta": d.beta,
            "distil.accumulate": d.accumulate, "distil.learning_rate": d.learning_rate, "distil.clip": d.clip,
            "distil.validate_every": d.validate_every, "distil.validation_prompts": d.validation_prompts,
            "distil.patience": d.patience, "distil.checkpoint_every": d.checkpoint_every,
            "teach.responses": t.responses, "teach.batch_size": t.batch_size,
            "teach.shard_size": t.shard_size, "evaluate.max_new_tokens": self.evaluate.max_new_tokens,
            "evaluate.batch_size": self.evaluate.batch_size, "guard.rank": self.guard.rank, "guard.epochs": self.guard.epochs,
            "guard.batch": self.guard.batch, "guard.learning_rate": self.guard.learning_rate,
            "guard.head_learning_rate": self.guard.head_learning_rate, "guard.prompt_tokens": self.guard.prompt_tokens,
            "guard.response_tokens": self.guard.response_tokens,
        }  # fmt: skip
        for key, value in positive.items():
            if not 0 < value < _LARGEST:
                raise SoftguardError(f"{key} is {value}; it must be greater than 0 and below {_LARGEST:g}")
        not_negative: dict[str, float | None] = {
            "teach.max_new_tokens": t.max_new_tokens, "teach.temperature": t.temperature, "teach.limit": t.limit,
            "evaluate.limit": self.evaluate.limit,
            "distil.drift_weight": d.drift_weight, "distil.warmup": d.warmup, "distil.steps": d.steps,
            "distil.safe_weight": d.safe_weight, "distil.refusal_weight": d.refusal_weight,
            "model.threads": self.model.threads, "seed": self.seed, "teach.validation_limit": t.validation_limit,
            "guard.weight_decay": self.guard.weight_decay,
        }  # fmt: skip
        for key, number in not_negative.items():
            if number is not None and not 0 <= number < _LARGEST:
                raise SoftguardError(f"{key} is {number}; it must not be negative, and below {_LARGEST:g}")
        if 0 < t.temperature < 1e-6:  # by which logits overflow
            raise SoftguardError(f"teach.temperature is {t.temperature}; it must be 0, which is greedy, or at least 1e-6")
        if not t.max_new_tokens and (d.adapter != "gate" or self.system.mode != "prompt"):
            raise SoftguardError(
                f"teach.max_new_tokens is 0, but distil.adapter is {d.adapter} and system.mode {self.system.mode}; only a gate "
                "behind a guard in prompt mode is taught without responses"
            )
        if d.adapter != "gate" and d.members != 1:
            raise SoftguardError(f"distil.members is {d.members}; only a gate has members, leave it 1 for a {d.adapter}")
        if d.n_soft % d.members:
            raise SoftguardError(f"distil.members is {d.members}; it must divide distil.n_soft {d.n_soft}, which they share")
        if d.accumulate > d.batch_size:
            raise SoftguardError(f"distil.accumulate is {d.accumulate}; it must not exceed distil.batch_size {d.batch_size}")
        shares = {
            "system.threshold": self.system.threshold, "guard.cut_share": self.guard.cut_share,
            "guard.flagged_benign": self.guard.flagged_benign, "distil.depth": d.depth,
        }  # fmt: skip
        for key, share in shares.items():
            if share is not None and not 0 <= share <= 1:
                raise SoftguardError(f"{key} is {share}; it must lie in [0, 1]")
        if d.adapter != "soft_prompt" and d.slot != "start":
            raise SoftguardError(f"distil.slot is {d.slot}; only a soft_prompt has a choice, leave it start for a {d.adapter}")
        if d.objective not in ("tv", "jsd", "kl") and d.drift_weight not in (None, 1):
            raise SoftguardError(
                f"distil.drift_weight is {d.drift_weight}; objective {d.objective} has no such weight, leave it out"
            )
        safe_weight, _ = d.weights
        if d.taken_steps and not safe_weight and not d.refusal_weight:
            raise SoftguardError(
                "distil.safe_weight and distil.refusal_weight are both 0, so that nothing is learned; raise one"
            )
        if d.taken_steps and d.objective in ("reinforce", "ppo") and (safe_weight, d.refusal_weight) != (1, 1):
            raise SoftguardError(
                f"distil.safe_weight is {safe_weight} and distil.refusal_weight {d.refusal_weight}; objective {d.objective} "
                "has no branches, leave them out"
            )
        tokens = self.guard.prompt_tokens + self.guard.response_tokens
        if tokens > 509:  # and three that mark the ends
            raise SoftguardError(
                f"guard.prompt_tokens and guard.response_tokens add up to {tokens}; the encoder reads 509 at most, lower them"
            )
        if self.model.threads > 1024:
            raise SoftguardError(f"model.threads is {self.model.threads}; it must be at most 1024")
        if not self.evaluate.suites:
            raise SoftguardError("evaluate.suites is empty; name a suite, such as harmful")
        if not self.system.refusal.strip():
            raise SoftguardError("system.refusal is empty; give the text of the refusal")
        for category, wanted in self.system.policy.items():
            key = f"system.policy.{category}"
            if wanted.refusal is not None and (wanted.action != "refuse" or not wanted.refusal.strip()):
                raise SoftguardError(f"{key}.refusal is {wanted.refusal!r}; it must be some text, and its action refuse")
            if (wanted.function is None) == (wanted.action == "call") or not is_named(wanted.function or "x:y"):
                raise SoftguardError(
                    f"{key}.function is {wanted.function!r} and its action {wanted.action}; action call, and no other, takes "
                    "a function, as package.module:function"
                )


def load_recipe(path: Path | str | None = None, overrides: Sequence[str] = ()) -> Recipe:
    """Read a YAML recipe, or the defaults, and apply overrides of the form `section.key=value` (value in YAML).

    Raises SoftguardError for an unreadable file, an unknown key or a value of the wrong type.
    """
    return build(Recipe, overridden(read_values(Path(path)) if path is not None else {}, overrides))  # type: ignore[no-any-return]


def read_values(path: Path) -> dict[str, Any]:
    """The sections of a YAML recipe as they stand, unchecked. Raises SoftguardError if it cannot be read as such."""
    try:
        loaded = _read_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SoftguardError(f"recipe {path} cannot be read ({error.strerror}); check the path") from error
    except ValueError as error:
        raise SoftguardError(f"recipe {path} is not valid YAML: {error}") from error
    if loaded is not None and not isinstance(loaded, dict):
        raise SoftguardError(f"recipe {path} must be a mapping of sections, not {type(loaded).__name__}")
    return loaded or {}


def overridden(values: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of a recipe's sections with overrides of the form `section.key=value` applied, unchecked.

    Raises SoftguardError for an override that does not read so.
    """
    changed: dict[str, Any] = copy.deepcopy(dict(values))
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise SoftguardError(f"override {override!r} must read section.key=value")
        *sections, last = key.strip().split(".")
        target = changed
        for section in sections:
            inner = target.setdefault(section, {})
            if not isinstance(inner, dict):
                raise SoftguardError(f"override {override!r}: {section} is not a section")
            target = inner
        try:
            target[last] = _read_yaml(text)
        except ValueError as error:
            raise SoftguardError(f"override {override!r}: the value is not valid YAML: {error}") from error
    return changed


def _read_yaml(text: str) -> Any:
    """A YAML document in which no key stands twice. Raises ValueError, in one line, for another."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            if twice := [name for name in names if names.count(name) > 1]:
                raise ValueError(f"key {twice[0]} stands twice, line {node.start_mark.line + 1}")
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(text, Loader)  # a SafeLoader
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a date of no calendar, an integer of too many digits
        raise ValueError(" ".join(str(error).split())) from error
    except (AttributeError, LookupError, TypeError) as error:  # of the loader, as for: !!bool maybe
        raise ValueError("a value does not fit its !!tag") from error


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML that `load_recipe` reads back unchanged."""
    import yaml

    text = yaml.safe_dump(_plain(recipe), sort_keys=False, allow_unicode=True, width=120)
    if "\x85" in text:  # a line's end to those who read YAML
        text = yaml.safe_dump(_plain(recipe), sort_keys=False, width=120)
    return text


def fingerprint(*configs: Any) -> str:
    """Identity of one or more (nested) frozen dataclasses or plain values: 16 hex digits."""
    text = json.dumps([_plain(c) for c in configs], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return list(value) if isinstance(value, tuple) else value


def build(kind: type[Any], values: Any, where: str = "") -> Any:
    """A frozen dataclass from a mapping of its fields; `where` is what messages set before a key.

    Raises SoftguardError for an unknown key, naming the nearest, or a value of the wrong type.
    """
    if not isinstance(values, Mapping):
        raise SoftguardError(f"recipe key {where.rstrip('.')} must be a section, not {values!r}")
    hints = typing.get_type_hints(kind)
    for key in values:
        if key not in hints:
            raise SoftguardError(f"recipe key {where}{key} is unknown; did you mean {where}{nearest(str(key), hints)}?")
    return kind(**{key: _convert(hints[key], value, where + key) for key, value in values.items()})


def nearest(name: str, known: Iterable[str]) -> str:
    """The known name that `name` was probably meant to be; `known` is not empty."""
    return difflib.get_close_matches(name, list(known), n=1, cutoff=0.0)[0]


def _convert(hint: Any, value: Any, key: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return build(typing.cast(type[Any], hint), value, key + ".")
    if typing.get_origin(hint) in (dict, Mapping):
        if not isinstance(value, Mapping):
            raise SoftguardError(f"{key} is {value!r}; it must be a section")
        if strange := [name for name in value if not isinstance(name, str)]:
            raise SoftguardError(f"{key} has the key {strange[0]!r}, which YAML does not read as text; set it in quotes")
        return {name: _convert(typing.get_args(hint)[1], inner, f"{key}.{name}") for name, inner in value.items()}
    if typing.get_origin(hint) is Literal:
        if value in typing.get_args(hint):
            return value
        raise SoftguardError(f"{key} is {value!r}; it must be one of {', '.join(map(str, typing.get_args(hint)))}")
    if typing.get_origin(hint) is tuple:
        items = value if isinstance(value, list | tuple) else [value]
        return tuple(_convert(typing.get_args(hint)[0], item, key) for item in items)
    kinds = typing.get_args(hint) or (hint,)
    if float in kinds and isinstance(value, str):  # YAML 1.1 reads 5e-3 as text
        with contextlib.suppress(ValueError):
            value = float(value)
    if float in kinds and isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63:
        value = float(value)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        names = " or ".join("none" if k is type(None) else k.__name__ for k in kinds)
        raise SoftguardError(f"{key} is {value!r}; it must be {names}")
    if isinstance(value, int) and value >= 2**63:
        raise SoftguardError(f"{key} is {value}; it must be below 2**63")
    if isinstance(value, str) and not is_whole(value):
        raise SoftguardError(f"{key} holds half a character (a lone surrogate); mend the text")
    return value

"""Time to first token and decoding speed with 100 soft vectors, and past a gate, beside other ways to the same end.

    python -m benchmarks.latency [--rounds 7] [--firsts 60] [--threads 2]

Batch 1, greedy, 32 tokens; then `firsts` more rounds of the first token alone, since its differences are small beside what it
varies by. The text instruction is read anew at every request, as without a prefix cache it must be. The dual-model systems:
the bundled guard (22.7 M weights) asked of the prompt before the base begins; the same guard asked of the finished answer,
before which nothing may be shown; and a guard of the base's own size that reads prompt and policy (256 tokens) first, as
generative guards do.
"""

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.record import arguments, keep, machine
from softguard.adapters import VECTORS, Adapter
from softguard.chat import Chat, Turn
from softguard.config import DEFAULT_INSTRUCTION, SystemConfig
from softguard.engine import Engine
from softguard.initial import initial_vectors
from softguard.models import BaseModel, load_base
from softguard.system import SafeSystem

PROMPT = "Explain in a few sentences why the sky is blue during the day and red in the evening."
N_SOFT, GATE, TOKENS, GUARD_TOKENS = 100, 8, 32, 256

Timed = tuple[float, float, int]  # seconds to the first token, seconds in all, tokens
Side = Callable[[int], Timed]  # of so many tokens at most


def main() -> None:
    parser = arguments(__doc__, rounds=7)
    parser.add_argument("--firsts", type=int, default=60)
    options = parser.parse_args()
    before = machine(options.threads)
    base = load_base(dtype="auto")
    sides = _sides(base)
    times: dict[str, list[Timed]] = {name: [] for name in sides}
    for round_ in range(options.rounds + 1):
        for name, side in sides.items():
            timed = side(TOKENS)
            if round_:  # the first warms up
                times[name].append(timed)
    firsts = {name: [timed[0] for timed in timed_rounds] for name, timed_rounds in times.items()}
    rates = {name: [(t[2] - 1) / (t[1] - t[0]) for t in timed_rounds if t[1] > t[0]] for name, timed_rounds in times.items()}
    for _ in range(options.firsts):
        for name, side in sides.items():
            if rates[name]:  # what it makes is shown as it comes
                firsts[name].append(side(1)[0])
    rows: list[dict[str, Any]] = [
        {
            "side": name,
            "first_token_ms_median": round(1000 * statistics.median(first), 1),
            "first_token_ms_min": round(1000 * min(first), 1),
            "first_token_ms_max": round(1000 * max(first), 1),
            "first_tokens": len(first),
            "tokens_per_second_median": round(statistics.median(rates[name]), 2) if rates[name] else "",
            "rounds": options.rounds,
        }
        for name, first in firsts.items()
    ]
    own = next(r for r in rows if r["side"] == f"softguard, {N_SOFT} vectors")
    for row in rows:
        row["first_token_over_softguard"] = round(row["first_token_ms_median"] / own["first_token_ms_median"], 2)
    keep("latency", rows, before, vectors=N_SOFT, tokens=TOKENS, guard_tokens=GUARD_TOKENS)


def _sides(base: BaseModel) -> dict[str, Side]:
    chat = Chat(base.tokenizer, "start", base.stop_ids)
    vectors = initial_vectors(base, "soft_prompt", DEFAULT_INSTRUCTION, N_SOFT)
    alone, soft = Engine(base), Engine(base, Adapter("soft_prompt", {VECTORS: vectors}, "start", {}))
    beside = {VECTORS: initial_vectors(base, "gate", DEFAULT_INSTRUCTION, GATE)}  # untrained: it refuses nothing
    facts = {"refusal": SystemConfig.refusal}
    one, two = (Engine(base, Adapter("gate", beside, "start", {**facts, "members": members})) for members in (1, 2))
    before, after = (SafeSystem.from_config(SystemConfig(mode=mode)) for mode in ("prompt", "response"))
    ids = torch.tensor([[*chat.prefix.before, *chat.prefix.after, *chat.encode(PROMPT)]], device=base.device)
    policy = " ".join([DEFAULT_INSTRUCTION] * 20)

    def answer(engine: Engine, text: str, tokens: int) -> tuple[Timed, str]:
        begin = time.perf_counter()
        pieces = engine.stream([Turn("user", text)], tokens)
        said = [next(pieces)]
        first = time.perf_counter() - begin
        said += pieces
        return (first, time.perf_counter() - begin, len(said)), "".join(said)

    def stream(engine: Engine, text: str, tokens: int) -> Timed:
        return answer(engine, text, tokens)[0]

    def after_prompt_guard(tokens: int) -> Timed:
        begin = time.perf_counter()
        before.p_safe([PROMPT], [""])
        asked = time.perf_counter() - begin
        first, whole, made = stream(alone, PROMPT, tokens)
        return asked + first, asked + whole, made

    def after_response_guard(tokens: int) -> Timed:
        (_, whole, made), said = answer(alone, PROMPT, tokens)
        begin = time.perf_counter()
        after.p_safe([PROMPT], [said])
        whole += time.perf_counter() - begin
        return whole, whole, made  # nothing is shown before the guard has spoken

    @torch.inference_mode()
    def after_large_guard(tokens: int) -> Timed:
        begin = time.perf_counter()
        base.model(input_ids=policy_ids, logits_to_keep=1)
        asked = time.perf_counter() - begin
        first, whole, made = stream(alone, PROMPT, tokens)
        return asked + first, asked + whole, made

    policy_ids = torch.tensor([chat.plain_ids(policy)[:GUARD_TOKENS]], device=base.device)
    assert policy_ids.shape[1] == GUARD_TOKENS
    instruction = chat.decode(chat.plain_ids(policy)[:N_SOFT])
    return {
        "base alone": partial(stream, alone, PROMPT),
        f"softguard, {N_SOFT} vectors": partial(stream, soft, PROMPT),
        f"softguard, gate of {GATE} vectors": partial(stream, one, PROMPT),
        f"softguard, gate of {GATE} vectors, two members": partial(stream, two, PROMPT),
        "peft generate": _peft(vectors, ids, base),
        f"text instruction of {N_SOFT} tokens": partial(stream, alone, instruction + PROMPT),
        "system, bundled prompt guard": after_prompt_guard,
        "system, bundled response guard": after_response_guard,
        "system, prompt guard of the base's size": after_large_guard,
    }


def _peft(vectors: torch.Tensor, ids: torch.Tensor, base: BaseModel) -> Side:
    from peft import PromptTuningConfig, get_peft_model
    from transformers.generation.streamers import BaseStreamer

    own = load_base(dtype="auto")  # PEFT wraps the model it is given
    model = get_peft_model(own.model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=N_SOFT))
    model.prompt_encoder["default"].embedding.weight.data.copy_(vectors)

    class Clock(BaseStreamer):  # type: ignore[misc]
        def __init__(self) -> None:
            self.times: list[float] = []

        def put(self, value: Any) -> None:
            self.times.append(time.perf_counter())

        def end(self) -> None:
            pass

    @torch.inference_mode()
    def generate(tokens: int) -> Timed:
        clock, begin = Clock(), time.perf_counter()
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            do_sample=False,
            streamer=clock,
            pad_token_id=base.pad_id,
        )
        made = clock.times[1:]  # the first is the prompt
        return made[0] - begin, made[-1] - begin, len(made)

    return generate


if __name__ == "__main__":
    main()

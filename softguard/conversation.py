"""The interactive chat: reads lines, streams answers, keeps the conversation."""

import sys
from collections.abc import Mapping

from softguard.chat import Turn
from softguard.engine import Engine
from softguard.errors import SoftguardError
from softguard.text import is_whole


def check_conversation(engines: Mapping[str, Engine], max_new_tokens: int) -> None:
    """Raises SoftguardError if a model's context has no room for so many tokens behind an empty message."""
    for engine in engines.values():
        room = engine.base.context - engine.prefix.length - len(engine.chat.encode(""))
        if max_new_tokens > room:
            raise SoftguardError(
                f"--max-new-tokens is {max_new_tokens}; {engine.base.name!r} has room for {room} at most, lower it"
            )


def converse(engines: Mapping[str, Engine], max_new_tokens: int) -> None:
    """Talk until an empty line or the end of input. Every engine answers and remembers its own side of the conversation.

    A line that a model has no room left for is told, and asked of none.
    """
    histories: dict[str, list[Turn]] = {name: [] for name in engines}
    while True:
        print("you> ", end="", flush=True)
        try:
            line = sys.stdin.readline().strip() if sys.stdin is not None else ""  # none where it was closed
        except UnicodeDecodeError:
            line = "\udcff"
        if not is_whole(line):
            raise SoftguardError("the input is not UTF-8 text; convert it")
        if not line:
            return
        turns = {name: [*history, Turn("user", line)] for name, history in histories.items()}
        try:
            for name, engine in engines.items():
                engine.check_conversation(turns[name], max_new_tokens)
        except SoftguardError as error:
            print(f"({error}, or begin anew: an empty line ends the conversation)")
            continue
        histories = turns
        for name, engine in engines.items():
            history = histories[name]
            print(f"{name}> ", end="", flush=True)
            pieces = []
            for piece in engine.stream(history, max_new_tokens):
                print(piece, end="", flush=True)
                pieces.append(piece)
            print()
            history.append(Turn("assistant", "".join(pieces)))

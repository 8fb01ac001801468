"""softguard: distil a language model and its guard into a few vectors beside the same frozen model."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from softguard.adapters import Adapter
    from softguard.chat import Chat, Turn
    from softguard.config import Recipe, load_recipe
    from softguard.corpus import Corpus, teach
    from softguard.distill import distil
    from softguard.engine import Engine
    from softguard.errors import SoftguardError
    from softguard.evaluation import Results, evaluate
    from softguard.guards import Guard, load_guard
    from softguard.models import BaseModel, load_base
    from softguard.system import SafeSystem

__version__ = "0.1.0"
_HOMES = {
    "Adapter": "adapters", "BaseModel": "models", "Chat": "chat", "Corpus": "corpus", "Engine": "engine", "Guard": "guards",
    "Recipe": "config", "Results": "evaluation", "SafeSystem": "system", "SoftguardError": "errors", "Turn": "chat",
    "distil": "distill", "evaluate": "evaluation", "load_base": "models", "load_guard": "guards", "load_recipe": "config",
    "teach": "corpus",
}  # fmt: skip
__all__ = [
    "Adapter", "BaseModel", "Chat", "Corpus", "Engine", "Guard", "Recipe", "Results", "SafeSystem", "SoftguardError",
    "Turn", "__version__", "distil", "evaluate", "load_base", "load_guard", "load_recipe", "teach",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `import softguard` does not import torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'softguard' has no attribute {name!r}")
    value = getattr(import_module(f"softguard.{_HOMES[name]}"), name)
    globals()[name] = value
    return value

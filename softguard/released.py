"""Adapters that come with the package, one folder a base model; `recipes/build_adapter.py` makes them."""

from importlib import resources
from pathlib import Path

from softguard.adapters import Adapter
from softguard.files import read_json
from softguard.models import BaseModel

FOLDER = Path(str(resources.files("softguard") / "data" / "adapters"))


def released_adapter(base: BaseModel) -> Adapter | None:
    """The packaged adapter for `base`, or none; model and quantisation must be those it was trained for."""
    for seal in sorted(FOLDER.glob("*/softguard.json")):
        if read_json(seal, "softguard adapter").get("base") == base.fingerprint:
            return Adapter.load(seal.parent, base)
    return None

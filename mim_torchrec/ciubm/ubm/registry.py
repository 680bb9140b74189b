"""Which user behavior models there are: those in this folder by name, any other by where its class is."""

import pkgutil
from functools import cache
from importlib import import_module

from mim_torchrec.ciubm import ubm
from mim_torchrec.ciubm.ubm.interface import UBMOptions
from mim_torchrec.errors import OptionError
from mim_torchrec.extensions import load_class


@cache
def built_in_models() -> dict[str, type[UBMOptions]]:
    """Models of this folder by name: every `UBMOptions` of its modules."""
    modules = [import_module(f"{ubm.__name__}.{found.name}") for found in pkgutil.iter_modules(ubm.__path__)]
    return {
        value.name: value
        for module in modules
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, UBMOptions) and value.__module__ == module.__name__
        if value is not UBMOptions
    }


def find_model(name: str) -> type[UBMOptions]:
    """The options of a model, which also build it.

    Args:
        name: of a model of this folder, or `package.module:ClassName` of a `UBMOptions` elsewhere.

    Raises:
        ValueError: there is no such model.
    """
    models = built_in_models()
    if name in models:
        return models[name]
    if ":" not in name:
        raise OptionError(
            f"there is no user behavior model {name!r}; take one of {', '.join(models)}, or "
            "package.module:ClassName of your own"
        )
    found = load_class(name)
    if not issubclass(found, UBMOptions):
        raise OptionError(f"{name!r} is no UBMOptions, see mim_torchrec.ciubm.ubm.interface")
    return found

"""Classes from outside the package by name, as on a command line and in config.json."""

from importlib import import_module

from mim_torchrec.errors import OptionError


def load_class(name: str) -> type:
    """The class that a name stands for.

    Args:
        name: `package.module:ClassName` of anything that this process can import.

    Raises:
        OptionError: the module cannot be imported, or has no such class.

    >>> load_class("collections:OrderedDict")
    <class 'collections.OrderedDict'>
    """
    module, _, attribute = name.partition(":")
    try:
        found = getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise OptionError(
            f"{name!r} cannot be loaded ({error}); it is package.module:ClassName of an installed package or "
            "of a folder on PYTHONPATH"
        ) from error
    if not isinstance(found, type):
        raise OptionError(f"{name!r} is no class but {found!r}")
    return found

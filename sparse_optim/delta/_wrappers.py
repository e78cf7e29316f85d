"""Names of parameters without what wrappers of a model put into them."""

from collections.abc import Iterable

_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
_REPLICATED = "module."  # DataParallel and DDP; a model may have a child of that name


def plain_names(names: Iterable[str]) -> dict[str, str]:
    """Each name, and the name without what wrappers put into it.

    "module." is taken off where every name begins with it. If two names would become one, all
    stay as they are.
    """
    given = list(names)
    plain = [".".join(part for part in name.split(".") if part not in _WRAPPERS) for name in given]
    while plain and all(name.startswith(_REPLICATED) for name in plain):
        plain = [name.removeprefix(_REPLICATED) for name in plain]
    if len(set(plain)) < len(set(given)) or not all(plain):
        plain = given
    return dict(zip(given, plain, strict=True))

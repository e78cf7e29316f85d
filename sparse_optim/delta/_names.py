"""Names of parameters, for every route: a delta, a live model and a model folder may name them
differently.

    wrappers    torch.compile, DataParallel, DDP, FSDP and checkpoint_wrapper put a part into names
    backbones   a checkpoint of a bare encoder has "x" where the model with a head has "bert.x"
    tied        one tensor with two names, both of which a file may hold

The base's fingerprints then prove that the match is right.
"""

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from sparse_optim.delta._types import Delta
from sparse_optim.delta._values import DeltaError
from sparse_optim.delta._wrappers import plain_names


@dataclass(frozen=True)
class Naming:
    """How the names of a delta and of its base fit together.

    Attributes:
        delta: name in the delta -> name in the result, for those that the base has or that the
            delta adds.
        base: name in the base -> name in the result.
        prefix: what separates the names of delta and base ("bert."), or "".
    """

    delta: Mapping[str, str]
    base: Mapping[str, str]
    prefix: str


def match_names(
    delta: Delta, base: Collection[str], live: bool = False, partly: bool = False
) -> Naming:
    """Find the base's name of each tensor of a delta.

    Names are compared as they are, then without wrappers, then with one prefix added to or removed
    from all that are still missing. The result has the base's names, except when the delta adds
    tensors (a head) to a bare encoder: then it has the model's names ("bert.x"), so that the class
    with the head can load it.

    Args:
        base: names of the base's tensors.
        live: the base is a model in use, whose names cannot change.
        partly: leave out sparse parameters that the base lacks; not all of them.

    Raises:
        DeltaError: names do not fit, or fit in several ways.
    """
    ours = (*delta.sparse, *delta.dense)
    if all(name in base for name in ours):
        return Naming({name: name for name in ours}, {name: name for name in base}, "")
    plain = plain_names(ours)
    actual = {short: name for name, short in plain_names(base).items()}
    try:
        found = _match(delta, plain, set(actual), live, partly)
    except DeltaError:  # the base may have a tied tensor under its other name alone
        for alias, name in delta.tied.items():
            if plain[name] not in actual and alias in actual:
                plain[name] = alias
        found = _match(delta, plain, set(actual), live, partly)
    named = {name: found.delta[short] for name, short in plain.items() if short in found.delta}
    if all(short == new for short, new in found.base.items()):  # the base keeps its own names
        wrapper = _common_prefix(actual)
        named = {name: actual.get(new, wrapper + new) for name, new in named.items()}
        result = {name: name for name in base}
    else:
        result = {actual[short]: new for short, new in found.base.items()}
    if len(set(named.values())) != len(named):
        raise DeltaError("two names of the delta fit one name of the base")
    return Naming(named, result, found.prefix)


def _common_prefix(actual: Mapping[str, str]) -> str:
    """What stands before every name of the base ("module."), or ""."""
    found = {name.removesuffix(short) for short, name in actual.items() if name.endswith(short)}
    return found.pop() if len(found) == 1 else ""


def renamed(delta: Delta, naming: Naming) -> Delta:
    """The delta with the names of the result, without what the base lacks.

    Tied names follow where the result has them.
    """
    names, there = naming.delta, set(naming.base.values())
    tied = {}
    for alias, name in delta.tied.items():
        candidates = {alias, naming.prefix + alias, alias.removeprefix(naming.prefix)}
        plain = {short: full for full, short in plain_names(there).items()}
        fitting = [plain[each] for each in candidates if each in plain]
        fitting = [each for each in fitting if each != names.get(name)]
        if name in names and len(fitting) > 1:
            both = " and ".join(sorted(fitting))
            raise DeltaError(
                f"{alias!r} was tied to {name!r}, and the base has {both}: rename one of them"
            )
        if name in names and fitting:
            tied[fitting[0]] = names[name]
    return replace(
        delta,
        sparse={names[name]: values for name, values in delta.sparse.items() if name in names},
        dense={names[name]: tensor for name, tensor in delta.dense.items() if name in names},
        fingerprints={
            names[name]: text for name, text in delta.fingerprints.items() if name in names
        },
        dense_original={
            names[name]: tensor for name, tensor in delta.dense_original.items() if name in names
        },
        tied=tied,
    )


def untied(delta: Delta, names: Collection[str]) -> Delta:
    """The delta with the values of tied tensors under each name among `names`.

    A base whose file holds both copies of a tied weight needs both changed.
    """
    sparse, prints, dense = dict(delta.sparse), dict(delta.fingerprints), dict(delta.dense)
    for alias, name in delta.tied.items():
        if alias not in names or alias in sparse or alias in dense:
            continue
        if name in sparse:
            sparse[alias], prints[alias] = sparse[name], prints[name]
        else:
            dense[alias] = dense[name]
    return replace(delta, sparse=sparse, fingerprints=prints, dense=dense, tied={})


def _match(
    delta: Delta, plain: Mapping[str, str], base: set[str], live: bool, partly: bool
) -> Naming:
    """`match_names` of the names in `plain`, which have no wrappers."""
    sparse = [plain[name] for name in delta.sparse]
    dense = [plain[name] for name in delta.dense]
    known = {name: name for name in (*sparse, *dense) if name in base}
    new = [name for name in dense if name not in base]
    missing = [name for name in sparse if name not in base]
    same = {name: name for name in base}
    if not sparse and not known:  # dense tensors alone: those of the base, and perhaps a head
        missing, partly = new, True
    if not missing:
        return Naming(known | {name: name for name in new}, same, "")
    if partly and not known.keys().isdisjoint(sparse):
        return Naming(known, same, "")
    added, stripped = _prefixes(missing, base)
    fits = [(count, prefix, True) for prefix, count in added.items()]
    fits += [(count, prefix, False) for prefix, count in stripped.items()]
    if not partly:
        fits = [fit for fit in fits if fit[0] == len(missing)]
    most = max(fits, default=(0, "", True))[0]
    best = [fit for fit in fits if fit[0] == most]
    if not sparse and (len(best) != 1 or 2 * most < len(new)):  # no fingerprint would tell
        return Naming({name: name for name in new}, same, "")
    if len(best) != 1:
        how = "in several ways" if best else "even with a prefix added or taken off"
        raise DeltaError(
            f"{len(missing)} of the delta's {len(sparse)} sparse parameters are not in the "
            f"base, the first is {missing[0]!r}; the names do not fit {how}: load the class of "
            "model that was fine-tuned"
        )
    _, prefix, is_added = best[0]
    if is_added:
        names = {name: prefix + name for name in missing if prefix + name in base}
        return Naming(known | names | {name: prefix + name for name in new}, same, prefix)
    names = {
        name: name.removeprefix(prefix)
        for name in (*missing, *new)
        if name.startswith(prefix) and name.removeprefix(prefix) in base
    }
    left = [name for name in new if name not in names]
    if left and not known and not live:
        # The delta adds a head to a bare encoder: everything takes the model's names.
        whole = {name: name for name in (*sparse, *dense)}
        return Naming(whole, {name: prefix + name for name in base}, prefix)
    return Naming(known | names | {name: name for name in left}, same, prefix)


def _prefixes(missing: list[str], base: set[str]) -> tuple[Counter[str], Counter[str]]:
    """How many of `missing` are in the base with each prefix added, and with each taken off."""
    before: dict[str, list[str]] = {}  # end of a name -> what may stand before it
    for name in base:
        for prefix, end in _splits(name):
            before.setdefault(end, []).append(prefix)
    added = Counter(prefix for name in missing for prefix in before.get(name, ()))
    stripped = Counter(prefix for name in missing for prefix, end in _splits(name) if end in base)
    return added, stripped


def _splits(name: str) -> list[tuple[str, str]]:
    """("a.", "b.c") and ("a.b.", "c") of "a.b.c"."""
    ends = [at + 1 for at, letter in enumerate(name) if letter == "."]
    return [(name[:end], name[end:]) for end in ends]

"""Which methods go together. Free of torch: the configuration is checked with it.

Each rule has its reason, which is what the user is told.
"""

from collections.abc import Sequence

# What each does: docs/strategies.md.
METHODS = ("joint", "replay", "der", "agem", "lwf", "ewc", "ewc-lora", "si", "olora", "merge")
NAIVE = "naive"  # no method at all
AUTO = "auto"  # chosen on validation rows

# What `auto` tries, the likeliest first. None needs a state that only some cycles would keep.
SHORTLIST = (("replay", "lwf"), ("replay",), ("replay", "merge"))
UNBLENDABLE = frozenset({"joint", "olora"})  # their adapter is not the champion's, trained further
REMEMBER = frozenset({"joint", "replay", "agem"})  # those with a memory of rows

_NEEDS = {"der": "replay"}
_APART = (
    ("replay", "agem", "both own the memory of rows; choose one"),
    ("agem", "si", "si must see the gradient of the loss, and agem turns it"),
    ("agem", "olora", "what agem turned, olora turns again: old adapters do not learn"),
    ("ewc", "si", "both hold the same parameters; choose one"),
    ("ewc", "ewc-lora", "both hold the same parameters; choose one"),
    ("ewc-lora", "si", "both hold the same parameters; choose one"),
    ("olora", "ewc", "the adapter grows, and importances of the old shape do not fit it"),
    ("olora", "si", "the adapter grows, and importances of the old shape do not fit it"),
    ("olora", "merge", "the adapter grows, and cannot be averaged with a smaller one"),
)


def complaint(methods: Sequence[str]) -> str | None:
    """What is wrong with a combination, or None."""
    if tuple(methods) == (AUTO,):
        return None
    for name in (NAIVE, AUTO):
        if name in methods and len(methods) > 1:
            return f"{name} stands alone; write strategy = {name!r}, or leave it out"
    for name in methods:
        if name not in METHODS:
            return f"unknown method {name!r}; choose {NAIVE}, {AUTO}, or some of {', '.join(METHODS)}"
    if len(set(methods)) != len(methods):
        return "names a method twice"
    if "joint" in methods and len(methods) > 1:
        return "joint learns everything anew and needs no other method; let it stand alone"
    for name, needed in _NEEDS.items():
        if name in methods and needed not in methods:
            return f"{name} works on remembered rows; add {needed}"
    for one, other, why in _APART:
        if one in methods and other in methods:
            return f"{one} and {other} do not go together: {why}"
    return None

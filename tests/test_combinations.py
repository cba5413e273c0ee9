"""Which methods go together: each rule with its reason, and that what is allowed can be built."""

import subprocess
import sys
from itertools import combinations

import pytest

from strategies import catalogue
from strategies.combinations import METHODS, REMEMBER, complaint
from strategies.contract import StrategySpec
from strategies.replay import Rehearsal

ALL = [chosen for count in range(len(METHODS) + 1) for chosen in combinations(METHODS, count)]


@pytest.mark.parametrize(
    ("methods", "reason"),
    [
        (("reply",), "unknown method 'reply'; choose naive, auto, or some of joint, replay, "),
        (("replay", "ewc", "replay"), "names a method twice"),
        (("joint", "ewc"), "joint learns everything anew and needs no other method"),
        (("replay", "joint"), "joint learns everything anew and needs no other method"),
        (("der",), "der works on remembered rows; add replay"),
        (("der", "agem"), "der works on remembered rows; add replay"),
        (("agem", "replay"), "replay and agem do not go together: both own the memory of rows"),
        (("agem", "si"), "agem and si do not go together: si must see the gradient of the loss"),
        (("olora", "agem"), "agem and olora do not go together: what agem turned, olora turns again"),
        (("si", "ewc"), "ewc and si do not go together: both hold the same parameters"),
        (("ewc", "ewc-lora"), "ewc and ewc-lora do not go together: both hold the same parameters"),
        (("si", "ewc-lora"), "ewc-lora and si do not go together: both hold the same parameters"),
        (("olora", "ewc"), "olora and ewc do not go together: the adapter grows, and importances"),
        (("olora", "si"), "olora and si do not go together: the adapter grows, and importances"),
        (("olora", "merge"), "olora and merge do not go together: the adapter grows, and cannot be averaged"),
    ],
)
def test_what_does_not_go_together_is_refused_with_its_reason(methods: tuple[str, ...], reason: str) -> None:
    found = complaint(methods)
    assert found is not None
    assert found.startswith(reason)
    if len(set(methods)) == len(methods):
        assert complaint(methods[::-1]) == found, "in whatever order they are named"


@pytest.mark.parametrize("method", METHODS)
def test_every_method_stands_alone_or_says_what_it_needs(method: str) -> None:
    found = complaint([method])
    if method == "der":
        assert found == "der works on remembered rows; add replay"
        assert complaint(["der", "replay"]) is None
    else:
        assert found is None


def test_whatever_is_allowed_can_be_built_in_the_order_of_the_callbacks() -> None:
    allowed = [methods for methods in ALL if complaint(methods) is None]
    assert () in allowed
    assert len(allowed) > 50
    order = list(catalogue.METHODS)
    for methods in allowed:
        built = catalogue.build(StrategySpec(methods=methods[::-1]), seed=0)
        expected = sorted(methods, key=order.index)
        assert [type(method) for method in built] == [catalogue.METHODS[name] for name in expected]
        files = [method.file for method in built if method.file]
        assert len(set(files)) == len(files), f"{methods} write the same file"


def test_what_changes_the_adapter_comes_before_what_remembers_it() -> None:
    order = list(catalogue.METHODS)
    assert order[0] == "merge"
    assert order.index("replay") < order.index("der"), "DER asks replay who is remembered"
    assert order.index("replay") < order.index("lwf"), "LwF asks about the rows that replay brings"


def test_the_names_are_those_of_the_catalogue() -> None:
    assert set(METHODS) == catalogue.METHODS.keys()
    assert {name for name, method in catalogue.METHODS.items() if issubclass(method, Rehearsal)} == REMEMBER


def test_the_configuration_can_ask_without_torch() -> None:
    code = "import sys, strategies.combinations; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0

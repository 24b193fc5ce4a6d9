"""Lines that control a switch: each does what it says, and a wrong one does nothing and says why."""

import json
import math

import pytest

from yoke.core.errors import UserError
from yoke.testing.control import Place, obey, reshaped, shape_words
from yoke.testing.ethernet import address_of
from yoke.testing.fabric import Fabric, Way
from yoke.testing.shape import WIFI, WIRED, Shape

NAMES = ["hall", "attic", "cellar"]


@pytest.fixture
def switch():
    return Fabric(dict.fromkeys(NAMES, Shape()))


def refuse_carrier(name, is_on):
    pytest.fail(f"the carrier of {name} was set to {is_on}")


def say(switch, line, set_carrier=refuse_carrier):
    return obey(switch, line, set_carrier)


def reached(switch, source, target):
    """Whether a frame gets from one machine to another."""
    switch.enter(0.0, NAMES.index(source), bytes(10) + address_of(NAMES.index(target)) + bytes(60))
    return [index for index, _ in switch.leave(1e9)] == [NAMES.index(target)]


def test_cut_and_mend(switch):
    assert say(switch, "cut hall cellar") == "ok"
    assert not reached(switch, "attic", "hall")
    assert say(switch, "mend hall") == "ok"
    assert reached(switch, "attic", "hall")
    assert not reached(switch, "attic", "cellar")


def test_unplug_and_plug_tell_the_machine(switch):
    told = []
    assert say(switch, "unplug attic", lambda *words: told.append(words)) == "ok"
    assert not reached(switch, "hall", "attic")
    assert say(switch, "plug attic", lambda *words: told.append(words)) == "ok"
    assert reached(switch, "hall", "attic")
    assert told == [("attic", False), ("attic", True)]


def test_part_close_and_heal(switch):
    assert say(switch, "part hall,attic cellar") == "ok"
    assert reached(switch, "hall", "attic")
    assert not reached(switch, "hall", "cellar")
    assert say(switch, "heal") == "ok"
    assert say(switch, "close hall cellar") == "ok"
    assert not reached(switch, "hall", "cellar")
    assert reached(switch, "cellar", "hall")


def test_shape_changes_the_fields_that_are_named(switch):
    assert say(switch, "shape attic up delay_s=0.5 keeps_order=no") == "ok"
    assert say(switch, "shape attic both loss=0.25") == "ok"
    assert switch.shape_of("attic", Way.UP) == Shape(delay_s=0.5, keeps_order=False, loss=0.25)
    assert switch.shape_of("attic", Way.DOWN) == Shape(loss=0.25)


def test_between_shapes_one_way(switch):
    assert say(switch, "between hall attic loss=0.999999") == "ok"
    assert not reached(switch, "hall", "attic")
    assert reached(switch, "attic", "hall")


def test_counts_are_json_of_every_machine(switch):
    assert reached(switch, "hall", "attic")
    word, _, text = say(switch, "counts").partition(" ")
    assert word == "ok"
    found = json.loads(text)
    assert set(found) == set(NAMES)
    assert (found["hall"]["sent"], found["attic"]["reached"]) == (1, 1)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("", "'' is no command"),
        ("burn hall", "'burn hall' is no command"),
        ("cut", "'cut' is no command"),
        ("cut roof", "no machine 'roof'"),
        ("unplug roof", "no machine 'roof'"),
        ("part hall", "is no command"),
        ("part hall hall", "two sets"),
        ("shape hall sideways loss=0.1", "is no command"),
        ("shape hall both loss=2", "expected a share"),
        ("shape hall both loss=much", "expected a number"),
        ("shape hall both keeps_order=1", "yes or no"),
        ("shape hall both weight=1", "sets no field"),
        ("shape hall both delay_s", "expected a number"),
        ("between hall roof loss=0.1", "no machine 'roof'"),
        ("heal hall", "is no command"),
    ],
)
def test_a_wrong_line_says_why_and_changes_nothing(switch, line, why):
    answer = say(switch, line)
    assert answer.startswith("error ")
    assert why in answer
    assert "\n" not in answer
    assert [switch.shape_of(name, way) for name in NAMES for way in Way] == [Shape()] * 6
    assert all(reached(switch, source, target) for source in NAMES for target in NAMES if source != target)


@pytest.mark.parametrize("shape", [Shape(), WIRED.cables[0], WIFI.cables[0], Shape(loss=1 / 3, keeps_order=False, bytes_per_s=math.inf)])
def test_a_shape_survives_being_written_as_words(shape):
    assert reshaped(Shape(delay_s=9.0), shape_words(shape)) == shape


def test_a_place_survives_being_written():
    place = Place(name="hall", namespace="yoke-1-hall", address="10.0.0.1/24")
    assert Place.parse(str(place)) == place


@pytest.mark.parametrize("text", ["", "hall", "hall=a", "hall=a=b=c", "=a=b", "ha ll=a=b", "ha,ll=a=b"])
def test_what_is_no_place_is_refused(text):
    with pytest.raises(UserError, match="expected"):
        Place.parse(text)

"""The class tables: exact colours, complete groupings, names whatever their spelling."""

import numpy as np
import pytest

from a2d2.classes import (
    CLASSES,
    COLOUR_NAMES,
    IGNORE,
    OBJECT_CLASSES,
    OBJECT_GROUPINGS,
    class_colour,
    colour_table,
    find_object_class,
    load_grouping,
    object_colour,
)


def pack(colour):
    red, green, blue = (int(value) for value in colour)
    return (red << 16) | (green << 8) | blue


def test_the_table_knows_55_colours_of_38_classes():
    table = colour_table()
    assert len(COLOUR_NAMES) == 55 and len(CLASSES) == len(set(CLASSES)) == 38
    assert (table != IGNORE).sum() == 55
    assert set(np.unique(table)) == {*range(38), IGNORE}
    for text, name in COLOUR_NAMES.items():
        assert name.startswith(CLASSES[table[int(text[1:], 16)]])


def test_a_colour_one_level_off_is_unknown():
    table = colour_table()
    for text in COLOUR_NAMES:
        colour = np.array([int(text[at : at + 2], 16) for at in (1, 3, 5)])
        for step in (*np.eye(3, dtype=int), *-np.eye(3, dtype=int)):
            near = colour + step
            if (near >= 0).all() and (near <= 255).all():
                assert table[pack(near)] == IGNORE


def test_colours_of_a_class_are_found_again():
    for index, name in enumerate(CLASSES):
        for number in range(1, 6):
            assert colour_table()[pack(class_colour(name, number))] == index
    assert len({class_colour("Car", number) for number in range(1, 5)}) == 4
    assert class_colour("Car", 5) == class_colour("Car", 1) == (255, 0, 0)
    with pytest.raises(ValueError, match="Carriage"):
        class_colour("Carriage")


@pytest.mark.parametrize(("name", "count", "ignored"), [("all", 38, set()), ("paper", 19, {"Rain dirt"})])
def test_groupings_place_every_class(name, count, ignored):
    grouping = load_grouping(name)
    assert len(grouping.names) == count
    assert {label for label, group in zip(CLASSES, grouping.table, strict=False) if group == IGNORE} == ignored
    assert set(grouping.table[:38]) - {IGNORE} == set(range(count))
    assert (grouping.table[38:] == IGNORE).all()
    # a group is drawn in a colour of its own, which belongs to one of its members
    for group in range(count):
        assert grouping.table[colour_table()[pack(grouping.palette[group])]] == group


def test_the_paper_merges_as_its_authors_did():
    grouping = load_grouping("paper")
    merged = {name: grouping.names[grouping.table[index]] for index, name in enumerate(CLASSES[:-1])}
    assert merged["Animals"] == "Pedestrians"
    assert merged["Tractor"] == merged["Utility vehicle"] == merged["Truck"] == "Trucks"
    assert merged["Non-drivable street"] == merged["Sidewalk"] == "Side walk"
    assert merged["Signal corpus"] == merged["Irrelevant signs"] == "Irrelevant"
    assert merged["Zebra crossing"] == merged["Drivable cobblestone"] == merged["Speed bumper"] == "Road"
    assert merged["Sidebars"] == merged["Poles"] == "Poles"
    assert merged["Road blocks"] == merged["Grid structure"] == "Grid structure"
    assert merged["Blurred area"] == "Background"
    assert merged["Bicycle"] == merged["Small vehicles"] == "Small traffic participants"
    assert merged["Electronic traffic"] == merged["Traffic guide obj."] == "Traffic info"
    assert merged["Dashed line"] == merged["Solid line"] == "Lane lines"


def test_an_unknown_grouping_names_the_known():
    with pytest.raises(ValueError, match=r"cityscapes.*paper"):
        load_grouping("cityscapes")


@pytest.mark.parametrize("text", ["UtilityVehicle", "Utility Vehicle", "utility_vehicle", "UTILITYVEHICLE"])
def test_object_classes_are_found_however_they_are_spelt(text):
    assert OBJECT_CLASSES[find_object_class(text)] == "UtilityVehicle"


def test_object_classes_are_whole():
    assert len(OBJECT_CLASSES) == 14
    assert [find_object_class(name) for name in OBJECT_CLASSES] == list(range(14))
    assert find_object_class("Spaceship") is None and find_object_class("") is None
    for groups in OBJECT_GROUPINGS.values():
        assert sorted(name for members in groups.values() for name in members) == sorted(OBJECT_CLASSES)
    for index in range(14):
        assert all(0 <= value <= 255 for value in object_colour(index))

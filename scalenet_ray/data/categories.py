"""Categories of a run: the choice among a data set's, and the mapping of a detector's classes to them by name."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from scalenet_ray.core.errors import UserError, abbreviated, repeated

_MOST_NAMES = 20


@dataclass(frozen=True)
class CategoryChoice:
    """Which of the annotations' categories are used, and under which names.

    Attributes:
        category_map: NAME=CLASS, e.g. pedestrian=person: the annotations' category NAME is the detector's CLASS.
            Several categories may be of one class.
        classes: only these, by the detector's names.
        ignore_unknown: leave out the categories that the detector does not know, instead of refusing them.
    """

    category_map: tuple[str, ...] | None = None
    classes: tuple[str, ...] | None = None
    ignore_unknown: bool = False

    @property
    def is_made(self) -> bool:
        """False if all categories are used as they are."""
        return self != CategoryChoice()


@dataclass(frozen=True)
class ChosenCategories:
    """The categories of a run.

    Attributes:
        ids: id in the annotations -> id in the run, of the categories that are used.
        categories: id in the run -> name.
        renamed: name in the annotations -> name in the run, of those that differ.
        left_out: names in the annotations of the categories that are not used.
    """

    ids: dict[int, int]
    categories: dict[int, str]
    renamed: dict[str, str]
    left_out: tuple[str, ...]

    def in_words(self) -> str:
        """The choice in one line."""
        parts = [f"used {abbreviated(self.categories.values(), _MOST_NAMES)}"]
        if self.renamed:
            parts.append(
                "renamed " + abbreviated([f"{name} -> {other}" for name, other in self.renamed.items()], _MOST_NAMES)
            )
        if self.left_out:
            parts.append(f"left out {abbreviated(self.left_out, _MOST_NAMES)}")
        return f"categories: {'; '.join(parts)}"


def choose_categories(
    dataset: Mapping[int, str], detector: Mapping[int, str], choice: CategoryChoice
) -> ChosenCategories:
    """Apply a choice to a data set's categories and a detector's classes, each id -> name.

    Categories of one name become one, with the id of the first. Names are compared as `normalised_name`.

    Raises:
        UserError: if a name is not the data set's, or no category is left.
    """
    others = _parsed_map(choice.category_map or (), dataset.values())
    names = {category_id: others.get(normalised_name(name), name) for category_id, name in dataset.items()}
    wanted = {normalised_name(name) for name in names.values()}
    if choice.classes is not None:
        wanted = _among(choice.classes, names.values(), "--classes")
    if choice.ignore_unknown:
        wanted &= {normalised_name(name) for name in detector.values()}
    first: dict[str, int] = {}
    ids = {
        category_id: first.setdefault(normalised_name(name), category_id)
        for category_id, name in names.items()
        if normalised_name(name) in wanted
    }
    if not ids:
        msg = (
            f"a category of the annotations must be left, got none that the detector knows among "
            f"{abbreviated(names.values(), _MOST_NAMES)}: name what they are with --category-map NAME=CLASS"
        )
        raise UserError(msg)
    return ChosenCategories(
        ids,
        {category_id: names[category_id] for category_id in first.values()},
        {dataset[category_id]: names[category_id] for category_id in ids if dataset[category_id] != names[category_id]},
        tuple(name for category_id, name in dataset.items() if category_id not in ids),
    )


def classes_named(categories: Mapping[int, str], classes: Collection[str] | None) -> dict[int, str]:
    """The categories of some names, or all for None; raises `UserError` if there is none of a name, or no name."""
    if classes is None:
        return dict(categories)
    if not classes:
        msg = "--classes must name at least one class, got none: leave it out for all"
        raise UserError(msg)
    wanted = _among(classes, categories.values(), "--classes")
    return {category_id: name for category_id, name in categories.items() if normalised_name(name) in wanted}


def with_chosen(document: Mapping[str, Any], chosen: ChosenCategories) -> dict[str, Any]:
    """The content of a valid COCO instances file, with the chosen categories and their objects alone."""
    return {
        **document,
        "categories": [{"id": key, "name": name} for key, name in chosen.categories.items()],
        "annotations": [
            {**row, "category_id": chosen.ids[row["category_id"]]}
            for row in document["annotations"]
            if row["category_id"] in chosen.ids
        ],
    }


def _parsed_map(pairs: Collection[str], known: Collection[str]) -> dict[str, str]:
    """Normalised name in the annotations -> the detector's name."""
    others: dict[str, str] = {}
    for pair in pairs:
        name, equals, other = pair.partition("=")
        if not (name.strip() and equals and other.strip()):
            msg = f"--category-map must be NAME=CLASS, the annotations' name and the detector's, got {pair!r}"
            raise UserError(msg)
        if others.setdefault(normalised_name(name), other.strip()) != other.strip():
            msg = f"--category-map must name a category once, got {name.strip()!r} twice"
            raise UserError(msg)
    _among(others, known, "--category-map")
    return others


def _among(names: Collection[str], known: Collection[str], flag: str) -> set[str]:
    """Normalised names, each of which is known."""
    wanted = {normalised_name(name): name for name in names}
    missing = wanted.keys() - {normalised_name(name) for name in known}
    if missing:
        strange = [name for key, name in wanted.items() if key in missing]
        msg = f"{flag} must name some of {abbreviated(known, _MOST_NAMES)}, got {abbreviated(strange, _MOST_NAMES)}"
        raise UserError(msg)
    return set(wanted)


def normalised_name(name: str) -> str:
    """The name by which categories are compared: without regard to case, with underscores as spaces."""
    return " ".join(name.replace("_", " ").casefold().split())


def map_categories(
    detector: Mapping[int, str], dataset: Mapping[int, str], unused: Collection[int] = ()
) -> dict[int, int]:
    """Map the detector's class ids to the data set's category ids by `normalised_name`.

    Args:
        detector: class id -> name.
        dataset: category id -> name.
        unused: ids of the data set's categories without annotations. The detector may lack them, and used categories
            take precedence over unused ones of the same name.

    Returns:
        Class id -> category id; classes that the data set does not have are missing.

    Raises:
        UserError: if the detector lacks a used category, or two used categories have the same name.
    """
    used = {category_id: name for category_id, name in dataset.items() if category_id not in unused}
    if twice := repeated(map(normalised_name, used.values())):
        msg = f"categories must differ by name, got twice {abbreviated(twice)}: rename them in the annotations"
        raise UserError(msg)
    known = {normalised_name(name) for name in detector.values()}
    # Used categories come last, so that they overwrite unused ones of the same name.
    ids = {normalised_name(name): category_id for category_id, name in [*dataset.items(), *used.items()]}
    missing = [name for name in used.values() if normalised_name(name) not in known]
    if missing:
        got = f"no {abbreviated(missing)}" if known & ids.keys() else "none"
        msg = (
            f"the detector must know every category of the data set, got {got} among its "
            f"{abbreviated(detector.values())}: use a detector trained on them, or leave these categories out of the "
            "annotations"
        )
        raise UserError(msg)
    return {class_id: ids[normalised_name(name)] for class_id, name in detector.items() if normalised_name(name) in ids}


def unknown_categories(detector: Mapping[int, str], dataset: Mapping[int, str], unused: Collection[int]) -> list[str]:
    """Return the names of the unused categories that the detector lacks."""
    known = {normalised_name(name) for name in detector.values()}
    return [
        name for category_id, name in dataset.items() if category_id in unused and normalised_name(name) not in known
    ]

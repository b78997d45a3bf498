"""Keys and features with new names: one table for reading older weights files and for errors about older configs."""

from typing import Any

RENAMED_KEYS = {"tasks.*.head.depth": "layers", "tasks.*.codec": "box_coder"}
"""Old dotted key (* is any name) -> the last name of the new key."""

RENAMED_FEATURES = {"trunk": "backbone"}
"""Old origin of a feature -> new origin: "trunk.8" is "backbone.8" now."""


def find_new_key(key: str) -> str | None:
    """The new dotted key for an old one; None for a key that was not renamed."""
    parts = key.split(".")
    for before, name in RENAMED_KEYS.items():
        pattern = before.split(".")
        if len(parts) == len(pattern) and all(one in ("*", part) for one, part in zip(pattern, parts, strict=True)):
            return ".".join([*parts[:-1], name])
    return None


def rename_all(content: Any, key: str = "") -> Any:
    """The header of an older weights file (dicts, lists, plain values) with the new names."""
    if isinstance(content, dict):
        renamed = {}
        for name, value in content.items():
            full = f"{key}.{name}" if key else name
            new = find_new_key(full)
            renamed[name if new is None else new.rsplit(".", 1)[1]] = rename_all(value, full)
        return renamed
    if isinstance(content, list):
        return [rename_all(value, key) for value in content]
    if isinstance(content, str) and key.endswith(".reads"):
        origin, _, stride = content.partition(".")
        return f"{RENAMED_FEATURES.get(origin, origin)}.{stride}"
    return content

"""Changes a JSON as strangers' exporters, hand edits and damaged disks do."""

import json
from random import Random
from typing import Any

ODD = [
    None, True, False, -1, 0, 1, 2, 255, 2**24 - 1, 2**24, 2**31 - 1, 2**31, 2**40, 2**63, 2**64, 10**400,
    0.0, 1.0, 2.5, -0.0, 1e300, float("nan"), float("inf"), float("-inf"),
    "", "0", "1", " 1", "1.0", "false", "null", "0.png", "0.PNG", "nowhere.png", "..", ".", "/", "a\\0.png", "a\0b",
    "\ud800", "é", "e\u0301", "x" * 5000, [], [1], {}, {"id": 1}, [None],
]  # fmt: skip
PLAUSIBLE = [0, 1, 5, 8, 12, 24, 24.0, 900, 70_001, 16_777_215, True, False, "0.png", "1.png", "0.PNG", "2.png", "cup"]
KEYS = ["id", "image_id", "category_id", "iscrowd", "area", "bbox", "file_name", "height", "width", "isthing", "name"]


def mutated(content: dict[str, Any], random: Random) -> bytes:
    """A JSON file with one to three changes, of values, keys, entries, text or encoding."""
    content = json.loads(json.dumps(content))
    for _ in range(random.choice([1, 1, 1, 2, 3])):
        _change(content, random)
    text = json.dumps(content, ensure_ascii=random.random() < 0.8)
    kind = random.randrange(12)
    if kind == 0:
        text = _repeat_key(text, random)
    if kind == 1:
        text = text[: random.randrange(len(text))]
    encoding = random.choice(["utf-8"] * 12 + ["utf-8-sig", "utf-16", "utf-16-le", "utf-32", "latin-1"])
    raw = text.encode(encoding, "surrogatepass" if "utf" in encoding else "replace")
    if kind == 2:
        place = random.randrange(len(raw))
        raw = raw[:place] + bytes([random.randrange(256)]) + raw[place + random.randrange(2) :]
    return raw


def _change(content: dict[str, Any], random: Random) -> None:
    holders = list(_holders(content))
    holder = random.choice(holders)
    if not holder:
        return
    place = random.choice(sorted(holder)) if isinstance(holder, dict) else random.randrange(len(holder))
    kind = random.randrange(8)
    if kind <= 2:
        holder[place] = random.choice(ODD)
    elif kind == 3:
        holder[place] = random.choice(PLAUSIBLE)
    elif kind == 4:
        holder[place] = str(holder[place])
    elif kind == 5:
        del holder[place]
    elif isinstance(holder, list):
        holder.insert(random.randrange(len(holder) + 1), holder[place])
    elif kind == 6:
        holder[random.choice(KEYS)] = random.choice(ODD)
    elif type(holder[place]) is int:
        holder[place] = float(holder[place])


def _holders(value: Any) -> Any:
    if isinstance(value, dict | list):
        yield value
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _holders(inner)


def _repeat_key(text: str, random: Random) -> str:
    key = random.choice([*KEYS, "images", "annotations", "categories", "segments_info", "other"])
    places = [place for place in range(len(text)) if text.startswith("{", place)]
    place = random.choice(places) + 1 if places else 0
    value = random.choice(["0", "1", "null", '"0.png"', "[]"])
    return text[:place] + f'"{key}": {value}, ' * random.choice([1, 2]) + text[place:]

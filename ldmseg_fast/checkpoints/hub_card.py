"""Writes the model card that a model has on the Hub: YAML front matter over the text of its README.md.

Source: https://huggingface.co/docs/hub/model-cards and https://github.com/huggingface/hub-docs/blob/main/modelcard.md.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ldmseg_fast.checkpoints.hub_names import PREFIX
from ldmseg_fast.checkpoints.model_card import training_facts
from ldmseg_fast.errors import HubError
from ldmseg_fast.files import read_file, read_json

TAGS = ["ldmseg_fast", "panoptic-segmentation", "latent-diffusion", "arxiv:2401.10227"]
TASK = {"type": "image-segmentation", "name": "Panoptic segmentation"}
# a picture that model cards on the Hub use, of COCO's validation split
COCO_WIDGET = [{"src": "http://images.cocodataset.org/val2017/000000039769.jpg", "example_title": "Cats"}]
# what the cards of training and of `ldmseg ship` call them -> type and name of the metric
METRICS = {
    "class-agnostic PQ on the validation split": ("pq", "PQ (class-agnostic)"),
    "SQ": ("sq", "SQ (class-agnostic)"),
    "RQ": ("rq", "RQ (class-agnostic)"),
    "class-aware PQ": ("class_pq", "PQ (class-aware)"),
    "class-aware PQ, things": ("class_pq_things", "PQ of things"),
    "class-aware PQ, stuff": ("class_pq_stuff", "PQ of stuff"),
}
LICENSES = (
    (r"Apache License\s+Version 2\.0|Apache 2\.0|Apache-2\.0", "apache-2.0"),
    (r"Attribution-NonCommercial 4\.0|CC BY-NC 4\.0", "cc-by-nc-4.0"),
    (r"Attribution 4\.0 International|CC BY 4\.0", "cc-by-4.0"),
    (r"CreativeML Open RAIL-?M", "creativeml-openrail-m"),
    (r"\bMIT License", "mit"),
)
_FRONT = re.compile(r"\A\s*---[ \t]*\r?\n(.*?)\r?\n?^---[ \t]*(?:\r?\n|\Z)", re.DOTALL | re.MULTILINE)
_LOCATIONS = (
    r"conditioning\.path|data\.root|data\.latent_cache|image_encoder\.path|model\.init_from|model\.mask_vae|output_dir"
)


@dataclass(frozen=True)
class CardFacts:
    """Says what a model folder may not know of itself.

    Attributes:
        license: an identifier of https://huggingface.co/docs/hub/repositories-licenses; None: what the folder says.
        base_model: the repository that training started from; None: `model.init_from` where it is one.
        datasets: their names; empty: the run's data set.
        widget: addresses of example pictures; empty: one of COCO for models trained on COCO, none for others.
    """

    license: str | None = None
    base_model: str | None = None
    datasets: Sequence[str] = ()
    widget: Sequence[str] = ()


def card_of(folder: Path, repository: str, facts: CardFacts, existing: str | None = None) -> str:
    """Composes a model's card.

    Paths of this machine in the folder's own text are cut to their last part.

    Args:
        folder: the model folder. Numbers come from its training log, or from its README.md.
        repository: "owner/name".
        facts: what the folder does not know.
        existing: the card that the repository has. Its text stays, and so do entries of its front matter; entries that
            it lacks and measured values are added.

    Raises:
        HubError: front matter that is no YAML mapping.
    """
    path = folder / "README.md"
    content = read_file(path, HubError, "model card").decode("utf-8", "replace") if path.is_file() else ""
    own, own_text = split_card(content, str(path))
    theirs, their_text = split_card(existing or "", f"README.md of {repository}")
    text = their_text if existing is not None else _without_paths(own_text).replace("MODEL_DIR", f'"{repository}"')
    given = {key: value for key, value in _given(facts).items() if value}
    found = front_matter(folder, repository, own_text)
    merged = found | own | theirs | given
    merged["model-index"] = _merged_index(theirs.get("model-index") or own.get("model-index"), found["model-index"])
    ordered = {key: merged[key] for key in (*found, *merged) if merged.get(key)}
    front = yaml.safe_dump(ordered, sort_keys=False, allow_unicode=True, width=1000)
    return f"---\n{front}---\n\n{text.lstrip()}"


def front_matter(folder: Path, repository: str, text: str) -> dict[str, Any]:
    """Gathers what a folder tells of itself; values that it does not know are None or empty.

    Args:
        folder: the model folder.
        repository: "owner/name", which names the model in the model-index.
        text: of its README.md.
    """
    path = folder / "config.json"
    run = read_json(path) if path.is_file() else {}
    root = _setting(run, "data", "root") or (_numbered(text, "data") or [""])[-1]
    sets = [name for entry in root.split(",") if (name := _last_part(entry.strip()).partition(":")[0])]
    data = ", ".join(sets)  # of several sets the numbers are the means
    start = _setting(run, "model", "init_from")
    split = _setting(run, "data", "val_split") or "validation"
    return {
        "license": _license(folder, text),
        "library_name": "ldmseg_fast",
        "pipeline_tag": "image-segmentation",
        "tags": TAGS,
        "base_model": start.removeprefix(PREFIX).partition("@")[0] if start.startswith(PREFIX) else None,
        "datasets": sets,
        "metrics": ["pq"] if _values(folder, text) else [],
        "widget": COCO_WIDGET if "coco" in data.lower() else [],
        "model-index": _index(repository, data, split, folder, text),
    }


def _setting(run: Any, group: str, key: str) -> str:
    """A setting of a run's config.json; "" where it has none."""
    values = run.get(group) if isinstance(run, dict) else None
    value = values.get(key) if isinstance(values, dict) else None
    return value if isinstance(value, str) else ""


def split_card(content: str, source: str) -> tuple[dict[str, Any], str]:
    """Splits a card into its front matter and its text.

    Raises:
        HubError: front matter that is no YAML mapping; `source` names the file.
    """
    match = _FRONT.match(content.removeprefix("\ufeff"))
    if match is None:
        return {}, content
    try:
        values = yaml.safe_load(match[1])
    except (yaml.YAMLError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise HubError(
            f"{source}: its front matter is no YAML ({reason}); mend what stands between the --- lines"
        ) from None
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise HubError(f"{source}: its front matter is no mapping; write `key: value` lines between the --- lines")
    return values, content.removeprefix("\ufeff")[match.end() :]


def _given(facts: CardFacts) -> dict[str, Any]:
    return {
        "license": facts.license,
        "base_model": facts.base_model,
        "datasets": list(facts.datasets),
        "widget": [{"src": address} for address in facts.widget],
    }


def _index(repository: str, data: str, split: str, folder: Path, text: str) -> list[dict[str, Any]]:
    """The model-index: what was measured on the validation split; empty where nothing was."""
    metrics = [
        {"type": METRICS[key][0], "name": METRICS[key][1], "value": value}
        for key, value in _values(folder, text).items()
    ]
    if not metrics:
        return []
    name = data or "not recorded"
    result = {"task": TASK, "dataset": {"type": name, "name": name, "split": split}, "metrics": metrics}
    return [{"name": repository.partition("/")[2], "results": [result]}]


def _values(folder: Path, text: str) -> dict[str, float]:
    """What was measured, by METRICS' names: the last validation in the log, or the last numbers in the card's text."""
    logged = training_facts(folder)
    found = {key: str(logged[key]) for key in METRICS if key in logged}
    if not found:
        found = {key: numbers[-1] for key in METRICS if (numbers := _numbered(text, key))}
    matches = {key: re.match(r"\d+(?:\.\d+)?", value) for key, value in found.items()}
    return {key: float(match[0]) for key, match in matches.items() if match}


def _numbered(text: str, key: str) -> list[str]:
    """The values of a key in a card, as a row of its table or as a line `key=value`."""
    rows = re.findall(rf"^(?:\| {re.escape(key)} \| (.+?) \||{re.escape(key)}=(.+))$", text, re.MULTILINE)
    return [row or line for row, line in rows]


def _license(folder: Path, text: str) -> str | None:
    """The licence that a file of the folder or a sentence of its card names."""
    texts = [
        (folder / name).read_text(encoding="utf-8", errors="replace")[:4000]
        for name in ("LICENSE", "LICENSE.md", "LICENSE.txt")
        if (folder / name).is_file()
    ]
    texts += re.findall(r"^Licen[cs]e of the weights:.*(?:\n.+)*", text, re.MULTILINE)
    return next((name for words in texts for pattern, name in LICENSES if re.search(pattern, words)), None)


def _merged_index(theirs: Any, found: list[dict[str, Any]]) -> Any:
    """A model-index with `found` in it: values of the same metric on the same data are renewed, all others stay."""
    if not found or not isinstance(theirs, list) or not all(isinstance(model, dict) for model in theirs) or not theirs:
        return theirs if theirs and not found else found
    new = found[0]["results"][0]
    results = _mappings(theirs[0].get("results"))
    same = next((result for result in results if _measured_on(result) == _measured_on(new)), None)
    if same is None:
        results = [*results, new]
    else:
        renewed = {metric["type"] for metric in new["metrics"]}
        kept = [metric for metric in _mappings(same.get("metrics")) if metric.get("type") not in renewed]
        results = [result | {"metrics": [*new["metrics"], *kept]} if result is same else result for result in results]
    return [theirs[0] | {"results": results}, *theirs[1:]]


def _measured_on(result: dict[str, Any]) -> tuple[Any, ...]:
    task, data = ((_mappings([result.get(key)]) or [{}])[0] for key in ("task", "dataset"))
    return task.get("type"), data.get("type"), data.get("split")


def _mappings(values: Any) -> list[dict[str, Any]]:
    """Those of somebody's values that are mappings; none where there is no list."""
    return [value for value in values if isinstance(value, dict)] if isinstance(values, list) else []


def _without_paths(text: str) -> str:
    text = re.sub(rf"^((?:{_LOCATIONS})=)(?!{PREFIX}).*[/\\]([^/\\\n]+)[/\\]?$", r"\1\2", text, flags=re.MULTILINE)
    return re.sub(r"^(\| data \| ).*[/\\]([^/\\\n]+?)[/\\]? \|$", r"\1\2 |", text, flags=re.MULTILINE)


def _last_part(path: str) -> str:
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]


def default_message(folder: Path) -> str:
    """Composes the message of a commit."""
    facts = training_facts(folder)
    return f"Upload model at step {facts['steps']}" if "steps" in facts else "Upload model"

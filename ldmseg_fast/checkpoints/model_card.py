"""Writes `README.md` of a model folder: what the model is, where it comes from, and how good it was."""

from __future__ import annotations

from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

from ldmseg_fast import __version__
from ldmseg_fast.checkpoints.run_records import read_log
from ldmseg_fast.config import describe
from ldmseg_fast.files import read_json, replacing

USE = """```python
from ldmseg_fast import LDMSegPipeline

result = LDMSegPipeline.from_pretrained(MODEL_DIR)(image)[0]
result.segmentation, result.segments_info
```"""


CLASS_PQ = {"": "", ", things": "_things", ", stuff": "_stuff"}  # and what the log's names of them end in


def write_model_card(folder: Path, facts: dict[str, Any]) -> None:
    """Writes `folder`/README.md.

    Args:
        folder: the model folder; what its run's log says about steps and PQ is added.
        facts: a value, a mapping or a configuration dataclass each; values become lines of a table, the others a
            section with one `key=value` a line.
    """
    table = {"ldmseg_fast": __version__} | {key: value for key, value in facts.items() if not _is_group(value)}
    table |= training_facts(folder) | _categories(folder)
    lines = ["# Latent diffusion for panoptic segmentation", ""]
    if (folder / "unet").is_dir():
        lines += [USE, ""]
    else:
        lines += ["A mask auto-encoder; the diffusion stage takes it as `model.mask_vae`.", ""]
    lines += ["| | |", "|---|---|"]
    lines += [f"| {key.replace('_', ' ')} | {_cell(value)} |" for key, value in table.items()]
    for key, value in facts.items():
        if _is_group(value):
            entries = describe(value) if is_dataclass(value) else [f"{name}={item}" for name, item in value.items()]
            lines += ["", f"## {key}", "", "```", *entries, "```"]
    with replacing(folder / "README.md") as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


def training_facts(folder: Path) -> dict[str, Any]:
    """Reads last step and last validation from the log in `folder`; nothing where there is none."""
    records = read_log(folder)
    facts: dict[str, Any] = {"steps": records[-1]["step"]} if records else {}
    validated = [record for record in records if "val/pq" in record]
    if validated:
        last = validated[-1]
        facts["class-agnostic PQ on the validation split"] = f"{last['val/pq']:.2f} at step {last['step']}"
        rows = {"SQ": "sq", "RQ": "rq"}
        rows |= {f"class-aware PQ{of}": f"class_pq{key}" for of, key in CLASS_PQ.items()}
        facts |= {name: f"{last[f'val/{key}']:.2f}" for name, key in rows.items() if f"val/{key}" in last}
    return facts


def _categories(folder: Path) -> dict[str, str]:
    """Lists the names in `categories.json`, which has been written before; nothing of models without categories."""
    path = folder / "categories.json"
    found = read_json(path) if path.is_file() else []
    names = {
        kind: [c["name"] for c in found if bool(c["isthing"]) == (kind == "things")] for kind in ("things", "stuff")
    }
    return {f"{kind} ({len(of_kind)})": ", ".join(of_kind) for kind, of_kind in names.items() if of_kind}


def _is_group(value: Any) -> bool:
    return is_dataclass(value) or isinstance(value, dict)


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")

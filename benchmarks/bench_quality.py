"""Panoptic quality of trained models, beside the trivial baselines, as one result file.

python benchmarks/bench_quality.py NAME=MODEL_DIR [...] --data ROOT [--split S] [--steps 1 4 10] [--ids SCHEME]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from harness import Run

from ldmseg_fast.checkpoint import load_index
from ldmseg_fast.evaluation import EvaluationOptions, evaluate


def training_facts(model_dir: Path) -> dict[str, Any]:
    """Steps and CPU minutes (of rank 0) of the run that made a model; empty where it left no log."""
    log = model_dir / "logs" / "log.jsonl"
    if not log.is_file():
        return {}
    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if "cpu_seconds" in row]
    # the counter starts again with each resume
    minutes, previous = 0.0, 0.0
    for row in rows:
        minutes += row["cpu_seconds"] - (previous if row["cpu_seconds"] >= previous else 0.0)
        previous = row["cpu_seconds"]
    return {"training_steps": rows[-1]["step"], "cpu_minutes": round(minutes / 60, 1)}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="NAME=MODEL_DIR; the name stands in the table")
    parser.add_argument("--data", required=True)
    parser.add_argument("--split", default="val2017")
    parser.add_argument("--steps", type=int, nargs="+", default=[], help="denoising steps; default the model's own")
    parser.add_argument("--ids", help="id assignment of an auto-encoder's reconstruction")
    parser.add_argument("--size", type=int, help="side in pixels of an auto-encoder's reconstruction")
    parser.add_argument("--count-th", type=int, help="least area of a segment in pixels")
    parser.add_argument("--limit", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="16 images, nothing is saved")
    args = parser.parse_args(argv)

    run = Run("quality", quick=args.quick)
    limit = 16 if args.quick else args.limit
    for entry in args.models:
        name, _, folder = entry.rpartition("=")
        model_dir = Path(folder)
        facts = training_facts(model_dir)
        reconstruction = load_index(model_dir).get("components") == ["mask_vae"]
        for steps in [None] if reconstruction or not args.steps else args.steps:
            options = EvaluationOptions(
                split=args.split,
                steps=steps,
                limit=limit,
                id_assignment=args.ids,
                image_size=args.size,
                count_threshold=args.count_th,
            )
            report = evaluate(model_dir, args.data, options)
            case = {"data": report["data"], "split": args.split, "images": report["images"], "mode": report["mode"]}
            if reconstruction:
                case |= {"ids": report["id_assignment"], "size": report["image_size"]}
            else:
                case |= {"steps": report["num_inference_steps"]}
            rows = {name or model_dir.name: report["class_agnostic"]} | report["baselines"]
            for variant, values in rows.items():
                own = values is report["class_agnostic"]
                more = facts | {"ms_per_image": 1000 * report["seconds_per_image"]} if own else {}
                detail = {key: values[key] for key in ("sq", "rq", "pq_crowd_correct", "tp", "fp", "fn")}
                run.add_value("PQ", values["pq"], "%", case=case, variant=variant, **detail, **more)
    if not args.quick:
        run.save()
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Scores trained models over steps, solvers and noise seeds, beside baselines, as one result file.

python benchmarks/bench_quality.py NAME=MODEL_DIR [...] --data ROOT [...] [--split S] [--steps 1 4 10]
    [--solvers ddim heun] [--seeds 3] [--classical TRAIN_SPLIT [--names TRAIN_SPLIT]] [--picture FILE] [--journal FILE]
    [--size S] [--flip] [--scales X ...] [--fusion F] [--edges R] [--connected PX] [--mask-th X]
    [--count-th N] [--overlap-th X] [--agreement N] [--snapshots | --arms]

A ROOT may name splits of its own, ROOT:TRAIN:TEST; each set has rows of its own. Rows are measured one after the other;
with --journal a stopped campaign goes on with the first that is missing. With several annotators per image the values
are means over them. Models of one NAME are trainings of one recipe, and share a row: their mean and deviation.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    import checkout  # noqa: F401  (run as a script)

from benchmarks.harness import RESULTS, BenchmarkError, Run
from benchmarks.measuring.options import parse_options, refuse_unused
from benchmarks.measuring.sample_agreement import agreement_rows
from benchmarks.measuring.training_runs import mean_over_trainings
from benchmarks.peers.annotators import mean_over_annotators
from benchmarks.peers.untrained import QUALITIES, Tuned, classical_rows, named_rows, trivial_rows
from benchmarks.reporting.quality_curve import draw_curve
from ldmseg_fast.checkpoints.hub_names import shown_name
from ldmseg_fast.checkpoints.model_folder import load_component_config, load_index
from ldmseg_fast.checkpoints.shipped import resolve_model_dir
from ldmseg_fast.commands.options import add_connected_argument, add_view_arguments, views_of
from ldmseg_fast.config import DataConfig
from ldmseg_fast.data.joined_sets import SetPlace, set_places
from ldmseg_fast.distributed.ending import run_command
from ldmseg_fast.evaluation import EvaluationOptions, evaluate
from ldmseg_fast.evaluation.scores import PLAIN
from ldmseg_fast.files import read_lines
from ldmseg_fast.inference.ensemble import Views
from ldmseg_fast.metrics import classical
from ldmseg_fast.metrics.baselines import BASELINES
from ldmseg_fast.training.provenance import ancestors, cpu_minutes

Row = dict[str, Any]
# what --agreement leaves out
OF_QUALITY = ("seeds", "size", "flip", "scales", "fusion", "edges", "connected", "mask_th", "count_th", "overlap_th")
OF_QUALITY += ("unfused", "picture", "snapshots", "arms")
DETAILS = (*QUALITIES, "pq_crowd_correct", "tp", "fp", "fn")


class Journal:
    """Keeps finished rows, one JSON line each, by what they were measured on; without a path it keeps nothing."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.rows: dict[str, list[Row]] = {line["key"]: line["rows"] for line in read_lines(path)} if path else {}

    def rows_of(self, key: dict[str, Any], measure: Any) -> list[Row]:
        """Returns the rows of `key`; `measure()` makes them where they are not there yet."""
        text = json.dumps(key, sort_keys=True)
        if text not in self.rows:
            self.rows[text] = measure()
            if self.path is not None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                cut_off = self.path.is_file() and not self.path.read_bytes().endswith(b"\n")
                with self.path.open("a", encoding="utf-8") as file:
                    file.write("\n" * cut_off)  # after the half line of a campaign that was killed
                    file.write(json.dumps({"key": text, "rows": self.rows[text]}) + "\n")
        return self.rows[text]


def training_facts(model_dir: Path) -> dict[str, Any]:
    """Returns steps and CPU minutes (of rank 0) of the run that made a model, and of all that it was built on.

    Empty where the run left no log.
    """
    records = read_lines(model_dir / "logs" / "log.jsonl")
    if not records:
        return {}
    total = sum(cpu_minutes(folder / "logs") for folder in ancestors(model_dir))
    facts = {"training_steps": records[-1]["step"], "cpu_minutes": round(cpu_minutes(model_dir / "logs"), 1)}
    return facts | {"cpu_minutes_in_all": round(total, 1)}


def fingerprint(model_dir: Path) -> str:
    """Returns a digest of every file that a model folder's components consist of."""
    digest = hashlib.sha256()
    for component in load_index(model_dir)["components"]:
        for path in sorted((model_dir / component).rglob("*")):
            if path.is_file():
                digest.update(path.read_bytes())
    digest.update((model_dir / "model_index.json").read_bytes())
    return digest.hexdigest()


def model_rows(name: str, model_dir: Path, data: str, options: EvaluationOptions) -> list[Row]:
    """Returns the model's row, of one with categories also its class-aware one, and one for each trivial baseline."""
    report = evaluate(model_dir, data, options)
    mode = report["mode"] if report["mode"] == "reconstruction" else "class-agnostic"  # the aware row says its own
    case = {"data": report["data"], "split": options.split, "images": report["images"], "mode": mode}
    facts = training_facts(model_dir)
    if report["mode"] == "reconstruction":
        own_case = case | {"ids": report["id_assignment"], "size": report["image_size"]}
    else:
        own_case = case | {"steps": report["num_inference_steps"], "solver": report["solver"]}
        facts["prediction_type"] = load_component_config(model_dir, "scheduler")[0].prediction_type
        if options.image_size:
            own_case["size"] = report["image_size"]
    if options.unfused:
        own_case["unfused"] = True
    if options.connected:
        own_case["connected"] = options.connected
    if options.mask_threshold is not None:
        own_case["mask_threshold"] = options.mask_threshold
    if options.overlap_threshold is not None:
        own_case["overlap_threshold"] = options.overlap_threshold
    if options.is_ensemble:
        own_case["views"] = described(options.views)
    if options.seeds > 1:
        facts["deviation"] = report["seeds"]["deviation"]["class_agnostic"]["pq"]
        facts["seeds"] = options.seeds
    facts |= {"ms_per_image": 1000 * report["seconds_per_image"], "weights": fingerprint(model_dir)[:16]}
    rows = [(name, own_case, report["class_agnostic"], facts)]
    rows += [(baseline, case, values, {}) for baseline, values in report["baselines"].items()]
    found = [
        {"variant": variant, "case": where, "value": values["pq"], **{key: values[key] for key in DETAILS}, **more}
        for variant, where, values, more in rows
    ]
    if "miou" in (aware := report.get("class_aware", {})):
        values = {key: aware["All"][key] for key in QUALITIES} | {
            "miou": aware["miou"],
            "category_accuracy": aware["category_accuracy"],
            "weights": facts["weights"],
        }
        case = own_case | {"mode": "class-aware"}
        found.insert(1, {"variant": name, "case": case, "value": aware["All"]["pq"], **values})
    return found


def described(views: Views) -> str:
    """Writes what an ensemble sees, and how it is joined."""
    scales = f"scales {' '.join(f'{scale:g}' for scale in views.scales)}"
    return " ".join(["flip"] * views.flip + [scales, str(views.fusion)] + [f"edges {views.edges}"] * (views.edges > 0))


def snapshot(row: Row) -> Row:
    """Turns a model's row into one point of its run's learning curve."""
    if "training_steps" not in row:
        raise BenchmarkError(f"{row['variant']}: no logs/log.jsonl beside the model says how long it was trained")
    return row | {"case": row["case"] | {"training_steps": row["training_steps"]}}


def arm(row: Row) -> Row:
    """Marks a model's row as an arm of a comparison."""
    return row | {"case": row["case"] | {"arm": True}}


def inpainting_rows(name: str, model_dir: Path, data: str, options: EvaluationOptions) -> list[Row]:
    """Returns mean PQ over the shares of dropped blocks, of the model and of what needs none, with PQ per share."""
    report = evaluate(model_dir, data, options)
    case = {"data": report["data"], "split": options.split, "images": report["images"], "mode": "inpainting"}
    facts = {"ms_per_image": 1000 * report["seconds_per_image"], "steps": report["num_inference_steps"]}
    facts["weights"] = fingerprint(model_dir)[:16]
    own_case = case | ({"views": f"edges {options.edges}"} if options.edges else {})
    own_case |= {"unfused": True} if options.unfused else {}
    scores = {name: report["inpainting"]} | report["inpainting"]["baselines"]
    return [
        {
            "variant": variant,
            "case": (own_case if variant in (name, PLAIN) else case) | {"block": int(block)},
            "value": mean,
            "unknown_pq": values["mean_unknown_pq"][block],
            "by_probability": {
                f"{row['probability']:g}": row["pq"] for row in values["sparsities"] if row["block"] == int(block)
            },
            **(facts if variant == name else {}),
        }
        for variant, values in scores.items()
        for block, mean in values["mean_pq"].items()
    ]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="NAME=MODEL_DIR; the name stands in the table")
    parser.add_argument(
        "--data", required=True, nargs="+", help="sets: ROOT, or ROOT:TRAIN:TEST with splits of its own"
    )
    parser.add_argument("--split", default="val2017")
    parser.add_argument("--steps", type=int, nargs="+", default=[], help="denoising steps; default the model's own")
    parser.add_argument("--solvers", nargs="+", default=["ddim"], help="ddim, dpmpp_2m, heun; one step knows ddim only")
    parser.add_argument("--seeds", type=int, default=1, help="noise seeds; rows are means, with the deviation beside")
    parser.add_argument(
        "--classical", metavar="SPLIT", help="also Felzenszwalb, SLIC and merged SLIC, tuned on this training split"
    )
    parser.add_argument("--tuning-images", type=int, default=100, help="pictures of that split")
    parser.add_argument(
        "--names", metavar="SPLIT", help="with --classical: also class-aware, by the nearest segments of this split"
    )
    parser.add_argument("--ids", help="id assignment of an auto-encoder's reconstruction")
    parser.add_argument("--size", type=int, help="side in pixels of what the networks see; default the model's own")
    parser.add_argument("--mask-th", type=float, help="least softmax probability of a pixel")
    parser.add_argument("--count-th", type=int, help="least area of a segment in pixels")
    parser.add_argument("--overlap-th", type=float, help="least share of a slot's area that its segment keeps")
    parser.add_argument("--limit", type=int, default=0, help="first N images, of each annotator")
    add_view_arguments(parser)
    add_connected_argument(parser)
    apart = parser.add_mutually_exclusive_group()
    apart.add_argument(
        "--snapshots", action="store_true", help="the models are one run at several times: rows of a learning curve"
    )
    apart.add_argument("--arms", action="store_true", help="the models are trainings to compare: a table of their own")
    parser.add_argument(
        "--class-agnostic", action="store_true", help="score models without categories, on sets that lack them"
    )
    parser.add_argument("--unfused", action="store_true", help="and leave them out of the maps: stuff stays apart")
    other = parser.add_mutually_exclusive_group()
    other.add_argument("--inpainting", action="store_true", help="completing maps with dropped blocks, in their place")
    other.add_argument(
        "--agreement", type=int, metavar="N", help="wrong pixels by how many of N samples agree, in its place"
    )
    parser.add_argument("--picture", type=Path, help="PNG or SVG: quality against time, with the Pareto front")
    parser.add_argument("--journal", type=Path, help="file of finished rows, by which a stopped campaign goes on")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result files")
    parser.add_argument("--quick", action="store_true", help="16 images, 8 for tuning; nothing is saved")
    return parser


def measure(args: argparse.Namespace, run: Run) -> None:
    """Adds every row of the campaign to `run`."""
    journal = Journal(None if args.quick else args.journal)
    seen: set[str] = set()

    def add(rows: list[Row]) -> None:
        for row in rows:
            where = json.dumps([row["variant"], row["case"]], sort_keys=True)
            if where not in seen:  # each model brings the trivial baselines along
                seen.add(where)
                run.add_value(**{"name": "PQ", "unit": "%"} | row)

    for root in args.data:
        data = DataConfig(root=root, train_split=args.classical or "train2017", val_split=args.split)
        for place in filter(lambda place: place.val_split, set_places(data)):
            measure_set(args, journal, place, add)


def measure_set(args: argparse.Namespace, journal: Journal, place: SetPlace, add: Callable[[list[Row]], None]) -> None:
    """Measures every row on one set, and hands them to `add`."""
    limit = 16 if args.quick else args.limit
    data, split = str(Path(place.root).resolve()), place.val_split
    found: list[Row] = []
    for entry in args.models:
        name, _, folder = entry.rpartition("=")
        model_dir = resolve_model_dir(folder)
        name = name or shown_name(model_dir)
        reconstruction = load_index(model_dir)["components"] == ["mask_vae"]
        for steps in [None] if reconstruction or not args.steps else args.steps:
            # with one step all solvers are the same
            for solver in ["ddim"] if reconstruction or steps == 1 else args.solvers:
                options = EvaluationOptions(
                    split=split,
                    steps=steps,
                    solver=solver,
                    seeds=1 if reconstruction else args.seeds,
                    samples=args.agreement or 1,
                    limit=limit,
                    id_assignment=args.ids,
                    image_size=args.size,
                    mask_threshold=args.mask_th,
                    overlap_threshold=args.overlap_th,
                    connected=args.connected,
                    count_threshold=args.count_th,
                    inpainting=args.inpainting,
                    boundary=not args.inpainting,
                    class_agnostic=args.class_agnostic,
                    unfused=args.unfused,
                    **views_of(args),
                )
                weights = fingerprint(model_dir)
                key = {"name": name, "model": weights, "data": data, "options": asdict(options)}
                rows_of = partial(inpainting_rows if args.inpainting else model_rows, name, model_dir, options=options)
                if args.agreement:
                    rows_of = partial(agreement_rows, name, model_dir, options=options, weights=weights[:16])
                rows = journal.rows_of(key, partial(mean_over_annotators, data, split, rows_of))
                change = snapshot if args.snapshots else arm if args.arms else None
                found += [change(row) for row in rows if row["variant"] == name] if change else rows
    add(mean_over_trainings(found))
    if args.classical:
        classical.require_skimage()
        tuning = 8 if args.quick else args.tuning_images
        # a set with splits of its own has no other to learn names from
        names = place.train_split if args.names and place.train_split != args.classical else args.names
        for method in classical.METHODS:
            key = {"classical": method, "data": data, "split": split, "limit": limit}
            key |= {"tuned_on": place.train_split, "tuning": tuning, "grid": classical.GRIDS[method]}

            tuned = cache(partial(Tuned.on, data, place.train_split, tuning, method))

            def rows_of_method(tuned: Callable[[], Tuned] = tuned) -> list[Row]:
                rows_of = partial(classical_rows, tuned(), split=split, limit=limit)
                return mean_over_annotators(data, split, rows_of)

            add(journal.rows_of(key, rows_of_method))
            if names:

                def rows_of_names(tuned: Callable[[], Tuned] = tuned) -> list[Row]:
                    return named_rows(tuned(), data, names, split, limit)

                add(journal.rows_of(key | {"names": names}, rows_of_names))
        key = {"trivial": sorted(BASELINES), "data": data, "split": split, "limit": limit}
        rows_of = partial(trivial_rows, split=split, limit=limit)
        add(journal.rows_of(key, partial(mean_over_annotators, data, split, rows_of)))


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    args = parse_options(parser, argv)
    if not args.models and not args.classical:
        parser.error("give NAME=MODEL_DIR, or --classical SPLIT")
    if args.names and not args.classical:
        parser.error("--names names the segments of --classical SPLIT: give both")
    if args.agreement:
        refuse_unused(args, parser, "as --agreement samples the model as it is", *OF_QUALITY)
    run = Run("quality", quick=args.quick, folder=args.out)
    measure(args, run)
    if args.picture:
        draw_curve(run.results, args.picture)
    if not args.quick:
        run.save(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))

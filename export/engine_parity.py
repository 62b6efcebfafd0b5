"""Compares built engines with the model where they run, and writes what they measure into their passports."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from ldmseg_fast.backends.graphs.manifest import model_hash, read_manifest
from ldmseg_fast.backends.model_info import read_model_info
from ldmseg_fast.backends.trt.api import TrtApi
from ldmseg_fast.backends.trt.passport import Passport, check_passport, read_passport
from ldmseg_fast.checkpoints.hub_names import GRAPHS, MODEL
from ldmseg_fast.checkpoints.shipped import resolve_model_dir
from ldmseg_fast.errors import BackendError
from ldmseg_fast.export.output_folder import disk_full_named
from ldmseg_fast.export.parity import measure_parity


def engines_agree(args: argparse.Namespace, api: TrtApi) -> bool:
    """Compares the engines of `args.out` with MODEL_DIR, unless their passports say already that they were compared.

    With --data or --parity-images they are compared again, as these ask for.

    Of graphs the model is not known, engines for another machine do not run here, and with a LoRA in them they are no
    longer MODEL_DIR's: there is nothing to compare, and the passports keep the graphs' numbers.

    Returns:
        False where a tolerance is missed.

    Raises:
        BackendError: an engine that fails to run.
    """
    source, out = resolve_model_dir(args.source, kinds=(MODEL, GRAPHS)), Path(args.out)
    if args.lora is not None or not (source / "model_index.json").is_file():
        return True
    manifest = read_manifest(out)
    passports = [read_passport(out, name) for name in manifest.graphs]
    asked = args.data is not None or args.parity_images is not None
    compared = all(passport.compared == "engine" for passport in passports)
    if (compared and not asked) or not _run_here(passports, out, source, api):
        return True
    info = read_model_info(source)
    with disk_full_named(out):
        report = measure_parity(info, out, manifest, args.data, images=args.parity_images, engines=True)
    print(report.table())
    values = {row.what: row.value for row in report.rows}
    for passport in passports:  # what has missed a tolerance is compared again by the next run
        replace(passport, parity=values, compared="engine" if report.ok else "missed").write(out)
    return report.ok


def _run_here(passports: list[Passport], out: Path, source: Path, api: TrtApi) -> bool:
    manifest, digest = read_manifest(out), model_hash(source)
    try:
        for passport in passports:
            check_passport(passport, out, manifest, digest, api.flavour, api.version, api.machine, api.min_driver)
    except BackendError:
        return False
    return not any(passport.stripped for passport in passports) or (out / "onnx").is_dir()

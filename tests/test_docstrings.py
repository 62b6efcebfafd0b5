"""Public functions of tensors and arrays say shape, dtype, what is raised and the source.

`python tests/test_docstrings.py [FOLDER ...]` lists what a folder lacks.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent

import pytest

ROOT = Path(__file__).resolve().parents[1]
CODE = ("ldmseg_fast", "kernels", "export")
# functions of these follow a paper or another library, and they, their class or their module name it
SOURCED = (
    *("ldmseg_fast/models/", "ldmseg_fast/diffusion/", "ldmseg_fast/metrics/"),
    *(f"kernels/{path.name}/" for path in sorted((ROOT / "kernels").iterdir()) if (path / "__init__.py").is_file()),
    "ldmseg_fast/training/losses.py",
)

ARRAYS = {"Tensor", "ndarray", "NDArray"}
NO_PROMISE = {"NotImplementedError", "AssertionError"}  # raised by what is abstract, and by mistakes of ours
CALLED = ("__call__", "forward")
Function = ast.FunctionDef | ast.AsyncFunctionDef

_AXIS = r"(?:\.\.\.|\*?[A-Za-z0-9_'.()]+(?:\s?[-+*/^]\s?[A-Za-z0-9_'.()]+)*)"
SHAPE = re.compile(rf"(?<![\w\]])\[{_AXIS}(?:,\s+{_AXIS})*\]|\bscalars?\b|\bany shape\b", re.IGNORECASE)
RANGE = re.compile(r"\[-?[\d.]+, [\d.]+\]")  # of values; "uint8 [48, 3]" is a shape all the same
TYPED = re.compile(r"\d \[[\d, ]+\]")
DTYPE = re.compile(
    r"\b(u?int(8|16|32|64)?|b?float(16|32|64)?|float8\w*|bool(ean)?s?|floats|floating|half precision|integers?|complex"
    r"|bytes|[\w.]*dtypes?|\w+_DTYPE)\b",
    re.IGNORECASE,
)
RAISES = re.compile(r"\bRaises?\b")
REFERS = re.compile(r"\bSee `")  # on the first line: what is implemented says the rest
SOURCE = re.compile(
    r"arXiv|https?://|et al|\bdoi\b|\b(equation|eq\.|section|algorithm|paper)|CVPR|ICCV|ECCV|NeurIPS|ICLR"
    r"|\b(19|20)\d\d\b|diffusers|panopticapi|pycocotools|detectron2|transformers|torch|project's own",
    re.IGNORECASE,
)


def names_of(annotation: ast.expr | None) -> set[str]:
    """The names in an annotation, those in strings included."""
    names = set()
    for node in ast.walk(annotation) if annotation is not None else ():
        if isinstance(node, ast.Name):
            names.add(node.id)
        elif isinstance(node, ast.Attribute):
            names.add(node.attr)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            try:
                names |= names_of(ast.parse(node.value, mode="eval").body)
            except SyntaxError:
                continue  # a word of a Literal
    return names


def aliases_of(module: ast.Module) -> set[str]:
    """Names that a module gives to types that hold arrays, such as `Pair = tuple[Tensor, Tensor]`."""
    found = set(ARRAYS)
    for node in module.body:
        if not isinstance(node, ast.Assign) or not isinstance(node.targets[0], ast.Name):
            continue
        is_type = isinstance(node.value, ast.Name | ast.Attribute | ast.Subscript | ast.BinOp)
        if is_type and names_of(node.value) & found:
            found.add(node.targets[0].id)
    return found


def public_functions(body: list[ast.stmt], prefix: str = "") -> Iterator[tuple[str, Function, str]]:
    """Name, node and class docstring of the public functions and methods of a module or a class."""
    for node in body:
        if isinstance(node, Function) and (not node.name.startswith("_") or node.name in CALLED):
            yield prefix + node.name, node, ""
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            for name, function, outer in public_functions(node.body, f"{prefix}{node.name}."):
                yield name, function, outer + (ast.get_docstring(node) or "")
        elif isinstance(node, ast.If | ast.Try):
            yield from public_functions(node.body + node.orelse, prefix)


def takes_arrays(function: Function, arrays: set[str]) -> bool:
    arguments = function.args
    given = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
    annotations = [argument.annotation for argument in given if argument is not None] + [function.returns]
    return any(names_of(annotation) & arrays for annotation in annotations)


def raises(function: Function) -> bool:
    """Whether the function's own statements raise an error that a caller may meet, or call `require`."""
    waiting: list[ast.AST] = list(function.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, Function | ast.ClassDef | ast.Lambda):
            continue
        waiting.extend(ast.iter_child_nodes(node))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "require":
            return True
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            name = node.exc.func.attr if isinstance(node.exc.func, ast.Attribute) else getattr(node.exc.func, "id", "")
            if name[:1].isupper() and name not in NO_PROMISE:
                return True
    return False


def names_shape(text: str) -> bool:
    return any(not RANGE.fullmatch(found[0]) for found in SHAPE.finditer(text)) or bool(TYPED.search(text))


def lacks(source: str, sourced: bool = False) -> Iterator[tuple[int, str, str]]:
    """Line, name and what is missing, for each function of a module's source that lacks something."""
    module = ast.parse(source)
    arrays = aliases_of(module)
    for name, function, around in public_functions(module.body):
        if not takes_arrays(function, arrays):
            continue
        text = ast.get_docstring(function) or ""
        if REFERS.search(text.partition("\n")[0]):
            continue
        missing = [] if text else ["docstring"]
        missing += [] if names_shape(text) else ["shape"]
        missing += [] if DTYPE.search(text) else ["dtype"]
        missing += ["Raises"] if raises(function) and not RAISES.search(text) else []
        if sourced and not any(SOURCE.search(each) for each in (text, around, ast.get_docstring(module) or "")):
            missing.append("source")
        if missing:
            yield function.lineno, name, ", ".join(missing)


def files_below(folder: Path) -> list[Path]:
    files = [folder] if folder.is_file() else sorted(folder.rglob("*.py"))
    return [path for path in files if not path.name.startswith("_") or path.name == "__init__.py"]


def gaps(files: list[Path]) -> list[str]:
    """`file:line name: what lacks` for every gap in the files."""
    found = []
    for path in files:
        place = path.relative_to(ROOT).as_posix()
        for line, name, missing in lacks(path.read_text(encoding="utf-8"), place.startswith(SOURCED)):
            found.append(f"{place}:{line} {name}: {missing}")
    return found


def folders() -> list[str]:
    """The folders below the three that hold code, each on its own; their own files count as one."""
    paths = {path.parent.relative_to(ROOT).as_posix() for folder in CODE for path in (ROOT / folder).rglob("*.py")}
    return sorted(paths)


@pytest.mark.parametrize("folder", folders())
def test_public_functions_of_arrays_are_described(folder):
    found = gaps([path for path in files_below(ROOT / folder) if path.parent == ROOT / folder])
    listed = "\n".join(found)
    print(f"{len(found)} gaps in {folder}\n{listed}")
    assert not found, f"{len(found)} gaps in {folder}:\n{listed}"


SAMPLE = dedent('''
    """A module."""
    import numpy as np
    from torch import Tensor
    Pair = tuple[Tensor, Tensor]

    def no_words(x: Tensor): ...
    def no_shape(x: "Tensor | None"):
        """Adds a float32 number within [0, 1]."""
    def no_dtype(x: dict[str, np.ndarray]):
        """Adds to each [B, C, h, w]."""
    def no_raises(x: int) -> Pair:
        """Makes a pair float32 [N] of arXiv 2401.10227."""
        if x < 0:
            raise ArgumentError("x")
    def requires(*x: Tensor):
        """Takes any shape and any dtype."""
        require(False, "")
    class Public:
        def forward(self, x: Tensor):
            """Takes list[int] and a dict of integers."""
        def _own(self, x: Tensor): ...
    class _Private:
        def forward(self, x: Tensor): ...

    def whole(x: Tensor, y: np.ndarray) -> Tensor:
        """Adds y, uint8 [256], to x, bfloat16 [..., 2 * C] (equation 3).

        Raises:
            ArgumentError: shapes that differ.
        """
        def inner(x: Tensor): ...
        raise ArgumentError("x")
    def refers(x: Tensor):
        """See `whole`."""
        raise ArgumentError("x")
    def refers_late(x: Tensor):
        """Adds a scalar of float (torch).

        See `whole`.
        """
        raise ArgumentError("x")
    def without_arrays(x: int): ...
    def _own(x: Tensor): ...
    def again(x: Tensor):
        """Passes on a scalar of float (torch)."""
        try:
            inner(x)
        except ArgumentError:
            raise
''')


def test_each_kind_of_gap_is_seen():
    assert [(name, missing) for _, name, missing in lacks(SAMPLE, sourced=True)] == [
        ("no_words", "docstring, shape, dtype, source"),
        ("no_shape", "shape, source"),
        ("no_dtype", "dtype, source"),
        ("no_raises", "Raises"),
        ("requires", "Raises, source"),
        ("Public.forward", "shape, source"),
        ("refers_late", "Raises"),
    ]


def test_a_source_may_stand_above():
    assert [name for _, name, missing in lacks(SAMPLE.replace("A module.", "As in diffusers."), True)] == [
        "no_words", "no_shape", "no_dtype", "no_raises", "requires", "Public.forward", "refers_late"
    ]  # fmt: skip
    assert not any("source" in missing for _, _, missing in lacks(SAMPLE))


if __name__ == "__main__":
    listing = gaps([path for name in sys.argv[1:] or CODE for path in files_below((ROOT / name).resolve())])
    print(*listing, f"{len(listing)} gaps", sep="\n")
    sys.exit(bool(listing))

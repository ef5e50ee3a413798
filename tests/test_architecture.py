"""Who may import whom, and what is spelled in one place only: read from the sources."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
import tokenize
import tomllib
from pathlib import Path

import pytest
from helpers import new_layer, reference_of

import fastrnn
from fastrnn import jit
from fastrnn.cells import CELLS
from fastrnn.module import Module
from fastrnn.reference import CELLS as REFERENCE

ROOT = Path(fastrnn.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

# A module imports from levels above its own only; a new module has to be given a level.
LEVELS = (
    {"jit", "memory", "checks", "text", "checkpoint", "init"},
    {"simd", "counter", "axes", "options"},
    {"vmath", "tile", "atomic", "plot"},
    {"crew"},
    {"parallel"},
    {"meeting", "rows"},
    {"gemm", "layout"},
    {"cells", "dropout", "noise", "loss", "optim", "clip", "units"},
    {"pack", "row", "norm"},
    {"recurrence", "module", "stepper", "frozen"},
    {"single", "dense"},
    {"stack", "readout", "budget"},
    {"saved"},
    {"recurrent"},
    {"layers"},
    {"models"},
    {"train", "generate", "score"},
    {"cli", "ahead"},
    {"__main__"},
)
LEVEL_OF = {module: level for level, modules in enumerate(LEVELS) for module in modules}

each_file = pytest.mark.parametrize(
    "path", FILES, ids=[str(path.relative_to(ROOT)) for path in FILES]
)


def parse(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def part_of(path):
    """The module or folder of the package that a file belongs to; "" is the package itself."""
    first = path.relative_to(ROOT).parts[0]
    return "" if first == "__init__.py" else first.removesuffix(".py")


def imported(path):
    """Full names of all that a file imports, at the top or inside functions: module or member."""
    package = ("fastrnn", *path.relative_to(ROOT).parts[:-1])
    names = []
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *filter(None, [node.module])))
            names += [f"{module}.{alias.name}" for alias in node.names]
    return names


def own_parts(path):
    """The parts of the package that a file imports."""
    names = [name.split(".")[1:] for name in imported(path) if name.split(".")[0] == "fastrnn"]
    return {name[0] if name else "" for name in names}


def test_the_sources_are_seen():
    assert {"jit.py", "recurrence.py", "cli.py"} <= {path.name for path in FILES}
    assert own_parts(ROOT / "recurrence.py") >= {"cells", "gemm", "simd", "jit"}
    assert own_parts(ROOT / "cli.py") >= {"train", "generate"}


@each_file
def test_imports_point_one_way(path):
    part = part_of(path)
    parts = own_parts(path)
    if part == "":
        assert parts <= LEVEL_OF.keys() - {"cli", "__main__"}
        return
    if part == "reference":
        assert parts <= {"reference"}, "the reference stands alone"
        return
    assert part in LEVEL_OF, f"{part}: give it a level in this test"
    parts -= {part} if path.parent != ROOT else set()
    unknown = parts - LEVEL_OF.keys()
    assert not unknown, f"{path.name} imports {unknown}"
    wrong = {name for name in parts if LEVEL_OF[name] >= LEVEL_OF[part]}
    assert not wrong, f"{path.name} imports {wrong}, which are not above it"


@each_file
def test_imports_of_other_packages(path):
    outside = {name.split(".")[0] for name in imported(path)} - {"fastrnn", "__future__"}
    outside -= set(sys.stdlib_module_names)
    if part_of(path) == "reference":
        assert outside <= {"numpy"}, "the reference is NumPy alone"
    else:
        # llvmlite is what Numba itself is made of.
        allowed = {"numpy", "numba", "llvmlite", "safetensors", "tqdm"}
        assert outside <= allowed | ({"matplotlib"} if part_of(path) == "plot" else set())


def test_dependencies_are_imported():
    project = ROOT.parent / "pyproject.toml"
    if not project.exists():
        pytest.skip("not a checkout")
    declared = tomllib.loads(project.read_text())["project"]["dependencies"]
    used = {name.split(".")[0] for path in FILES for name in imported(path)}
    assert {re.match(r"[\w-]+", line)[0] for line in declared} <= used


COMPILERS = {
    "CFunc",
    "CPUDispatcher",
    "Dispatcher",
    "cfunc",
    "generated_jit",
    "guvectorize",
    "jit",
    "jit_module",
    "jitclass",
    "njit",
    "prange",
    "register_jitable",
    "set_num_threads",
    "stencil",
    "vectorize",
}
FLAGS = {
    "boundscheck",
    "cache",
    "error_model",
    "fastmath",
    "forceobj",
    "inline",
    "jit_options",
    "nogil",
    "nopython",
    "no_cpython_wrapper",
    "targetoptions",
}


def compiler_spellings(tree):
    """How a file compiles past jit.py: names taken from Numba, and flags given to a call."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "numba":
            yield from (alias.name for alias in node.names if alias.name in COMPILERS)
        elif isinstance(node, ast.Attribute) and node.attr in COMPILERS:
            base = node.value
            while isinstance(base, ast.Attribute):
                base = base.value
            if isinstance(base, ast.Name) and base.id in {"numba", "nb"}:
                yield node.attr
        elif isinstance(node, ast.Call):
            yield from (keyword.arg for keyword in node.keywords if keyword.arg in FLAGS)


@each_file
def test_only_jit_compiles(path):
    found = set(compiler_spellings(parse(path)))
    if path == ROOT / "jit.py":
        assert found & COMPILERS
    else:
        assert not found


def kernels(path):
    """The functions of a file that are compiled as entry points."""
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.FunctionDef):
            names = {getattr(decorator, "id", None) for decorator in node.decorator_list}
            if "kernel" in names:
                yield node


@each_file
def test_kernels_with_parts_divide_themselves(path):
    for function in kernels(path):
        if [argument.arg for argument in function.args.args[:2]] == ["part", "parts"]:
            first = [ast.unparse(line) for line in function.body[:2]]
            assert "if divided(part, parts):\n    return" in first, function.name


def test_kernels_are_found():
    found = {function.name for path in FILES for function in kernels(path)}
    assert {"forward_slice", "affine", "serve"} <= found


def test_no_fast_math():
    assert "fastmath" not in jit.OPTIONS
    assert jit.OPTIONS["nogil"] is True


@each_file
def test_nothing_executes_what_it_reads(path):
    modules = {name.split(".")[0] for name in imported(path)}
    unsafe = {"cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}
    if path == ROOT / "jit.py":
        unsafe.remove("pickle")  # the kernel cache, which lies where Python's own bytecode does
    assert not modules & unsafe
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Call):
            name = getattr(node.func, "id", None)
            assert name not in {"eval", "exec", "compile", "__import__"}, f"line {node.lineno}"
            assert "allow_pickle" not in {keyword.arg for keyword in node.keywords}


@each_file
def test_only_the_command_line_prints(path):
    calls = [node.func for node in ast.walk(parse(path)) if isinstance(node, ast.Call)]
    if path == ROOT / "cli.py":
        assert any(getattr(call, "id", None) == "print" for call in calls)
    else:
        assert not any(getattr(call, "id", None) == "print" for call in calls)


def test_the_recurrence_knows_no_cell():
    names = {word for name in (*CELLS, *REFERENCE) for word in name.lower().split("_")}
    # Words of the loop itself.
    names -= {"before", "norm", "projected"}
    assert {"lstm", "gru", "rnn", "tanh", "relu"} <= names
    with (ROOT / "recurrence.py").open("rb") as file:
        for token in tokenize.tokenize(file.readline):
            words = set(re.findall(r"[a-z]+", token.string.lower()))
            assert not words & names, f"line {token.start[0]}: {token.line.strip()}"


@pytest.mark.parametrize("name", sorted(CELLS))
def test_a_cell_has_a_reference_and_a_layer(name):
    cell = CELLS[name]
    reference, options = reference_of(name)
    assert cell.name == name
    assert len(reference.GATES) == cell.gates + options.get("coupled", 0)
    assert len(reference.STATES) == 1 + cell.carries
    gates = list(range(cell.gates))
    assert sorted(cell.order_x) == sorted(cell.order_h + cell.order_late) == gates
    layer = new_layer(name, 2, 3)
    assert layer.cell is cell
    assert layer.state_names == reference.STATES
    assert isinstance(layer, Module)


def test_every_reference_cell_has_a_kernel():
    assert {reference_of(name)[0] for name in CELLS} == set(REFERENCE.values())


@pytest.mark.parametrize("name", fastrnn.__all__)
def test_public_names_are_documented(name):
    thing = getattr(fastrnn, name)
    assert inspect.getdoc(thing), name
    if inspect.isclass(thing):
        for method, value in inspect.getmembers(thing, inspect.isfunction):
            if not method.startswith("_"):
                assert inspect.getdoc(value), f"{name}.{method}"


def test_public_names_are_complete():
    assert len(set(fastrnn.__all__)) == len(fastrnn.__all__)
    assert set(fastrnn.__all__) <= set(dir(fastrnn))
    own = {
        name
        for name in dir(fastrnn)
        if getattr(getattr(fastrnn, name), "__module__", "").startswith("fastrnn")
    }
    assert own <= set(fastrnn.__all__) | {"__getattr__", "__dir__"}
    with pytest.raises(AttributeError, match="'fastrnn' has no attribute 'nothing'"):
        fastrnn.nothing  # noqa: B018


def test_a_missing_dependency_is_named():
    script = "import sys; sys.modules['numba'] = None; import fastrnn; fastrnn.GRU"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 1
    assert "ModuleNotFoundError: import of numba halted" in done.stderr


@each_file
def test_every_module_says_what_it_is(path):
    assert ast.get_docstring(parse(path))

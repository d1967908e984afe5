"""The code's shape: data flows one way, and parts stay free of what they need not know.

Imports are read from the syntax trees, so nothing here depends on what happens to be installed.
"""

import ast
import pathlib
import subprocess
import sys

import pytest

import jexit

ROOT = pathlib.Path(jexit.__file__).parent.parent

# A part imports only from itself and from parts before it.
ORDER = (
    "axes",
    "untrusted",  # strict reading of files; the standard library only
    "convert.names",  # names in files ↔ paths of parameters; a table that knows nothing of jexit
    "presets",
    "bounds",  # of settings
    "sections",  # of the config
    "config",
    "kernels",
    "dist",
    "model",
    "losses",  # after model: the depth law lives with the exit heads
    "tasks",
    "data",
    "rollout",
    "io",
    "results",  # what evaluation writes and the report reads
    "steps",
    "evaluation",
    "report",  # before loops: every training run ends by drawing its curves
    "loops",
    "aot",
    "main",
    "sweep",
    "convert.from_hf",
    "convert.to_hf",  # shares the command-line ending of from_hf
)


def sources(*folders):
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


FILES = sources("jexit", "convert")


def module_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES}


def imports(path, *, at_import_only=False):
    """The full names of modules that a file imports, annotations' imports left out."""
    found = set()

    def visit(node):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            for child in node.orelse:
                visit(child)
            return
        if at_import_only and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add(full if full in MODULES else node.module)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return found


def part_of(module):
    """The entry of ORDER that a module belongs to, or None for another library's."""
    root, _, rest = module.partition(".")
    if root == "convert":
        return module
    return rest.split(".")[0] if root == "jexit" else None


def ours(path, **options):
    """Imports of jexit and convert; `import jexit` itself (lazy: a name and a version) left out."""
    return {m for m in imports(path, **options) if m.split(".")[0] in ("jexit", "convert")} - {
        "jexit"
    }


def test_every_module_has_its_place():
    unplaced = {part_of(m) for m in MODULES if m not in ("jexit", "convert")} - set(ORDER)
    assert not unplaced


def test_the_test_sees_imports():
    assert "jexit.model.transformer" in ours(MODULES["jexit.steps.rl"])
    assert "jexit.kernels.linear_kl" in ours(MODULES["jexit.steps.rl"])
    assert "jexit.loops.rl" in ours(MODULES["jexit.main"])
    assert "jexit.loops.rl" not in ours(MODULES["jexit.main"], at_import_only=True)


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"jexit", "convert"}))
def test_imports_follow_the_order(module):
    place = ORDER.index(part_of(module))
    later = [m for m in ours(MODULES[module]) if ORDER.index(part_of(m)) > place]
    assert not later, f"{module} imports {later}, which come after it"


def test_the_package_itself_imports_none_of_its_parts():
    assert ours(MODULES["jexit"], at_import_only=True) == set()
    assert jexit.__all__ == sorted(jexit.__all__)


def test_no_imports_go_round_in_a_circle():
    graph = {module: ours(path) - {module} for module, path in MODULES.items()}
    # A package's __init__ runs before its modules, which therefore depend on what it imports.
    done, path = set(), []

    def visit(module):
        if module in path:
            pytest.fail(" → ".join([*path[path.index(module) :], module]))
        if module not in done:
            path.append(module)
            for other in sorted(graph.get(module, ())):
                visit(other)
            path.pop()
            done.add(module)

    for module in sorted(graph):
        visit(module)


@pytest.mark.parametrize("part", ["losses"])
def test_losses_are_arrays_in_and_arrays_out(part):
    for path in sources(f"jexit/{part}"):
        assert not {m for m in imports(path) if m.split(".")[0] in ("flax", "ml_collections")}
        assert "config" not in {part_of(m) for m in ours(path)}


def test_steps_touch_no_disk():
    for path in sources("jexit/steps", "jexit/losses", "jexit/model", "jexit/kernels"):
        disk = {"os", "io", "pathlib", "shutil", "json", "orbax", "safetensors"}
        assert not {m.split(".")[0] for m in imports(path)} & disk, path
        names = {n.id for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Name)}
        assert "open" not in names, path


@pytest.mark.parametrize(
    "modules",
    [
        "jexit, jexit.tasks, jexit.report.plots, jexit.report.html, jexit.report.__main__",
        "jexit.config, jexit.main",
        "configs.rl",
        "convert.names, convert.from_hf, convert.to_hf",
    ],
)
def test_what_needs_no_jax_loads_without_it(modules):
    code = (
        f"import sys, {modules}; print([m for m in ('jax', 'flax', 'torch') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


@pytest.mark.parametrize("folder", ["jexit/tasks", "jexit/report"])
def test_tasks_and_report_know_no_jax(folder):
    for path in sources(folder):
        assert not {m.split(".")[0] for m in imports(path)} & {"jax", "jaxlib", "flax", "optax"}


def test_names_of_parameters_are_a_table_of_their_own():
    assert ours(MODULES["convert.names"]) == set()


def test_files_stay_short_and_say_what_they_hold():
    for path in [*FILES, *sources("configs")]:
        assert path.stem not in ("utils", "util", "helpers", "misc", "common"), path
        assert ast.get_docstring(ast.parse(path.read_text())), f"{path} has no docstring"

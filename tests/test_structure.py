"""The code's shape: data flows one way, and parts stay free of what they need not know.

Imports are read from the syntax trees, so nothing here depends on what happens to be installed.
"""

import ast
import collections
import functools
import graphlib
import pathlib
import subprocess
import sys

import jexit

ROOT = pathlib.Path(jexit.__file__).parent.parent

# A part imports only from itself and from parts before it.
ORDER = (
    "axes",
    "errors",
    "untrusted",  # strict reading of files; the standard library only
    "convert.modeling_jexit",  # runs in transformers, without jexit
    "convert.names",  # names in files ↔ paths of parameters; a table that knows nothing of jexit
    "settings",  # what a dataclass of settings takes
    "presets",
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
    "doctor",
    "main",
    "sweep",
    "serve",
    "convert.from_hf",
    "convert.model_card",
    "convert.to_hf",  # shares the command-line ending of from_hf
    "cli",
)


def sources(*folders):
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def module_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = sources("jexit", "convert")
MODULES = {module_of(path): path for path in FILES}


@functools.cache
def tree_of(path):
    return ast.parse(path.read_text())


@functools.cache
def imports(path):
    """The full names of modules that a file imports, annotations' imports left out."""
    found = set()

    def visit(node):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            for child in node.orelse:
                visit(child)
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

    visit(tree_of(path))
    return found


def roots(path):
    return {module.split(".")[0] for module in imports(path)}


def part_of(module):
    """The entry of ORDER that a module belongs to, or None for another library's."""
    root, _, rest = module.partition(".")
    if root == "convert":
        return module
    return rest.split(".")[0] if root == "jexit" else None


def ours(path):
    """Imports of jexit and convert; `import jexit` itself (lazy: a name and a version) left out."""
    return {m for m in imports(path) if m.startswith(("jexit.", "convert."))}


def test_imports_follow_the_order_and_go_round_in_no_circle():
    assert "jexit.kernels.linear_kl" in ours(MODULES["jexit.steps.rl"])  # the test sees imports
    assert "jexit.loops.rl" in ours(MODULES["jexit.main"])
    for module in MODULES.keys() - {"jexit", "convert"}:
        assert part_of(module) in ORDER, f"{module} has no place in the order"
        place = ORDER.index(part_of(module))
        later = [m for m in ours(MODULES[module]) if ORDER.index(part_of(m)) > place]
        assert not later, f"{module} imports {later}, which come after it"
    graph = {module: ours(path) - {module} for module, path in MODULES.items()}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle
    assert ours(MODULES["jexit"]) == set()
    assert ours(MODULES["convert.names"]) == set()
    assert jexit.__all__ == sorted(jexit.__all__)


def test_parts_stay_free_of_what_they_need_not_know():
    for path in sources("jexit/losses"):  # arrays in, arrays out
        assert not roots(path) & {"flax", "ml_collections"}, path
        assert "config" not in {part_of(m) for m in ours(path)}, path
    for path in sources("jexit/steps", "jexit/losses", "jexit/model", "jexit/kernels"):
        assert not roots(path) & {"os", "io", "pathlib", "shutil", "json", "orbax", "safetensors"}
        names = {n.id for n in ast.walk(tree_of(path)) if isinstance(n, ast.Name)}
        assert "open" not in names, f"{path} touches the disk"
    for path in sources("jexit/tasks", "jexit/report"):
        assert not roots(path) & {"jax", "jaxlib", "flax", "optax"}, path


def test_what_needs_no_jax_loads_without_it():
    for modules in (
        "jexit, jexit.tasks, jexit.report.page, jexit.report.__main__",
        "jexit.main, configs.rl, convert.names",
    ):
        code = f"import sys, {modules}; print({{'jax', 'flax', 'torch'}} & {{*sys.modules}})"
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stdout.strip()) == (0, "set()"), done.stderr


def test_files_say_what_they_hold():
    for path in [*FILES, *sources("configs")]:
        assert path.stem not in ("utils", "util", "helpers", "misc", "common"), path
        assert ast.get_docstring(tree_of(path)), f"{path} has no docstring"


def test_a_class_has_a_name_of_its_own():
    """No other class and no alias of a type has the same name, with or without an underscore."""
    classes, aliases = collections.Counter(), set()
    for path in sources("jexit"):
        tree = tree_of(path)
        classes.update(n.name.lstrip("_") for n in ast.walk(tree) if isinstance(n, ast.ClassDef))
        for node in tree.body:
            if isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                aliases.update(n.id.lstrip("_") for n in targets if isinstance(n, ast.Name))
    assert classes["Transformer"] == 1 and "MeasureName" in aliases  # the test sees both
    assert not [name for name, number in classes.items() if number > 1 or name in aliases]

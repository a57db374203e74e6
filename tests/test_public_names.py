"""Every public name is on a reference page, and its docstring is complete and has an example that runs.

The pages of `docs/reference/python` say what is public: each `::: name` names an object, or a module whose public
functions and classes are meant. The public functions, methods and properties of a class are public with it, unless the
directive's `members` lists others.
"""

import ast
import doctest
import functools
import importlib
import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from runs import write_counting_data

import tinymodel_jax
from tinymodel_jax import analysis, training

PAGES = sorted((Path(__file__).parent.parent / "docs" / "reference" / "python").glob("*.md"))
INTERNAL_MODULES = {"coactivation"}
"""Modules of `tinymodel_jax.analysis` of which users call nothing: their results are part of other functions'."""
SAME_ARGUMENTS = re.compile(
    r"(arguments|options) (are )?(as for|those of)|whose arguments these are|as `(\w|\.)+` takes", re.IGNORECASE
)
"""What a docstring says that leaves the description of its arguments to another function."""
OWN_TYPES = (
    r"tinymodel_jax|\b(TinyModel|Dictionary|Circuit|AttributionGraph|Reader|Story)\b|(Float|Int|Bool|Array)\w*\["
)
"""Types that say what an argument is: those of this package, and arrays of named axes."""
MAIN_CLASSES = ("tinymodel_jax.TinyModel", "tinymodel_jax.Dictionary", "tinymodel_jax.Tokenizer")
"""Classes of which every method has an example."""
CODE = ("function", "class", "method", "property")
PLAIN = {"self", "cls", "lm", "path", "folder", "directory", "config", "recipe", "params", "key"}
"""Arguments that mean the same everywhere and need no description."""


class Directive(NamedTuple):
    """One `::: name` of a reference page."""

    page: str
    name: str
    members: list[str] | None
    """What its `members` option lists; None for all public ones."""


class Public(NamedTuple):
    """A public function, class, method or property."""

    name: str
    found: Any
    """The function or class; the getter of a property."""
    kind: str
    """function, class, method, property or value."""
    page: str = ""


def directives() -> Iterator[Directive]:
    for page in PAGES:
        blocks = re.findall(r"^::: (\S+)\n((?:    .*\n|\n(?=    ))*)", page.read_text("utf-8") + "\n", re.MULTILINE)
        for name, options in blocks:
            members = (yaml.safe_load(options) or {}).get("options", {}).get("members")
            yield Directive(page.name, name, members)


@functools.cache
def resolve(name: str) -> Any:
    parts = name.split(".")
    for n in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:n]))
        except ModuleNotFoundError:
            continue
        return functools.reduce(getattr, parts[n:], found)
    raise AssertionError(f"{name} does not exist")


def of_class(name: str, cls: type, only: list[str] | None) -> Iterator[Public]:
    """Yield a class and its own public functions and properties."""
    yield Public(name, cls, "class")
    for attribute, value in vars(cls).items():
        value = value.__func__ if isinstance(value, staticmethod | classmethod) else value
        called = attribute in ("__call__", "__getitem__") and getattr(value, "__doc__", None)
        if (attribute.startswith("_") and not called) or (only is not None and attribute not in only):
            continue
        if isinstance(value, property | functools.cached_property):
            getter = value.fget if isinstance(value, property) else value.func
            yield Public(f"{name}.{attribute}", getter, "property")
        elif inspect.isfunction(value) and value.__module__.startswith("tinymodel_jax"):
            yield Public(f"{name}.{attribute}", value, "method")


def of_module(name: str, module: Any) -> Iterator[tuple[str, Any]]:
    for attribute in getattr(module, "__all__", vars(module)):
        value = getattr(module, attribute)
        at_home = hasattr(module, "__all__") or getattr(value, "__module__", "") == module.__name__
        if not attribute.startswith("_") and at_home and (inspect.isclass(value) or inspect.isfunction(value)):
            yield f"{name}.{attribute}", value


@functools.cache
def public() -> tuple[Public, ...]:
    """Everything that the reference pages show, once each."""
    found: dict[int, Public] = {}
    for directive in directives():
        value = resolve(directive.name)
        named = list(of_module(directive.name, value)) if inspect.ismodule(value) else [(directive.name, value)]
        for name, one in named:
            whole = (
                of_class(name, one, directive.members)
                if inspect.isclass(one)
                else [Public(name, one, "function" if inspect.isroutine(one) else "value")]
            )
            for part in whole:
                found.setdefault(id(part.found), part._replace(page=directive.page))
    return tuple(found.values())


def written(found: Any) -> str:
    """The docstring, empty for those that Python or Flax generates."""
    text = inspect.getdoc(found) if isinstance(found, type) else getattr(found, "__doc__", None)
    return inspect.cleandoc(text or "")


def section(text: str, title: str) -> str:
    """Return one section of a docstring, such as Args."""
    match = re.search(rf"^{title}:\n((?:    .*\n?|\n)+)", text, re.MULTILINE)
    return textwrap.dedent(match[1]) if match else ""


def of_kinds(*kinds: str) -> list[Public]:
    return [one for one in public() if one.kind in kinds]


def test_every_exported_name_is_on_a_reference_page() -> None:
    on_pages = {id(resolve(directive.name)) for directive in directives()} | {id(one.found) for one in public()}
    exported = [
        *((tinymodel_jax, name) for name in tinymodel_jax.__all__),
        *((training, name) for name in training.__all__),
        *((analysis, name) for name in dir(analysis) if not inspect.ismodule(getattr(analysis, name))),
    ]
    missing = [f"{module.__name__}.{name}" for module, name in exported if id(getattr(module, name)) not in on_pages]
    assert not missing


def test_every_module_of_analysis_has_a_public_name() -> None:
    homes = {getattr(inspect.unwrap(one.found), "__module__", "") for one in public() if callable(one.found)}
    modules = {name: getattr(analysis, name) for name in set(dir(analysis)) - INTERNAL_MODULES}
    for name, module in modules.items():
        assert not inspect.ismodule(module) or any(home.startswith(module.__name__) for home in homes), name


def test_public_names_have_a_summary() -> None:
    summaries = {one.name: written(one.found).split("\n\n")[0] for one in of_kinds(*CODE)}
    assert not [(name, text) for name, text in summaries.items() if not text.endswith((".", ":"))]


def undescribed(one: Public) -> list[str]:
    """Return the arguments that are neither an entry of `Args`, nor named in the text, nor plain from their type."""
    text = written(one.found)
    entries = set(re.findall(r"^(\w+): ", section(text, "Args"), re.MULTILINE))
    left = []
    for name, parameter in inspect.signature(one.found).parameters.items():
        plain = name in PLAIN or re.search(OWN_TYPES, str(parameter.annotation))
        named = name in entries or re.search(rf"`[^`]*\b{name}\b[^`]*`", text)
        if not (plain or named or parameter.kind is parameter.VAR_POSITIONAL):
            left.append(name)
    return left


def test_arguments_are_described_where_there_are_several() -> None:
    functions = of_kinds("function", "method")
    several = [one for one in functions if len(inspect.signature(one.found).parameters) > 1 + (one.kind == "method")]
    left = {one.name: undescribed(one) for one in several if not SAME_ARGUMENTS.search(written(one.found))}
    assert not {name: arguments for name, arguments in left.items() if arguments}


def raised(found: Any) -> set[str]:
    """Return the names of the errors that a function raises in its own body."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(found))))
    errors = [
        node.exc.func for node in ast.walk(tree) if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)
    ]
    return {error.id for error in errors if isinstance(error, ast.Name)} - {"AttributeError"}


def test_errors_that_a_function_raises_itself_are_documented() -> None:
    missing = []
    for one in of_kinds("function", "method", "property"):
        said = (
            written(one.found)
            .replace("Errors are those of", "TypeError ValueError")
            .replace("OSError", "PermissionError")
        )
        missing += [(one.name, error) for error in raised(one.found) if error not in said]
    assert not missing


def fields(cls: type) -> Iterator[tuple[str, bool]]:
    """Yield the name of each public field of a class, and whether a docstring follows it."""
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(node, ast.ClassDef)
    for field, after in zip(node.body, [*node.body[1:], None], strict=True):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and field.target.id[0] != "_":
            yield field.target.id, isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)


def test_fields_of_public_classes_are_documented() -> None:
    shown = {id(resolve(directive.name)): directive.members for directive in directives()}
    missing = []
    for one in of_kinds("class"):
        only = shown.get(id(one.found))
        names = [name for name, described in fields(one.found) if not described and (only is None or name in only)]
        missing += [f"{one.name}.{name}" for name in names]
    assert not missing


def needs_an_example(one: Public, returned: str) -> bool:
    """Whether it is a function, a method of a main class, or a class that is not just what a function returns."""
    if one.kind == "class":
        return not (issubclass(one.found, tuple) or re.search(rf"\b{one.found.__name__}\b", returned))
    return one.kind == "function" or (one.kind == "method" and one.name.rpartition(".")[0] in MAIN_CLASSES)


def test_public_names_have_an_example() -> None:
    returned = " ".join(str(inspect.signature(one.found).return_annotation) for one in of_kinds("function", "method"))
    missing = [
        one.name for one in of_kinds(*CODE) if needs_an_example(one, returned) and ">>> " not in written(one.found)
    ]
    assert not missing


@pytest.mark.usefixtures("standard_promotion", "no_type_checks")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_examples_of_docstrings_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    for one in (one for one in public() if one.page == page.name and ">>> " in written(one.found)):
        folder = tmp_path / one.name
        (folder / "data").mkdir(parents=True)
        write_counting_data(folder / "data")  # the examples that open a prepared folder call it `data`
        monkeypatch.chdir(folder)
        example = doctest.DocTestParser().get_doctest(written(one.found), {}, one.name, one.name, 0)
        doctest.DocTestRunner().run(example, out=said.append)
    assert not said, "".join(said)

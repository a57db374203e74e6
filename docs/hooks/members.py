"""Griffe extension: members of classes as readers of the reference look for them.

Fields and one-sentence properties become a list in the class's own docstring, with their shapes and units, in place of
a heading each. A method that is a function of another module (`generate = generation.generate`) is shown as a method.
"""

from typing import Any

import griffe


class Members(griffe.Extension):
    """Changes all classes of a package once it is loaded."""

    def on_package(self, *, pkg: griffe.Module, loader: griffe.GriffeLoader, **_: Any) -> None:
        """Visit the package's classes."""
        classes = _classes(pkg)
        for cls in classes:
            for member in list(cls.members.values()):
                if isinstance(member, griffe.Attribute) and isinstance(member.value, griffe.ExprAttribute):
                    _show_as_method(cls, member, member.value.canonical_path, loader)
        listed = [(cls, _attributes(cls)) for cls in classes if cls.docstring is not None]
        for cls, attributes in listed:
            for one in attributes:
                if one.name in cls.members:
                    cls.del_member(one.name)
            if attributes and cls.docstring is not None:
                cls.docstring.parsed.insert(1, griffe.DocstringSectionAttributes(attributes))


def _classes(module: griffe.Module) -> list[griffe.Class]:
    members = module.members.values()
    deeper = [one for member in members if isinstance(member, griffe.Module) for one in _classes(member)]
    return [member for member in members if isinstance(member, griffe.Class)] + deeper


def _show_as_method(cls: griffe.Class, member: griffe.Attribute, path: str, loader: griffe.GriffeLoader) -> None:
    """Put the function that an attribute names in its place, without its first argument, which is the object."""
    try:
        function = loader.modules_collection.get_member(path)
    except (KeyError, griffe.AliasResolutionError):
        return
    if not isinstance(function, griffe.Function):
        return
    parameters = griffe.Parameters(*list(function.parameters)[1:])
    method = griffe.Function(member.name, lineno=member.lineno, parameters=parameters, returns=function.returns)
    if function.docstring is not None:
        method.docstring = griffe.Docstring(function.docstring.value, lineno=member.lineno, parent=method)
    cls.set_member(member.name, method)


def _attributes(cls: griffe.Class) -> list[griffe.DocstringAttribute]:
    """Return the fields and properties of a class and its bases that one paragraph describes."""
    found = []
    for base in (cls, *cls.mro()):
        for name, member in base.members.items():
            text = member.docstring.value if isinstance(member, griffe.Attribute) and member.docstring else ""
            if text and "\n\n" not in text and not name.startswith("_"):
                annotation = getattr(member, "annotation", None)
                found.append(griffe.DocstringAttribute(name, annotation=annotation, description=" ".join(text.split())))
    return found

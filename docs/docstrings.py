"""What the API pages need beyond what griffe reads from the sources.

Sections of docstrings that griffe does not know ("Call arguments"), or would
cut into items where they are sentences ("Returns"), become what it shows well.
Named tuples get their constructor, and classes the bases that a user can name.
"""

import re

import griffe

TABLES = {"Call arguments": "Other Args: Call arguments"}
PROSE = ("Returns", "Yields", "References")
SECTION = re.compile(
    rf"^({'|'.join([*TABLES, *PROSE])}):\n((?:    .*\n|\n)*)", re.MULTILINE
)


class Docstrings(griffe.Extension):
    def __init__(self, sources):
        """`sources`: address of the folder that the package is in."""
        self.sources = sources

    def on_package(self, *, pkg, **kwargs):
        modules = list(_modules(pkg))
        public = {
            module.members[name].canonical_path
            for module in modules
            for name in module.exports or ()
        }
        for module in modules:
            for value in module.members.values():
                is_here = not value.is_alias
                if is_here and (value.is_class or value.is_function):
                    self._prepare(value, public)

    def _prepare(self, value, public):
        if value.is_class:
            # `keras.Layer` and `keras.layers.Layer` are one.
            bases = {
                name.split(".")[-1]: name for name in _bases(value, public)
            }
            value.extra["keras_kt"]["bases"] = list(bases.values())
            if "NamedTuple" in bases:
                value.set_member("__init__", _constructor(value))
            for member in value.members.values():
                if member.docstring is not None:
                    _rewrite(member.docstring)
        if value.docstring is not None:
            _rewrite(value.docstring)
            path = value.relative_package_filepath.as_posix()
            link = f"[Source]({self.sources}/{path}#L{value.lineno})"
            value.docstring.value += f"\n\n{link}{{ .source }}\n"


def _modules(module):
    yield module
    for member in module.members.values():
        if not member.is_alias and member.is_module:
            yield from _modules(member)


def _bases(cls, public):
    """Names of the nearest bases that are public, or of other packages."""
    for base in cls.bases:
        path = base.canonical_path
        if path in public or not path.startswith("keras_kt."):
            yield str(base)
        else:
            yield from _bases(cls.modules_collection[path], public)


def _constructor(cls):
    fields = [member for member in cls.members.values() if member.is_attribute]
    parameters = [
        griffe.Parameter(
            field.name,
            annotation=field.annotation,
            kind=griffe.ParameterKind.positional_or_keyword,
            default=field.value,
        )
        for field in fields
    ]
    return griffe.Function(
        "__init__", parameters=griffe.Parameters(*parameters)
    )


def _rewrite(docstring):
    docstring.value = SECTION.sub(_shown, docstring.value.strip() + "\n")


def _shown(section):
    title, body = section.groups()
    if title in TABLES:
        return f"{TABLES[title]}\n{body}"
    prose = re.sub("^    ", "", body, flags=re.MULTILINE)
    return f'<span class="doc-section-title">{title}:</span>\n\n{prose}\n'

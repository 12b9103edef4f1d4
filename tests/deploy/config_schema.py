"""Generates the schema of `config` in values.schema.json from the node's own reference, gateway/docs/configuration.md,
which a test of the node compares with its table of keys.

`python tests/deploy/config_schema.py` rewrites it; a test checks that it is current. With it, Helm refuses a key that
the node does not have, instead of rendering pods that exit at once. It refuses nothing that the node accepts: rules
between two values, and the contents of files, are left to the node.
"""

import json
import re

from chart import CHART

REFERENCE = CHART.parents[1] / "gateway" / "docs" / "configuration.md"
SCHEMA = CHART / "values.schema.json"
# Any TOML value, for kinds that are not distinguished here.
ANYTHING = {"$ref": "#/definitions/tomlValue"}
KEY_FILES = {"secret_file", "public_key_file"}
# The characters of a room's name; {sub} at most once, * only at the end, and not directly after {sub}.
PART = r"[^\s{}*\x00-\x1f\x7f]"
PATTERN = rf"^({PART}*\*?|{PART}*\{{sub\}}({PART}+\*?)?)$"


def reference():
    """Pairs of a key's name and the description of its values, in the order of the reference."""
    rows = re.findall(r"^\| `([^`]+)` \| (.+?) \| .+? \| (?:at once|after a restart) \|", REFERENCE.read_text(), re.M)
    assert rows, "the reference has no rows"
    return rows


def number(text):
    """The bytes of `64KiB`."""
    digits, unit = re.fullmatch(r"(\d+)(\D+)", text).groups()
    return int(digits) * 1024 ** ("B", "KiB", "MiB", "GiB").index(unit)


def whole(least, most):
    """A number, also as a string, which is what `--set-string` passes."""
    return [{"type": "integer", "minimum": least, "maximum": most}, {"type": "string", "pattern": "^[0-9]+$"}]


def choices(kind):
    """The alternative schemas for a value of this kind."""
    if kind.startswith("auto, or "):
        return [{"const": "auto"}, *choices(kind.removeprefix("auto, or "))]
    if kind.startswith("none, or "):
        return [{"const": "none"}, *choices(kind.removeprefix("none, or "))]
    if kind.startswith("off, or "):
        # Not one enum: Helm 4 considers "0" and 0 equal, and an enum with both invalid. YAML reads off as false.
        return [{"enum": ["off", "0", "false", False]}, {"const": 0}, *choices(kind.removeprefix("off, or "))]
    if found := re.fullmatch(r"a whole number from (\d+) to (\d+)", kind):
        return whole(int(found[1]), int(found[2]))
    if found := re.match(r"a time from (\d+)", kind):
        # A time that must not be zero.
        digits = "[0-9]+" if found[1] == "0" else "0*[1-9][0-9]*"
        return [{"type": "string", "pattern": f"^{digits}(ms|s|m|h)$"}]
    if found := re.match(r"a size from (\w+) to (\w+), ", kind):
        sizes = whole(number(found[1]), number(found[2]))
        sizes[1]["pattern"] = "^[0-9]+(B|KiB|MiB|GiB)?$"
        return sizes
    if kind.startswith("a rate such as "):
        return [{"type": "string", "pattern": "^[0-9]+/(s|m|h)( burst [0-9]+)?$"}]
    if kind.startswith("a rate of bytes such as "):
        size = "[0-9]+(B|KiB|MiB|GiB)?"
        return [{"type": "string", "pattern": f"^{size}/(s|m|h)( burst {size})?$"}]
    if kind == "true or false":
        return [{"type": "boolean"}, {"enum": ["true", "false"]}]
    if found := re.fullmatch(r"((?:[\w-]+, )*[\w-]+) or ([\w-]+)", kind):
        return [{"enum": [*found[1].split(", "), found[2]]}]
    if found := re.match(r"a list of operations: (.+)", kind):
        # In a single string, the operations are separated by commas.
        return [{"type": "array", "items": {"enum": found[1].split(", ")}}, {"type": "string"}]
    if kind.startswith("a list of "):
        return [{"type": "array", "items": {"type": "string"}}, {"type": "string"}]
    if kind.startswith("a table of keys by name"):
        entry = {"type": "object", "additionalProperties": False, "required": ["algorithm"]}
        entry["properties"] = {name: {"type": "string", "minLength": 1} for name in ("algorithm", *sorted(KEY_FILES))}
        return [{"type": "object", "additionalProperties": entry}]
    if kind == "the path of a file":
        return [{"type": "string", "minLength": 1}]
    if kind.startswith(("text ", "an ", "a cookie's name", "a level", "memory:")):
        return [{"type": "string"}]
    return [ANYTHING]


def value(kind):
    """The schema of a key. null removes the value from an earlier values file."""
    allowed = choices(kind)
    if ANYTHING in allowed:
        return ANYTHING
    if len(allowed) == 1 and "type" in allowed[0]:
        return {"description": kind, **allowed[0], "type": [allowed[0]["type"], "null"]}
    return {"description": kind, "anyOf": [*allowed, {"type": "null"}]}


def table(properties):
    return {"type": ["object", "null"], "additionalProperties": False, "properties": properties}


def config():
    """The schema of `config`."""
    tables, policy = {}, {}
    for name, kind in reference():
        if name.startswith("rooms."):
            path, here = name.rsplit('".', 1)[1], policy
        else:
            path, here = name, tables
        *path, last = path.split(".")
        for part in path:
            here = here.setdefault(part, table({}))["properties"]
        here[last] = value(kind)
    tables["rooms"] = {
        "type": ["object", "null"],
        "propertyNames": {"minLength": 1, "pattern": PATTERN},
        "additionalProperties": table(policy),
    }
    # The secret's file comes from the chart's `secretFiles`, so the entry may lack it here.
    return {"type": "object", "additionalProperties": False, "properties": tables}


def secret_files():
    """The allowed names in `secretFiles`: keys that name a file."""
    files = [re.escape(name) for name, kind in reference() if kind == "the path of a file"]
    files.append(rf"auth\.keys\.[A-Za-z0-9_-]+\.({'|'.join(sorted(KEY_FILES))})")
    return {"pattern": f"^({'|'.join(files)})$"}


def variables():
    """The allowed names in `extraEnv`, if they have the node's prefix."""
    names = {name for name, _ in reference() if not name.startswith("rooms.")} | {"rooms"}
    known = sorted("TIDEGATE_" + name.replace(".", "__").upper() for name in names)
    return {
        "type": "string",
        "minLength": 1,
        "if": {"pattern": "^TIDEGATE_"},
        "then": {"enum": known},
    }


def schema_with_config():
    """The expected text of values.schema.json."""
    schema = json.loads(SCHEMA.read_text())
    schema["properties"]["config"] = config()
    schema["properties"]["secretFiles"]["propertyNames"] = secret_files()
    schema["properties"]["extraEnv"]["items"]["properties"]["name"] = variables()
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    SCHEMA.write_text(schema_with_config())

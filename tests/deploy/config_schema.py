"""Makes what values.schema.json says of `config` from the node's own reference, gateway/docs/configuration.md, which a
test of the node holds to its table of keys.

`python tests/deploy/config_schema.py` writes it anew; a test compares it. With it, Helm refuses a key that the node does
not have, instead of rendering pods that end at once. It refuses nothing that the node takes: bounds that one value sets
to another, and what a file holds, are left to the node.
"""

import json
import re

from chart import CHART

REFERENCE = CHART.parents[1] / "gateway" / "docs" / "configuration.md"
SCHEMA = CHART / "values.schema.json"
# What TOML can say, for a kind of value that is not told apart here.
ANYTHING = {"$ref": "#/definitions/tomlValue"}
KEY_FILES = {"secret_file", "public_key_file"}
# What a room's name is made of; {sub} once, * at the end, and not one after the other.
PART = r"[^\s{}*\x00-\x1f\x7f]"
PATTERN = rf"^({PART}*\*?|{PART}*\{{sub\}}({PART}+\*?)?)$"


def reference():
    """Pairs of a key's name and what it may be given, in the order of the reference."""
    rows = re.findall(r"^\| `([^`]+)` \| (.+?) \| .+? \| (?:at once|after a restart) \|", REFERENCE.read_text(), re.M)
    assert rows, "the reference has no rows"
    return rows


def number(text):
    """The bytes of `64KiB`."""
    digits, unit = re.fullmatch(r"(\d+)(\D+)", text).groups()
    return int(digits) * 1024 ** ("B", "KiB", "MiB", "GiB").index(unit)


def whole(least, most):
    """A number; as text, too, which is how `--set-string` gives it."""
    return [{"type": "integer", "minimum": least, "maximum": most}, {"type": "string", "pattern": "^[0-9]+$"}]


def choices(kind):
    """The schemas of which a value of this kind meets one."""
    if kind.startswith("auto, or "):
        return [{"const": "auto"}, *choices(kind.removeprefix("auto, or "))]
    if kind.startswith("off, or "):
        # Not one enum: Helm 4 takes "0" and 0 for the same, and a list with both for unsound. YAML makes false of off.
        return [{"enum": ["off", "0", "false", False]}, {"const": 0}, *choices(kind.removeprefix("off, or "))]
    if found := re.fullmatch(r"a whole number from (\d+) to (\d+)", kind):
        return whole(int(found[1]), int(found[2]))
    if found := re.match(r"a time from (\d+)", kind):
        # A time that must not be nothing.
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
        # As one text, the operations stand between commas.
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
    """The schema of a key. null takes back what a values file before has said."""
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
            policy[name.rsplit(".", 1)[1]] = value(kind)
            continue
        *path, last = name.split(".")
        here = tables
        for part in path:
            here = here.setdefault(part, table({}))["properties"]
        here[last] = value(kind)
    tables["rooms"] = {
        "type": ["object", "null"],
        "propertyNames": {"minLength": 1, "pattern": PATTERN},
        "additionalProperties": table(policy),
    }
    # The secret's file belongs to the chart's `secretFiles`, and so the entry may lack it here.
    return {"type": "object", "additionalProperties": False, "properties": tables}


def secret_files():
    """The names that `secretFiles` may have: keys that name a file."""
    files = [re.escape(name) for name, kind in reference() if kind == "the path of a file"]
    files.append(rf"auth\.keys\.[A-Za-z0-9_-]+\.({'|'.join(sorted(KEY_FILES))})")
    return {"pattern": f"^({'|'.join(files)})$"}


def variables():
    """What a name in `extraEnv` may be, if it begins as the node's own do."""
    names = {name for name, _ in reference() if not name.startswith("rooms.")} | {"rooms"}
    known = sorted("TIDEGATE_" + name.replace(".", "__").upper() for name in names)
    return {
        "type": "string",
        "minLength": 1,
        "if": {"pattern": "^TIDEGATE_"},
        "then": {"enum": known},
    }


def schema_with_config():
    """The whole text of values.schema.json as it should be."""
    schema = json.loads(SCHEMA.read_text())
    schema["properties"]["config"] = config()
    schema["properties"]["secretFiles"]["propertyNames"] = secret_files()
    schema["properties"]["extraEnv"]["items"]["properties"]["name"] = variables()
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    SCHEMA.write_text(schema_with_config())

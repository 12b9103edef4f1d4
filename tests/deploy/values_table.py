"""Generates the table of values in helm/tidegate/README.md from the comments of values.yaml.

`python tests/deploy/values_table.py` rewrites it; a test checks that it is current. A comment that begins with `# --`
describes the key below it and everything in it.
"""

import json
import re

import yaml

from chart import CHART

BEGIN = "<!-- The table is made from values.yaml by tests/deploy/values_table.py. -->"
END = "<!-- End of the table. -->"
README = CHART / "README.md"


def described():
    """Pairs of a value's full name and its description, in the order of the file; a section is a pair with None."""
    path, text, found = [], None, []
    for line in (CHART / "values.yaml").read_text().splitlines():
        stripped = line.strip()
        if stripped.startswith("## "):
            found.append((None, stripped.removeprefix("## ")))
            text = None
        elif stripped.startswith("# -- "):
            text = stripped.removeprefix("# -- ")
        elif stripped.startswith("# ") and text is not None:
            text += " " + stripped.removeprefix("# ")
        elif match := re.match(r"( *)([A-Za-z_]+):", line):
            depth = len(match[1]) // 2
            path = [*path[:depth], match[2]]
            if text is not None:
                found.append((".".join(path), text))
            text = None
        else:
            text = None
    return found


def table():
    """The rows, with the two marks around them."""
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    lines = [BEGIN]
    for name, text in described():
        if name is None:
            lines += ["", f"### {text}", "", "| value | default | |", "|---|---|---|"]
            continue
        default = values
        for key in name.split("."):
            default = default[key]
        shown = json.dumps(default, separators=(", ", ": "), ensure_ascii=False)
        shown = "see `values.yaml`" if len(shown) > 80 else f"`{shown}`"
        lines.append(f"| `{name}` | {shown} | {text.replace('|', chr(92) + '|')} |")
    return "\n".join([*lines, "", END])


def readme_with_table():
    """The expected text of the README."""
    text = README.read_text()
    before, rest = text.split(BEGIN)
    return before + table() + rest.split(END)[1]


if __name__ == "__main__":
    README.write_text(readme_with_table())

"""The chart's README matches the chart."""

import yaml

from chart import CHART
from values_table import README, described, readme_with_table


def test_the_table_of_values_is_current():
    assert README.read_text() == readme_with_table(), "run python tests/deploy/values_table.py"


def test_every_value_is_described():
    names = {name for name, _ in described() if name}

    def undescribed(values, path):
        for key, value in values.items():
            name = f"{path}{key}"
            if name in names:
                continue
            if isinstance(value, dict) and value:
                yield from undescribed(value, f"{name}.")
            else:
                yield name

    assert not list(undescribed(yaml.safe_load((CHART / "values.yaml").read_text()), ""))

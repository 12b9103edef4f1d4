// The building blocks of dashboards: panels, rows, variables. Owns the look and the layout; the dashboards themselves own
// the queries.

import {
  BigValueColorMode,
  BigValueGraphMode,
  BigValueJustifyMode,
  BigValueTextMode,
  type Dashboard,
  DashboardCursorSync,
  type DataSourceRef,
  FieldColorModeId,
  GraphDrawStyle,
  LegendDisplayMode,
  type Panel,
  PercentChangeColorMode,
  type RowPanel,
  ScaleDistribution,
  SortOrder,
  StackingMode,
  ThresholdsMode,
  TooltipDisplayMode,
  type VariableModel,
  VariableRefresh,
  VariableSort,
  VisibilityMode,
  VizOrientation,
} from "@grafana/schema";
import type { Options as StatOptions } from "@grafana/schema/dist/esm/raw/composable/stat/panelcfg/x/StatPanelCfg_types.gen";
import type {
  FieldConfig as TimeSeriesFieldConfig,
  Options as TimeSeriesOptions,
} from "@grafana/schema/dist/esm/raw/composable/timeseries/panelcfg/x/TimeSeriesPanelCfg_types.gen";

/** A query in the form that the Prometheus data source expects. */
export interface Target {
  refId: string;
  expr: string;
  legendFormat: string;
  instant: boolean;
  range: boolean;
  datasource: DataSourceRef;
}

/** Units that Grafana knows and we use. */
export type Unit = "short" | "s" | "bytes" | "Bps" | "percentunit" | "cps" | "dateTimeAsIso" | "cores";

/** A panel without a position. */
export type Draft = (id: number, x: number, y: number, width: number) => Panel;

/** A titled group of panels; the panels of a line have equal widths. */
export interface Row {
  title: string;
  lines: { height: number; panels: Draft[] }[];
}

const datasource: DataSourceRef = { type: "prometheus", uid: "${datasource}" };
const columns = 24;

function targets(queries: [expr: string, legend: string][], instant: boolean): Target[] {
  return queries.map(([expr, legendFormat], index) => ({
    refId: String.fromCharCode("A".charCodeAt(0) + index),
    expr,
    legendFormat,
    instant,
    range: !instant,
    datasource,
  }));
}

/** A current value. Red from `bad` on, or below it. */
export function stat(
  title: string,
  description: string,
  unit: Unit,
  expr: string,
  bad?: { from: number } | { below: number },
): Draft {
  const steps =
    bad === undefined
      ? [{ value: null, color: "blue" }]
      : "from" in bad
        ? [
            { value: null, color: "green" },
            { value: bad.from, color: "red" },
          ]
        : [
            { value: null, color: "red" },
            { value: bad.below, color: "green" },
          ];
  const options: StatOptions = {
    colorMode: BigValueColorMode.Value,
    graphMode: BigValueGraphMode.None,
    justifyMode: BigValueJustifyMode.Auto,
    orientation: VizOrientation.Auto,
    percentChangeColorMode: PercentChangeColorMode.Standard,
    reduceOptions: { calcs: ["lastNotNull"], fields: "", values: false },
    showPercentChange: false,
    textMode: BigValueTextMode.Auto,
    wideLayout: true,
  };
  return (id, x, y, w) => ({
    id,
    type: "stat",
    title,
    description,
    datasource,
    gridPos: { h: 4, w, x, y },
    targets: targets([[expr, ""]], true).map((target) => ({ ...target })),
    fieldConfig: {
      defaults: {
        unit,
        color: { mode: FieldColorModeId.Thresholds },
        thresholds: { mode: ThresholdsMode.Absolute, steps: steps.map(({ value, color }) => ({ value, color })) },
      },
      overrides: [],
    },
    options: { ...options },
  });
}

/** Lines over time. */
export function graph(
  title: string,
  description: string,
  unit: Unit,
  queries: [expr: string, legend: string][],
  look: { stacked?: boolean; max?: number; logarithmic?: boolean } = {},
): Draft {
  const custom: TimeSeriesFieldConfig = {
    drawStyle: GraphDrawStyle.Line,
    lineWidth: 1,
    fillOpacity: look.stacked ? 30 : 8,
    showPoints: VisibilityMode.Never,
    spanNulls: false,
    stacking: { mode: look.stacked ? StackingMode.Normal : StackingMode.None, group: "A" },
    ...(look.logarithmic ? { scaleDistribution: { type: ScaleDistribution.Log, log: 10 } } : {}),
  };
  const options: TimeSeriesOptions = {
    legend: {
      calcs: ["lastNotNull", "max"],
      displayMode: LegendDisplayMode.Table,
      placement: "bottom",
      showLegend: true,
    },
    tooltip: { mode: TooltipDisplayMode.Multi, sort: SortOrder.Descending },
  };
  return (id, x, y, w) => ({
    id,
    type: "timeseries",
    title,
    description,
    datasource,
    gridPos: { h: 8, w, x, y },
    targets: targets(queries, false).map((target) => ({ ...target })),
    fieldConfig: {
      defaults: {
        unit,
        min: look.logarithmic ? undefined : 0,
        max: look.max,
        color: { mode: FieldColorModeId.PaletteClassic },
        custom: { ...custom },
      },
      overrides: [],
    },
    options: { ...options },
  });
}

/** Stats in one line. */
export const numbers = (...panels: Draft[]) => ({ height: 4, panels });

/** Graphs in one line. */
export const graphs = (...panels: Draft[]) => ({ height: 8, panels });

/** The three variables; `one` selects a single pod. */
function variables(one: boolean): VariableModel[] {
  const query = (text: string) => ({ query: text, refId: "variable" });
  const chosenByLabel = {
    type: "query",
    datasource,
    refresh: VariableRefresh.onTimeRangeChanged,
    sort: VariableSort.alphabeticalAsc,
  } as const;
  return [
    { name: "datasource", label: "Data source", type: "datasource", query: "prometheus" },
    {
      ...chosenByLabel,
      name: "namespace",
      label: "Namespace",
      query: query("label_values(tidegate_build_info, namespace)"),
      includeAll: true,
      multi: true,
      allValue: ".*",
      current: { text: ["All"], value: ["$__all"], selected: true },
    },
    {
      ...chosenByLabel,
      name: "pod",
      label: "Pod",
      query: query('label_values(tidegate_build_info{namespace=~"$namespace"}, pod)'),
      ...(one
        ? {}
        : {
            includeAll: true,
            multi: true,
            allValue: ".*",
            current: { text: ["All"], value: ["$__all"], selected: true },
          }),
    },
  ];
}

/** A dashboard with these rows. */
export function dashboard(uid: string, title: string, description: string, rows: Row[], one = false): Dashboard {
  const panels: (Panel | RowPanel)[] = [];
  let [id, y] = [0, 0];
  for (const row of rows) {
    panels.push({
      id: ++id,
      type: "row",
      title: row.title,
      collapsed: false,
      panels: [],
      gridPos: { h: 1, w: columns, x: 0, y },
    });
    y += 1;
    for (const line of row.lines) {
      const width = Math.floor(columns / line.panels.length);
      line.panels.forEach((draft, index) => panels.push(draft(++id, index * width, y, width)));
      y += line.height;
    }
  }
  return {
    uid,
    title,
    description,
    tags: ["tidegate"],
    schemaVersion: 41,
    editable: true,
    graphTooltip: DashboardCursorSync.Crosshair,
    refresh: "30s",
    time: { from: "now-3h", to: "now" },
    timezone: "browser",
    templating: { list: variables(one) },
    annotations: { list: [] },
    links: [
      {
        title: "Tidegate",
        type: "dashboards",
        tags: ["tidegate"],
        icon: "external link",
        tooltip: "",
        asDropdown: true,
        targetBlank: false,
        includeVars: true,
        keepTime: true,
      },
    ],
    panels,
  };
}

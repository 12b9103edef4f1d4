// Redis, as the nodes see it.

import { dashboard, graph, graphs, numbers, stat } from "./panels.js";

const these = 'namespace=~"$namespace", pod=~"$pod"';
const rate = (metric: string) => `rate(tidegate_broker_${metric}{${these}}[$__rate_interval])`;
const canary = (q: number, by = "le") => `histogram_quantile(${q}, sum by (${by}) (${rate("canary_seconds_bucket")}))`;

export const redis = dashboard("tidegate-redis", "Tidegate / Redis", "Redis, as the nodes see it.", [
  {
    title: "Now",
    lines: [
      numbers(
        stat(
          "Nodes with Redis",
          "Nodes whose connections all stand and receive.",
          "short",
          `sum(tidegate_broker_up{${these}})`,
        ),
        stat("Nodes without", "Nodes that have lost a connection.", "short", `sum(1 - tidegate_broker_up{${these}})`, {
          from: 1,
        }),
        stat("Canary, p99", "Round trip of a message that a connection sends to itself.", "s", canary(0.99), {
          from: 0.5,
        }),
        stat(
          "Interruptions, last hour",
          "Subscriber connections that were lost.",
          "short",
          `sum(increase(tidegate_broker_interruptions_total{${these}}[1h]))`,
          { from: 1 },
        ),
        stat("Topics", "A topic that two nodes want counts twice.", "short", `sum(tidegate_broker_topics{${these}})`),
        stat(
          "Waiting to be sent",
          "Bytes in the outgoing queues.",
          "bytes",
          `sum(tidegate_broker_publish_queue_bytes{${these}})`,
          { from: 8388608 },
        ),
      ),
    ],
  },
  {
    title: "Connections",
    lines: [
      graphs(
        graph("Connections by role", "Connections that stand.", "short", [
          [`sum by (role) (tidegate_broker_connections{${these}})`, "{{role}}"],
        ]),
        graph(
          "Up by node",
          "1 while everything between the node and Redis works.",
          "short",
          [[`sum by (pod) (tidegate_broker_up{${these}})`, "{{pod}}"]],
          { max: 1 },
        ),
        graph("Interruptions", "Subscriber connections lost, and canaries that stayed away, per second.", "cps", [
          [`sum(${rate("interruptions_total")})`, "interruptions"],
          [`sum(${rate("canary_missed_total")})`, "canaries missed"],
        ]),
        graph("Subscribed again", "Topics per second.", "cps", [
          [`sum by (pod) (${rate("resubscriptions_total")})`, "{{pod}}"],
        ]),
      ),
    ],
  },
  {
    title: "Duration",
    lines: [
      graphs(
        graph(
          "Canary",
          "Round trip of a message that a connection sends to itself.",
          "s",
          [
            [canary(0.5), "p50"],
            [canary(0.99), "p99"],
          ],
          { logarithmic: true },
        ),
        graph(
          "Canary, p99 by node",
          "One node alone: its network. All of them: Redis.",
          "s",
          [[canary(0.99, "pod, le"), "{{pod}}"]],
          { logarithmic: true },
        ),
      ),
    ],
  },
  {
    title: "Traffic",
    lines: [
      graphs(
        graph(
          "Received",
          "Publications per second.",
          "cps",
          [[`sum by (pod) (${rate("received_total")})`, "{{pod}}"]],
          { stacked: true },
        ),
        graph(
          "Received bytes",
          "Bytes per second, envelopes included.",
          "Bps",
          [[`sum by (pod) (${rate("received_bytes_total")})`, "{{pod}}"]],
          { stacked: true },
        ),
        graph(
          "Published by outcome",
          "Publications per second.",
          "cps",
          [[`sum by (result) (${rate("publications_total")})`, "{{result}}"]],
          { stacked: true },
        ),
        graph("Waiting to be sent", "Bytes in the outgoing queues.", "bytes", [
          [`sum by (pod) (tidegate_broker_publish_queue_bytes{${these}})`, "{{pod}}"],
        ]),
      ),
    ],
  },
]);

// Redis as seen by the nodes.

import { dashboard, graph, graphs, numbers, stat } from "./panels.js";

const these = 'namespace=~"$namespace", pod=~"$pod"';
const rate = (metric: string) => `rate(tidegate_broker_${metric}{${these}}[$__rate_interval])`;
const canary = (q: number, by = "le") => `histogram_quantile(${q}, sum by (${by}) (${rate("canary_seconds_bucket")}))`;

export const redis = dashboard("tidegate-redis", "Tidegate / Redis", "Redis as seen by the nodes.", [
  {
    title: "Now",
    lines: [
      numbers(
        stat(
          "Nodes with Redis",
          "Nodes whose connections are all up and receiving.",
          "short",
          `sum(tidegate_broker_up{${these}})`,
        ),
        stat("Nodes without", "Nodes that have lost a connection.", "short", `sum(1 - tidegate_broker_up{${these}})`, {
          from: 1,
        }),
        stat("Canary, p99", "Time from a publishing connection through Redis to a receiving one of the same node.", "s", canary(0.99), {
          from: 0.5,
        }),
        stat(
          "Interruptions, last hour",
          "Subscriber connections that were lost.",
          "short",
          `sum(increase(tidegate_broker_interruptions_total{${these}}[1h]))`,
          { from: 1 },
        ),
        stat("Topics", "Subscribed topics; a topic of two nodes counts twice.", "short", `sum(tidegate_broker_topics{${these}})`),
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
        graph("Connections by role", "Open connections.", "short", [
          [`sum by (role) (tidegate_broker_connections{${these}})`, "{{role}}"],
        ]),
        graph(
          "Up by node",
          "1 while all connections between the node and Redis work.",
          "short",
          [[`sum by (pod) (tidegate_broker_up{${these}})`, "{{pod}}"]],
          { max: 1 },
        ),
        graph("Interruptions", "Subscriber connections lost, and canaries that did not arrive, per second.", "cps", [
          [`sum(${rate("interruptions_total")})`, "interruptions"],
          [`sum(${rate("canary_missed_total")})`, "canaries missed"],
        ]),
        graph("Resubscriptions", "Topics per second.", "cps", [
          [`sum by (pod) (${rate("resubscriptions_total")})`, "{{pod}}"],
          [`sum(${rate("topic_interruptions_total")})`, "ended by Redis"],
        ]),
        graph(
          "Connections ended",
          "Per second. demoted: the server became a replica. missed: publications did not arrive. silent: no answer.",
          "cps",
          [[`sum by (role, cause) (${rate("connections_ended_total")})`, "{{role}}, {{cause}}"]],
        ),
        graph("Refused rooms", "Topics that Redis no longer allows, and refusals of new ones per second.", "short", [
          [`sum(tidegate_broker_topics_refused{${these}})`, "no longer allowed"],
          [`sum(${rate("subscriptions_refused_total")})`, "never allowed, per second"],
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
          "Time from a publishing connection through Redis to a receiving one of the same node.",
          "s",
          [
            [canary(0.5), "p50"],
            [canary(0.99), "p99"],
          ],
          { logarithmic: true },
        ),
        graph(
          "Canary, p99 by node",
          "If one node is slow, suspect its network; if all are slow, Redis.",
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
  {
    title: "Histories",
    lines: [
      graphs(
        graph(
          "Recorded",
          "Publications per second in rooms with history. duplicate: the id was known. not_kept: delivered, but the room's key holds something that is no history.",
          "cps",
          [[`sum by (result) (${rate("recorded_total")})`, "{{result}}"]],
          { stacked: true },
        ),
        graph(
          "Histories read",
          "Per second. trimmed: publications that were asked for had been removed. lost: the position was not known.",
          "cps",
          [
            [`sum by (result) (${rate("log_reads_total")})`, "{{result}}"],
            [`sum(${rate("log_read_publications_total")})`, "publications"],
          ],
        ),
        graph("Positions asked", "Per second: where the history of a room is now.", "cps", [
          [`sum by (result) (${rate("log_opens_total")})`, "{{result}}"],
        ]),
        graph(
          "Requests for histories",
          "Requests for positions and for parts of histories. At most 256 of a node are in flight; the others wait for their turn.",
          "short",
          [
            [`sum by (pod) (tidegate_broker_requests_waiting{${these}})`, "{{pod}} waiting"],
            [`sum by (pod) (tidegate_broker_requests_in_flight{${these}})`, "{{pod}} in flight"],
          ],
        ),
        graph(
          "Outcomes looked up",
          "Publications per second whose connection was lost before the answer. recorded: found in the history. missing: not there, and sent again. unknown: Redis was restarted, the history was shortened, or the nodes' user may not close connections (client|kill).",
          "cps",
          [[`sum by (result) (${rate("verified_total")})`, "{{result}}"]],
          { stacked: true },
        ),
        graph(
          "Functions loaded",
          "How often nodes loaded the functions that record publications into Redis, per second.",
          "cps",
          [[`sum by (result) (${rate("function_loads_total")})`, "{{result}}"]],
        ),
      ),
    ],
  },
]);

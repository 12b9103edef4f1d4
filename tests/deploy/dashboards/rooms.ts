// Rooms, and the path of a publication.

import { dashboard, graph, graphs, numbers, stat } from "./panels.js";

const these = 'namespace=~"$namespace", pod=~"$pod"';
const rate = (metric: string, labels = "") => `rate(${metric}{${these}${labels}}[$__rate_interval])`;
const total = (metric: string, labels = "") => `sum(${rate(metric, labels)})`;
const quantile = (q: number, metric: string, by = "le") =>
  `histogram_quantile(${q}, sum by (${by}) (${rate(`${metric}_bucket`)}))`;

export const rooms = dashboard(
  "tidegate-rooms",
  "Tidegate / Rooms and delivery",
  "Rooms, and the path of a publication.",
  [
    {
      title: "Rooms",
      lines: [
        numbers(
          stat(
            "Rooms on nodes",
            "A room with sessions on two nodes counts twice.",
            "short",
            `sum(tidegate_rooms{${these}})`,
          ),
          stat(
            "Subscriptions",
            "Sessions times the rooms each is in.",
            "short",
            `sum(tidegate_subscriptions{${these}})`,
          ),
          stat(
            "Members per room and node",
            "Subscriptions ÷ rooms.",
            "short",
            `sum(tidegate_subscriptions{${these}}) / sum(tidegate_rooms{${these}})`,
          ),
          stat(
            "Sessions per publication",
            "Deliveries ÷ publications: how wide the fan-out is.",
            "short",
            `${total("tidegate_deliveries_total")} / ${total("tidegate_publications_total")}`,
          ),
          stat(
            "Bytes per message",
            "Mean payload to clients.",
            "bytes",
            `${total("tidegate_payload_bytes_total", ', direction="out"')} / ${total("tidegate_messages_total", ', direction="out"')}`,
          ),
          stat(
            "Framing",
            "Bytes on the wire ÷ payload bytes, to clients.",
            "short",
            `${total("tidegate_network_bytes_total", ', direction="out"')} / ${total("tidegate_payload_bytes_total", ', direction="out"')}`,
          ),
        ),
        graphs(
          graph("Rooms by node", "Rooms that have a session on the node.", "short", [
            [`sum by (pod) (tidegate_rooms{${these}})`, "{{pod}}"],
          ]),
          graph("Subscriptions by node", "Sessions times the rooms each is in.", "short", [
            [`sum by (pod) (tidegate_subscriptions{${these}})`, "{{pod}}"],
          ]),
          graph("Topics in Redis by node", "Topics that the node wants to be subscribed to.", "short", [
            [`sum by (pod) (tidegate_broker_topics{${these}})`, "{{pod}}"],
          ]),
        ),
      ],
    },
    {
      title: "From clients to Redis",
      lines: [
        graphs(
          graph("Messages from clients", "Per second.", "cps", [
            [total("tidegate_messages_total", ', direction="in"'), "messages"],
          ]),
          graph(
            "Publications by outcome",
            "Redis' answers to what nodes published.",
            "cps",
            [[`sum by (result) (${rate("tidegate_broker_publications_total")})`, "{{result}}"]],
            { stacked: true },
          ),
          graph("Payload from clients", "Bytes per second.", "Bps", [
            [total("tidegate_payload_bytes_total", ', direction="in"'), "in"],
          ]),
        ),
      ],
    },
    {
      title: "From Redis to clients",
      lines: [
        graphs(
          graph(
            "Publications by node",
            "Per second, for rooms with a session on the node.",
            "cps",
            [[`sum by (pod) (${rate("tidegate_publications_total")})`, "{{pod}}"]],
            { stacked: true },
          ),
          graph(
            "Deliveries by node",
            "Publications times the sessions each is queued for.",
            "cps",
            [[`sum by (pod) (${rate("tidegate_deliveries_total")})`, "{{pod}}"]],
            { stacked: true },
          ),
          graph("Payload to clients", "Bytes per second.", "Bps", [
            [total("tidegate_payload_bytes_total", ', direction="out"'), "out"],
          ]),
        ),
        graphs(
          graph(
            "Fan-out duration",
            "From the arrival of a publication at a node to its last write.",
            "s",
            [
              [quantile(0.5, "tidegate_fanout_seconds"), "p50"],
              [quantile(0.99, "tidegate_fanout_seconds"), "p99"],
              [quantile(1, "tidegate_fanout_seconds"), "worst"],
            ],
            { logarithmic: true },
          ),
          graph("Fan-out, p99 by node", "The same by node.", "s", [
            [quantile(0.99, "tidegate_fanout_seconds", "pod, le"), "{{pod}}"],
          ]),
          graph(
            "Publications slower than 0.19 s",
            "Fraction of all publications; the objective is less than one in a hundred.",
            "percentunit",
            [
              [
                `1 - ${total("tidegate_fanout_seconds_bucket", ', le="0.19073486328125"')} / ${total("tidegate_fanout_seconds_count")}`,
                "slow",
              ],
            ],
          ),
        ),
      ],
    },
    {
      title: "Lost messages",
      lines: [
        graphs(
          graph(
            "Gaps by cause",
            "Notifications to rooms that messages may be missing, per second.",
            "cps",
            [[`sum by (cause) (${rate("tidegate_gaps_total")})`, "{{cause}}"]],
            { stacked: true },
          ),
          graph(
            "Slow consumers",
            "Sessions closed because their outbound queue was full, per second.",
            "cps",
            [[`sum by (pod) (${rate("tidegate_slow_consumers_total")})`, "{{pod}}"]],
            { stacked: true },
          ),
          graph(
            "Dropped for newer messages",
            "Publications queued for a slow session and dropped for newer ones of their room, per second.",
            "cps",
            [[`sum by (overflow) (${rate("tidegate_outbound_dropped_total")})`, "{{overflow}}"]],
            { stacked: true },
          ),
          graph(
            "Too large or too many",
            "Publications over broker.max_publication, and those that did not fit into an inbox.",
            "cps",
            [
              [total("tidegate_broker_oversized_total"), "oversized"],
              [total("tidegate_inbox_overflows_total"), "inbox overflows"],
            ],
          ),
        ),
      ],
    },
    {
      title: "Rooms with a history",
      lines: [
        graphs(
          graph(
            "Clients that come back",
            "Sessions that continue after a position, per second: found in the node's memory, or by reading the room's log, once for all who wait.",
            "cps",
            [[`sum by (from) (${rate("tidegate_history_resumptions_total")})`, "{{from}}"]],
            { stacked: true },
          ),
          graph(
            "Recoveries",
            "Subscriptions of Centrifuge clients that asked for what they have missed, per second. Those that are not recovered load their state anew.",
            "cps",
            [
              [total("tidegate_history_recoveries_total", ', recovered="true"'), "recovered"],
              [total("tidegate_history_recoveries_total", ', recovered="false"'), "not recovered"],
            ],
            { stacked: true },
          ),
          graph(
            "Repairs",
            "Readings of rooms' logs per second: to find out what an interruption has cost, and checks of silent rooms (one a minute for each).",
            "cps",
            [
              [`sum by (pod) (${rate("tidegate_history_repairs_total")})`, "{{pod}}"],
              [`sum(${rate("tidegate_history_checks_total")})`, "checks"],
            ],
            { stacked: true },
          ),
        ),
        graphs(
          graph(
            "Time to repair",
            "How long rooms with a history wait to know what an interruption has cost; 0 while nothing is repaired. What is published meanwhile waits, too.",
            "s",
            [
              [`(${quantile(0.5, "tidegate_history_repair_seconds")} >= 0) or vector(0)`, "p50"],
              [`(${quantile(0.99, "tidegate_history_repair_seconds")} >= 0) or vector(0)`, "p99"],
            ],
          ),
          graph(
            "Rooms under repair",
            "Rooms that wait for a reading of their history to find out what an interruption has cost.",
            "short",
            [[`sum by (pod) (tidegate_history_repairing_rooms{${these}})`, "{{pod}}"]],
            { stacked: true },
          ),
          graph(
            "Repaired and unrecorded messages",
            "Messages per second that had not arrived from the broker and were read from the rooms' histories, and those that were published past a history by a plain PUBLISH.",
            "cps",
            [
              [total("tidegate_history_repaired_messages_total"), "repaired"],
              [total("tidegate_history_unrecorded_total"), "unrecorded"],
            ],
          ),
        ),
      ],
    },
  ],
);

// All nodes together: what clients notice (rate, errors, duration), sessions, and resource use.

import { dashboard, graph, graphs, numbers, stat } from "./panels.js";

const these = 'namespace=~"$namespace", pod=~"$pod"';
const rate = (metric: string, labels = "") => `rate(${metric}{${these}${labels}}[$__rate_interval])`;
const quantile = (q: number, metric: string, by = "le") =>
  `histogram_quantile(${q}, sum by (${by}) (${rate(`${metric}_bucket`)}))`;

export const fleet = dashboard(
  "tidegate-fleet",
  "Tidegate / Fleet",
  "All nodes: what clients notice, and the resources it takes.",
  [
    {
      title: "Now",
      lines: [
        numbers(
          stat("Nodes", "Nodes that are scraped.", "short", `count(tidegate_build_info{${these}})`, { below: 1 }),
          stat("Connections", "Open sockets of clients.", "short", `sum(tidegate_sockets{${these}})`),
          stat(
            "Publications",
            "Publications per second that the nodes receive. A publication that two nodes receive counts twice.",
            "cps",
            `sum(${rate("tidegate_publications_total")})`,
          ),
          stat(
            "Deliveries",
            "Publications per second, times the sessions each is written to.",
            "cps",
            `sum(${rate("tidegate_deliveries_total")})`,
          ),
          stat(
            "Fan-out, p99",
            "99 of 100 publications are written to all their sessions within this time.",
            "s",
            quantile(0.99, "tidegate_fanout_seconds"),
            { from: 0.19 },
          ),
          stat(
            "Refused with 5xx",
            "Fraction of connection attempts that are answered 5xx.",
            "percentunit",
            `sum(${rate("tidegate_handshakes_total", ', result="unavailable"')}) / sum(${rate("tidegate_handshakes_total")})`,
            { from: 0.01 },
          ),
          stat(
            "Gaps, last hour",
            "Notifications to rooms that messages may be missing.",
            "short",
            `sum(increase(tidegate_gaps_total{${these}}[1h]))`,
            { from: 1 },
          ),
          stat(
            "Nodes without Redis",
            "Nodes that have lost a connection to Redis.",
            "short",
            `sum(1 - tidegate_broker_up{${these}})`,
            { from: 1 },
          ),
        ),
      ],
    },
    {
      title: "Connecting: rate, errors, duration",
      lines: [
        graphs(
          graph(
            "Handshakes by result",
            "Requests for a session.",
            "cps",
            [[`sum by (result) (${rate("tidegate_handshakes_total")})`, "{{result}}"]],
            { stacked: true },
          ),
          graph(
            "Refusals by reason",
            "Requests that were refused, by reason.",
            "cps",
            [
              [
                `sum by (reason) (${rate("tidegate_refusals_total")}) > 0 or topk(1, sum by (reason) (${rate("tidegate_refusals_total")}))`,
                "{{reason}}",
              ],
            ],
            { stacked: true },
          ),
          graph("Handshake duration", "From a request's head to a session whose subscriptions are active.", "s", [
            [quantile(0.5, "tidegate_handshake_seconds"), "p50"],
            [quantile(0.99, "tidegate_handshake_seconds"), "p99"],
          ]),
        ),
      ],
    },
    {
      title: "Delivering: rate, errors, duration",
      lines: [
        graphs(
          graph(
            "Deliveries and publications",
            "Per second.",
            "cps",
            [
              [`sum(${rate("tidegate_deliveries_total")})`, "deliveries"],
              [`sum(${rate("tidegate_publications_total")})`, "publications"],
            ],
            { logarithmic: true },
          ),
          graph(
            "Problems",
            "Gap notifications to rooms, sessions closed as slow, publications that Redis did not accept.",
            "cps",
            [
              [`sum(${rate("tidegate_gaps_total")})`, "gaps"],
              [`sum(${rate("tidegate_slow_consumers_total")})`, "slow consumers"],
              [`sum(${rate("tidegate_broker_publications_total", ', result!="acked"')})`, "publications not accepted"],
            ],
          ),
          graph("Fan-out duration", "From the arrival of a publication at a node to its last write.", "s", [
            [quantile(0.5, "tidegate_fanout_seconds"), "p50"],
            [quantile(0.9, "tidegate_fanout_seconds"), "p90"],
            [quantile(0.99, "tidegate_fanout_seconds"), "p99"],
          ]),
        ),
      ],
    },
    {
      title: "Sessions",
      lines: [
        graphs(
          graph(
            "Sessions by protocol",
            "Open sessions.",
            "short",
            [[`sum by (protocol) (tidegate_connections{${these}})`, "{{protocol}}"]],
            { stacked: true },
          ),
          graph("Opened and ended", "Sessions per second.", "cps", [
            [`sum(${rate("tidegate_connections_opened_total")})`, "opened"],
            [`sum(${rate("tidegate_connections_closed_total")})`, "ended"],
          ]),
          graph(
            "Over a limit",
            "Messages and commands refused by limit, and connections refused for their address, per second.",
            "cps",
            [
              [`sum by (limit) (${rate("tidegate_limited_total")})`, "{{limit}}"],
              [`sum(${rate("tidegate_refusals_total", ', reason=~"attempts|address_connections"')})`, "addresses"],
            ],
          ),
          graph(
            "Ends by reason",
            "Sessions that ended, per second.",
            "cps",
            [
              [
                `sum by (reason) (${rate("tidegate_connections_closed_total")}) > 0 or topk(1, sum by (reason) (${rate("tidegate_connections_closed_total")}))`,
                "{{reason}}",
              ],
            ],
            { stacked: true },
          ),
        ),
      ],
    },
    {
      title: "Nodes: utilisation, saturation, errors",
      lines: [
        graphs(
          graph("Processor", "Cores in use.", "cores", [
            [`sum by (pod) (${rate("process_cpu_seconds_total", ', job="tidegate"')})`, "{{pod}}"],
          ]),
          graph("Memory", "Resident memory.", "bytes", [
            [`sum by (pod) (process_resident_memory_bytes{${these}, job="tidegate"})`, "{{pod}}"],
          ]),
          graph(
            "Connections, share of the limit",
            "Open sockets ÷ limits.connections.",
            "percentunit",
            [
              [
                `sum by (pod) (tidegate_sockets{${these}}) / sum by (pod) (tidegate_sockets_limit{${these}})`,
                "{{pod}}",
              ],
            ],
            { max: 1 },
          ),
          graph(
            "File descriptors, share of the limit",
            "Open files ÷ the limit of the process.",
            "percentunit",
            [
              [
                `sum by (pod) (process_open_fds{${these}, job="tidegate"}) / sum by (pod) (process_max_fds{${these}, job="tidegate"})`,
                "{{pod}}",
              ],
            ],
            { max: 1 },
          ),
        ),
        graphs(
          graph("Shards behind, p99", "How late the shard loops, which own the sockets, run.", "s", [
            [quantile(0.99, "tidegate_shard_lag_seconds", "pod, le"), "{{pod}}"],
          ]),
          graph("Waiting for clients", "Bytes in the sessions' outbound queues.", "bytes", [
            [`sum by (pod) (tidegate_outbound_bytes{${these}})`, "{{pod}}"],
          ]),
          graph("Network", "Bytes per second on clients' sockets.", "Bps", [
            [`sum(${rate("tidegate_network_bytes_total", ', direction="out"')})`, "out"],
            [`sum(${rate("tidegate_network_bytes_total", ', direction="in"')})`, "in"],
          ]),
          graph("Draining, and versions", "Draining nodes, and nodes by version.", "short", [
            [`sum(tidegate_draining{${these}})`, "draining"],
            [`count by (version) (tidegate_build_info{${these}})`, "{{version}}"],
          ]),
        ),
      ],
    },
  ],
);
